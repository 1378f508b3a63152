"""Lightning callbacks: the part of clmerge that plugs into existing projects.

``MergeCallback`` is imported on first use, because ``clmerge report`` uses this package without Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clmerge.callbacks.merge import MergeCallback

__all__ = ["MergeCallback"]


def __getattr__(name: str) -> object:
    if name != "MergeCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clmerge.callbacks.merge import MergeCallback

    return MergeCallback
