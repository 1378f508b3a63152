"""clmerge: continual learning by model merging.

``import clmerge`` imports nothing heavy: public names are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Learner": "clmerge.runs.learner",
    "MergeCallback": "clmerge.callbacks",
    "ContinualClassifier": "clmerge.training.module",
    "Merger": "clmerge.merging",
    "load_run": "clmerge.runs.loaded_run",
}

__all__ = ["ContinualClassifier", "Learner", "MergeCallback", "Merger", "__version__", "load_run"]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'clmerge' has no attribute {name!r}; public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
