"""Accuracy per task, the accuracy matrix, and the continual-learning figures computed from it.

``TaskAccuracy`` is imported on first use: torchmetrics brings torchvision, and ``clmerge report`` needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clmerge.results.metrics.continual import (
    average,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    gap_to_experts,
    last,
    learning_accuracy,
    merge_gap,
    normalised_accuracy,
    transfer,
    worst_task,
)
from clmerge.results.metrics.matrix import AccuracyMatrix

if TYPE_CHECKING:
    from clmerge.results.metrics.accuracy import TaskAccuracy

__all__ = [
    "AccuracyMatrix",
    "TaskAccuracy",
    "average",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "gap_to_experts",
    "last",
    "learning_accuracy",
    "merge_gap",
    "normalised_accuracy",
    "transfer",
    "worst_task",
]


def __getattr__(name: str) -> object:
    if name != "TaskAccuracy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clmerge.results.metrics.accuracy import TaskAccuracy

    return TaskAccuracy
