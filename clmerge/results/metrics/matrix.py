"""The accuracy matrix R of one model, growing by one row per finished task."""

from typing import TypedDict

import numpy as np

from clmerge.results.metrics import continual
from clmerge.results.metrics.continual import Array, Row


class Figures(TypedDict):
    """Every figure of one accuracy matrix, NaN where undefined. See :mod:`clmerge.results.metrics.continual`."""

    R: list[list[float]]
    average_accuracy: list[float]
    average_incremental_accuracy: float
    average_incremental_accuracy_by_samples: float
    forgetting: float
    forgetting_per_task: list[float]
    backward_transfer: float
    forward_transfer: float
    learning_accuracy: float
    transfer: float
    average: float
    last: float
    normalised_accuracy: float
    merge_gap: list[float]
    worst_task: list[float]
    gap_to_experts: list[float]


class AccuracyMatrix:
    """Hold the accuracies of one model on all tasks after each task, and summarise them.

    Args:
        num_tasks: Number of tasks of the stream, the number of columns.

    Example:
        >>> matrix = AccuracyMatrix(2)
        >>> matrix.add_row([0.75, 0.25])
        >>> matrix.add_row([0.5, 1.0])
        >>> summary = matrix.summary(baseline=[0.0, 0.125])
        >>> summary["average_accuracy"], summary["forgetting"], summary["forward_transfer"]
        ([0.75, 0.75], 0.25, 0.125)
    """

    def __init__(self, num_tasks: int) -> None:
        if num_tasks < 1:
            raise ValueError(f"expected at least one task, got num_tasks={num_tasks}")
        self.num_tasks = num_tasks
        self._rows: list[Array] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def values(self) -> Array:
        """A copy of the matrix R, ``(num_rows, num_tasks)``, float64, NaN where undefined."""
        return np.array(self._rows, dtype=np.float64).reshape(len(self._rows), self.num_tasks)

    def add_row(self, accuracies: Row) -> None:
        """Append the accuracies measured after one more task.

        Args:
            accuracies: Accuracy in [0, 1] on every task of the stream, ``(num_tasks,)``; NaN or None where it
                is not defined (tasks that a growing head cannot score yet).

        Raises:
            ValueError: If the length is wrong, an accuracy is outside [0, 1], or all rows have been added.
        """
        if len(self) == self.num_tasks:
            raise ValueError(f"expected at most {self.num_tasks} rows, one per task, got one more")
        row = check_row(accuracies, self.num_tasks)
        self._rows.append(row)

    def until(self, num_rows: int) -> "AccuracyMatrix":
        """Return a copy with the first rows."""
        earlier = AccuracyMatrix(self.num_tasks)
        earlier._rows = self._rows[:num_rows]
        return earlier

    def summary(
        self,
        *,
        baseline: Row | None = None,
        expert: "AccuracyMatrix | None" = None,
        samples: Row | None = None,
    ) -> Figures:
        """Compute every figure of :mod:`clmerge.results.metrics.continual` from the rows so far.

        Args:
            baseline: Accuracy of the model nothing was trained on, per task; without it forward transfer is
                NaN.
            expert: Matrix of the un-merged model with as many rows; without it normalised accuracy, merge gap and
                gap to the experts are NaN.
            samples: Number of test samples per task; without it the sample-weighted figure is NaN.

        Returns:
            The figures by name; numbers, or lists with one number per row or per task. NaN where undefined.
        """
        values = self.values
        undefined = float("nan")
        unknown = [undefined] * len(self)
        return {
            "R": values.tolist(),
            "average_accuracy": continual.average_accuracy(values),
            "average_incremental_accuracy": continual.average_incremental_accuracy(values),
            "average_incremental_accuracy_by_samples": (
                undefined if samples is None else continual.average_incremental_accuracy(values, samples=samples)
            ),
            "forgetting": continual.forgetting(values),
            "forgetting_per_task": continual.forgetting_per_task(values),
            "backward_transfer": continual.backward_transfer(values),
            "forward_transfer": undefined if baseline is None else continual.forward_transfer(values, baseline),
            "learning_accuracy": continual.learning_accuracy(values),
            "transfer": continual.transfer(values),
            "average": continual.average(values),
            "last": continual.last(values),
            "normalised_accuracy": (
                undefined if expert is None else continual.normalised_accuracy(values, expert.values.diagonal())
            ),
            "merge_gap": unknown if expert is None else continual.merge_gap(expert.values, values),
            "worst_task": continual.worst_task(values),
            "gap_to_experts": (
                unknown if expert is None else continual.gap_to_experts(values, expert.values.diagonal())
            ),
        }


def check_row(accuracies: Row, num_tasks: int) -> Array:
    """Return one accuracy per task as float64 after checking them.

    Args:
        accuracies: Accuracies in [0, 1], ``(num_tasks,)``, NaN or None where undefined.
        num_tasks: Number of tasks of the stream.

    Returns:
        A new array, ``(num_tasks,)``.

    Raises:
        ValueError: If the length is wrong or an accuracy is outside [0, 1].
    """
    row = continual.to_array(accuracies)
    if row.shape != (num_tasks,):
        raise ValueError(f"expected one accuracy per task, shape ({num_tasks},), got shape {row.shape}")
    wrong = row[(row < 0) | (row > 1)]
    if len(wrong):
        raise ValueError(
            f"expected accuracies in [0, 1], got {float(wrong[0])}; percentages are made when they are shown"
        )
    return row
