"""Finishers, which scale, clip or truncate the merged vector after a rule."""
