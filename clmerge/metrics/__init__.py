"""Accuracy per task, the accuracy matrix, and the continual-learning figures computed from it."""

from clmerge.metrics.accuracy import TaskAccuracy
from clmerge.metrics.continual import (
    average,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    last,
    learning_accuracy,
    merge_gap,
    normalised_accuracy,
    transfer,
)
from clmerge.metrics.matrix import AccuracyMatrix

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
    "last",
    "learning_accuracy",
    "merge_gap",
    "normalised_accuracy",
    "transfer",
]
