"""Choose on validation images how far to go: forget as much as the control allows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clmerge.deploy.predictors import Merged
from clmerge.merging.strategies.goal import Goal
from clmerge.names import tell
from clmerge.runs.stored_run import StoredRun
from clmerge.weights.task_vector import State

FORGET, CONTROL = 0, 1
Point = tuple[float, float]
"""Accuracy on the tasks to forget, and on the others."""


@dataclass(frozen=True)
class Choice:
    """A chosen candidate.

    Attributes:
        value: The coefficient, or the number of steps.
        points: Accuracies on validation images by candidate.
        control: The least control that was asked for.
    """

    value: float
    points: Mapping[float, Point]
    control: float

    def told(self) -> dict[str, Any]:
        """Return it in JSON types."""
        forget, control = self.points[self.value]
        return {
            "least_control": self.control,
            "forget": forget,
            "control": control,
            "tried": [{"value": value, "forget": one[0], "control": one[1]} for value, one in self.points.items()],
        }


def best(points: Mapping[float, Point], at_least: float) -> Choice:
    """Return the candidate with the lowest accuracy on what is to be forgotten whose control stays (arXiv 2212.04089).

    Of equal ones the first is taken.

    Args:
        points: Accuracies by candidate; the first, 0, is the model as it was.
        at_least: Share of the first one's control that must stay.

    Example:
        >>> best({0.0: (0.9, 0.8), 0.5: (0.4, 0.78), 1.0: (0.1, 0.2)}, 0.95).value
        0.5
    """
    limit = at_least * next(iter(points.values()))[CONTROL]
    goal = Goal([-1.0, 0.0], {CONTROL: limit})
    return Choice(max(points, key=lambda value: goal.rank(points[value])), points, limit)


def choose(
    run: StoredRun,
    values: Sequence[float],
    candidate: Callable[[float], State],
    *,
    forget: Sequence[int],
    control: Sequence[int],
    at_least: float,
    memory: int,
    what: str,
) -> Choice:
    """Evaluate candidates on validation images, several in one pass as memory allows, and choose.

    Args:
        run: The run, after its last task.
        values: The candidates; 0, the model as it was, is put before them.
        candidate: Returns the weights of a candidate, by the module's names.
        forget: Tasks to forget.
        control: The others.
        at_least: Share of the model's control that must stay.
        memory: Bytes of weights that are held at a time.
        what: Name of the candidates in the progress display.
    """
    values = [0.0, *(value for value in values if value)]
    num = max(1, memory // (4 * run.num_parameters))
    points: dict[float, Point] = {}
    last = len(run.tasks) - 1
    for first in range(0, len(values), num):
        part = values[first : first + num]
        label = f"{run.name}: {len(part)} {what}, val images"
        predictors = {str(value): Merged(candidate(value)) for value in part}
        rows = run.evaluate_again(label, predictors, last, "val")
        for value in part:
            row = rows[str(value)][run.evaluation]
            points[value] = (_mean([row[task] for task in forget]), _mean([row[task] for task in control]))
        if not run.trainers.progress:
            tell(label)
    return best(points, at_least)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
