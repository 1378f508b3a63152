"""Finishers, which scale or cut the merged vector after a rule."""
