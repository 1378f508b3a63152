"""Choose the settings of one merger: points that a strategy asks for, and the best of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clmerge.merging import Merger
from clmerge.merging.strategies.goal import Goal, front
from clmerge.merging.strategies.methods import METHODS, default_method
from clmerge.merging.strategies.space import Space
from clmerge.merging.strategies.strategy import Problem
from clmerge.search.grid import Values, points, value_at, with_values

_CHECKED = 1000  # points of a grid that are tried on the merger's constructor


class Search:
    """The accuracies of one merger's settings on images that are not the test images.

    Args:
        name: Name of the merger.
        merger: The merger, with the settings that are not searched.
        grid: Values by parameter.
        check: Raises a ValueError for a merger that cannot be used; called with the points of the grid.
        goal: What is maximised, over all tasks of the run.
        method: Name of the strategy; None: the grid for one or two parameters, then differential evolution.
        budget: How many points the strategy may ask for; None: its own choice.
        images: Number of images behind an accuracy.
        shown: Indices of the tasks whose accuracies the document lists; None: all.

    Attributes:
        tried: The tried values, with the accuracies on every task, in order.

    Raises:
        ValueError: If the merger refuses a point of the grid, or the strategy cannot work on it.
    """

    def __init__(
        self,
        name: str,
        merger: Merger,
        grid: Mapping[str, Sequence[Any]],
        *,
        check: Callable[[Merger], None],
        goal: Goal,
        method: str | None = None,
        budget: int | None = None,
        images: int = 1000,
        shown: Sequence[int] | None = None,
    ) -> None:
        self.name, self.merger, self.goal, self.shown = name, merger, goal, shown
        self.grid = {parameter: list(values) for parameter, values in grid.items()}
        self._check = check
        self.method = method or default_method(len(self.grid))
        start = {path: value for path in self.grid if (value := value_at(merger, path)) is not None}
        problem = Problem(Space(self.grid), goal, budget=budget, start=start, images=images)
        self.strategy = METHODS[self.method](problem)
        for values in self._examples():
            self.candidate(values)
        self.tried: list[tuple[Values, list[float]]] = []

    def candidate(self, values: Values) -> Merger:
        """Return the merger with other values.

        Raises:
            ValueError: If it refuses them.
        """
        try:
            candidate = with_values(self.merger, values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected settings that {self.name!r} can have, got {values}: {error}") from error
        self._check(candidate)
        return candidate

    def limit_by(self, accuracies: Sequence[float]) -> None:
        """Turn the goal's limits, which are shares, into accuracies.

        Args:
            accuracies: The accuracies that they are shares of, by task.
        """
        self.goal = Goal(self.goal.weights, {task: s * accuracies[task] for task, s in self.goal.at_least.items()})
        self.strategy.problem.goal = self.goal

    @property
    def chosen(self) -> Values:
        """The values of the highest score within the limits; the first of equals."""
        return max(self.tried, key=lambda point: self.goal.rank(point[1]))[0]

    @property
    def keeps_limits(self) -> bool:
        """Whether a point was found that misses no limit."""
        return any(not self.goal.shortfall(accuracies) for _, accuracies in self.tried)

    def build(self) -> Merger:
        """Return the merger with the chosen values."""
        return with_values(self.merger, self.chosen)

    def keep(self, candidates: Sequence[Values], accuracies: Sequence[list[float]]) -> None:
        """Record the accuracies of candidates, each point once.

        Args:
            candidates: Points, each with one value for every parameter.
            accuracies: Accuracies of every task.
        """
        known = [values for values, _ in self.tried]
        for values, found in zip(candidates, accuracies, strict=True):
            if values not in known:
                self.tried.append((values, found))
                known.append(values)

    def to_dict(self, model: str) -> dict[str, Any]:
        """Return the search in the form of ``results.json``, without a rule.

        Args:
            model: The model that has the chosen values.
        """
        tried: list[dict[str, Any]] = [
            {"values": values, "accuracy": self._shown(accuracies), "score": self.goal.score(accuracies)}
            for values, accuracies in self.tried
        ]
        return {
            "model": model,
            "merger": type(self.merger).__name__,
            "method": self.method,
            "split": "val",
            "goal": {
                "weights": list(self.goal.weights),
                "at_least": {str(task): least for task, least in self.goal.at_least.items()},
            },
            "parameters": self.grid,
            "points": tried,
            "front": front([self.goal.gains(accuracies) for _, accuracies in self.tried]),
            "chosen": self.chosen,
            "score": next(point["score"] for point in tried if point["values"] == self.chosen),
            "rule": None,
        }

    def _shown(self, accuracies: Sequence[float]) -> list[float]:
        return [accuracies[task] for task in (range(len(accuracies)) if self.shown is None else self.shown)]

    def _examples(self) -> list[Values]:
        """Return the points that the merger must accept: a whole grid, or what the strategy asks for first."""
        count = 1
        for values in self.grid.values():
            count *= len(values)
        return points(self.grid) if count <= _CHECKED and self.strategy.stays_listed else self.strategy.ask()


def mean_accuracy(accuracies: Sequence[float]) -> float:
    """Return the mean over the tasks, which a search maximises unless it is given another goal.

    Example:
        >>> mean_accuracy([0.5, 1.0])
        0.75
    """
    return sum(accuracies) / len(accuracies)
