"""Choose settings of mergers on validation images; test images are not used."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clmerge.deploy.naming import check_settings
from clmerge.runs.comparison.grid import Values, points, with_values
from clmerge.runs.comparison.ledger import Ledger
from clmerge.runs.comparison.refold import sweep
from clmerge.runs.comparison.stored_run import StoredRun
from clmerge.merging import Merger

MAX_GRID_DIMENSIONS = 2
_POPULATION = 8
_GENERATIONS = 5


class Search:
    """The validation accuracies of one merger's settings.

    Args:
        run: The run whose task vectors are merged.
        name: Name of the merger.
        merger: The merger, with the settings that are not searched.
        grid: Values by parameter.

    Attributes:
        tried: The tried values, with the validation accuracies after the last task, in order.
        method: ``grid``, or ``differential_evolution`` for more than two parameters.

    Raises:
        ValueError: If the run has tasks without validation images, or the merger refuses a point of the grid.
    """

    def __init__(self, run: StoredRun, name: str, merger: Merger, grid: Mapping[str, Sequence[Any]]) -> None:
        if not run.has_validation:
            raise ValueError(
                f"expected validation images of every task to choose {', '.join(grid)} of {name!r} on, got a run of a "
                f"stream that holds none out ({run.folder.path}): train with stream.val_fraction above 0, or give the "
                "value in --mergers"
            )
        self.run, self.name, self.merger = run, name, merger
        self.grid = {parameter: list(values) for parameter, values in grid.items()}
        for values in points(self.grid):
            try:
                candidate = with_values(merger, values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"expected settings that {name!r} can have, got {values}: {error}") from error
            check_settings({name: candidate}, run.base, len(run.tasks))
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
            accuracies: Validation accuracies of every task.
        """
        known = [values for values, _ in self.tried]
        for values, found in zip(candidates, accuracies, strict=True):
            if values not in known:
                self.tried.append((values, found))
                known.append(values)

    def to_dict(self, model: str) -> dict[str, Any]:
        """Return the search in the form of the document, without a rule.

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
            "run": self.run.name,
            "method": self.method,
            "split": "val",
            "parameters": self.grid,
            "points": tried,
            "chosen": self.chosen,
            "score": max(point["score"] for point in tried),
            "rule": None,
        }


def search_all(searches: Sequence[Search], ledger: Ledger, memory: int) -> None:
    """Try the grids of all mergers together, or the points of differential evolution for more than two parameters.

    Args:
        searches: The searches, of one run.
        ledger: Stores the rows, so that a search resumes after an interruption.
        memory: Bytes of accumulators and weights that are held at a time.
    """
    grids = {search: points(search.grid) for search in searches if search.method == "grid"}
    if grids:
        _try(grids, ledger, memory)
    for search in searches:
        if search.method != "grid":
            _evolve(search, ledger, memory)


def _try(candidates: Mapping[Search, Sequence[Values]], ledger: Ledger, memory: int) -> None:
    """Evaluate candidates on the validation images after the last task, in one pass if memory allows."""
    mergers = {
        f"{search.name} {i}": with_values(search.merger, values)
        for search, several in candidates.items()
        for i, values in enumerate(several)
    }
    run = next(iter(candidates)).run
    what = f"settings of {', '.join(search.name for search in candidates)}"
    table = sweep(run, mergers, ledger, split="val", last_only=True, memory=memory, what=what)
    for search, several in candidates.items():
        rows = [table[f"{search.name} {i}"][len(run.tasks)] for i in range(len(several))]
        setting = "task_aware" if search.merger.task_views else run.evaluation
        search.keep(several, [row[setting] for row in rows])


def _evolve(search: Search, ledger: Ledger, memory: int) -> None:
    from scipy.optimize import differential_evolution

    options = list(search.grid.values())

    def objective(indices: Any) -> Any:  # (parameters, candidates): a generation goes over the images together
        candidates = [
            {name: values[round(index)] for name, values, index in zip(search.grid, options, column, strict=True)}
            for column in indices.T
        ]
        _try({search: candidates}, ledger, memory)
        scores = [(values, mean_accuracy(found)) for values, found in search.tried]
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


def mean_accuracy(accuracies: Sequence[float]) -> float:
    """Return the mean over the tasks, which a search maximises.

    Example:
        >>> mean_accuracy([0.5, 1.0])
        0.75
    """
    return sum(accuracies) / len(accuracies)
