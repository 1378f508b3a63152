"""The run folder, accuracy matrices and figures of a run."""
