"""Lightning callbacks: the part of clmerge that plugs into projects that already exist."""

from clmerge.callbacks.merge import MergeCallback

__all__ = ["MergeCallback"]
