"""Choose settings of mergers by a score: which values to try, which was best, and rules fitted to the best."""
