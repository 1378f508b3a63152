"""Mergers: streaming rules that fold one task vector at a time into the running model. Pure tensor code."""

from clmerge.merging.linear import TaskArithmetic, WeightAverage
from clmerge.merging.magmax import MagMax
from clmerge.merging.merger import Merger, Score, registered_mergers
from clmerge.merging.sparsify import RandomDrop, Sparsifier, TrimModel, TrimTensor
from clmerge.merging.ties import TIES

__all__ = [
    "TIES",
    "MagMax",
    "Merger",
    "RandomDrop",
    "Score",
    "Sparsifier",
    "TaskArithmetic",
    "TrimModel",
    "TrimTensor",
    "WeightAverage",
    "registered_mergers",
]
