"""Choose the settings of one merger: a grid, or differential evolution for more than two parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clmerge.merging import Merger
from clmerge.search.grid import Values, points, with_values

MAX_GRID_DIMENSIONS = 2
_POPULATION = 8
_GENERATIONS = 5


class Search:
    """The accuracies of one merger's settings on images that are not the test images.

    Args:
        name: Name of the merger.
        merger: The merger, with the settings that are not searched.
        grid: Values by parameter.
        check: Raises a ValueError for a merger that cannot be used; called with every point of the grid.

    Attributes:
        tried: The tried values, with the accuracies on every task, in order.
        method: ``grid``, or ``differential_evolution`` for more than two parameters.

    Raises:
        ValueError: If the merger refuses a point of the grid.
    """

    def __init__(
        self, name: str, merger: Merger, grid: Mapping[str, Sequence[Any]], *, check: Callable[[Merger], None]
    ) -> None:
        self.name, self.merger = name, merger
        self.grid = {parameter: list(values) for parameter, values in grid.items()}
        for values in points(self.grid):
            try:
                candidate = with_values(merger, values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"expected settings that {name!r} can have, got {values}: {error}") from error
            check(candidate)
        self.method = "grid" if len(self.grid) <= MAX_GRID_DIMENSIONS else "differential_evolution"
        self.tried: list[tuple[Values, list[float]]] = []

    @property
    def chosen(self) -> Values:
        """The values of the highest score; the first of equals."""
        return max(self.tried, key=lambda point: mean_accuracy(point[1]))[0]

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

    def evolve(self, evaluate: Callable[[Sequence[Values]], None]) -> None:
        """Try the points of the grid that differential evolution asks for, a generation at a time.

        Args:
            evaluate: Evaluates candidates and passes their accuracies to ``keep``.
        """
        from scipy.optimize import differential_evolution

        options = list(self.grid.values())

        def objective(indices: Any) -> Any:  # (parameters, candidates): a generation goes over the images together
            candidates = [
                {name: values[round(index)] for name, values, index in zip(self.grid, options, column, strict=True)}
                for column in indices.T
            ]
            evaluate(candidates)
            scores = [(values, mean_accuracy(found)) for values, found in self.tried]
            return np.array([-next(score for values, score in scores if values == wanted) for wanted in candidates])

        differential_evolution(
            objective,
            bounds=[(0, len(values) - 1) for values in options],
            integrality=[True] * len(options),
            popsize=_POPULATION,
            maxiter=_GENERATIONS,
            init="sobol",
            updating="deferred",
            vectorized=True,
            polish=False,
            rng=0,
        )

    def to_dict(self, model: str) -> dict[str, Any]:
        """Return the search in the form of ``results.json``, without a rule.

        Args:
            model: The model that has the chosen values.
        """
        tried: list[dict[str, Any]] = [
            {"values": values, "accuracy": accuracies, "score": mean_accuracy(accuracies)}
            for values, accuracies in self.tried
        ]
        return {
            "model": model,
            "merger": type(self.merger).__name__,
            "method": self.method,
            "split": "val",
            "parameters": self.grid,
            "points": tried,
            "chosen": self.chosen,
            "score": max(point["score"] for point in tried),
            "rule": None,
        }


def mean_accuracy(accuracies: Sequence[float]) -> float:
    """Return the mean over the tasks, which a search maximises.

    Example:
        >>> mean_accuracy([0.5, 1.0])
        0.75
    """
    return sum(accuracies) / len(accuracies)
