"""Lightning callbacks: the part of clmerge that plugs into existing projects.

They are imported on first use, because ``clmerge report`` uses this package without Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clmerge.callbacks.best_weights import BestWeights
    from clmerge.callbacks.merge import MergeCallback
    from clmerge.callbacks.online_merging import OnlineMerging
    from clmerge.callbacks.population import Population
    from clmerge.callbacks.salience_mask import SalienceMask
    from clmerge.callbacks.sparse import Sparse
    from clmerge.callbacks.subspace import Subspace
    from clmerge.callbacks.trajectory_average import TrajectoryAverage

_HOMES = {
    "BestWeights": "best_weights",
    "MergeCallback": "merge",
    "OnlineMerging": "online_merging",
    "Population": "population",
    "SalienceMask": "salience_mask",
    "Sparse": "sparse",
    "Subspace": "subspace",
    "TrajectoryAverage": "trajectory_average",
}

__all__ = [
    "BestWeights",
    "MergeCallback",
    "OnlineMerging",
    "Population",
    "SalienceMask",
    "Sparse",
    "Subspace",
    "TrajectoryAverage",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
