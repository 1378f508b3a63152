"""What a search maximises: a weighted mean of accuracies, within limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """A mean of the accuracies on the tasks, and accuracies that must not be missed.

    Attributes:
        weights: How much each task counts, by index; a negative weight counts the accuracy as a loss: a task to
            unlearn. 0: its accuracy is not looked at.
        at_least: The least accuracy by task index. A point that misses one is chosen only if every point does, and
            then the one that misses least.

    Example:
        >>> goal = Goal([1, -1], at_least={0: 0.5})
        >>> round(goal.score([0.8, 0.2]), 3), round(goal.shortfall([0.4, 0.2]), 3)
        (0.3, 0.1)
    """

    weights: Sequence[float]
    at_least: Mapping[int, float] = field(default_factory=dict)

    @property
    def counted(self) -> list[int]:
        """Indices of the tasks that count."""
        return [task for task, weight in enumerate(self.weights) if weight]

    def score(self, accuracies: Sequence[float]) -> float:
        """Return the weighted mean.

        Args:
            accuracies: Accuracies on all tasks; NaN where undefined.

        Raises:
            ValueError: If the accuracy on a task that counts is undefined.
        """
        for task in {*self.counted, *self.at_least}:
            if math.isnan(accuracies[task]):
                raise ValueError(
                    f"expected an accuracy on task {task} to go by, got none: the head of this run does not know the "
                    "classes of tasks that come after those that are merged; let another task count"
                )
        total = sum(self.weights[task] * accuracies[task] for task in self.counted)
        return total / sum(abs(self.weights[task]) for task in self.counted)

    def shortfall(self, accuracies: Sequence[float]) -> float:
        """Return by how much accuracies fall below their limits, summed."""
        return sum(max(least - accuracies[task], 0.0) for task, least in self.at_least.items())

    def rank(self, accuracies: Sequence[float]) -> tuple[float, float]:
        """Return a key by which better points are larger: within the limits first, then the score."""
        return -self.shortfall(accuracies), self.score(accuracies)

    def gains(self, accuracies: Sequence[float]) -> list[float]:
        """Return what is to be large for every task that counts: its accuracy, or minus its accuracy."""
        return [math.copysign(1.0, self.weights[task]) * accuracies[task] for task in self.counted]


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other point dominates (as good everywhere, better somewhere).

    Args:
        points: What is to be large, one list per point.

    Example:
        >>> front([[1.0, 0.0], [0.5, 0.5], [0.4, 0.5], [0.0, 1.0]])
        [0, 1, 3]
    """

    def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
        return list(one) != list(other) and all(a >= b for a, b in zip(one, other, strict=True))

    return [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
