"""Merge the task vectors of finished runs again, with any mergers, and evaluate as ``fit`` does."""
