"""Take tasks out of the merged models of a finished run, and state what was done: ``clmerge forget``."""
