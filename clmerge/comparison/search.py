"""Choose settings of mergers on validation images; test images are not looked at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clmerge.comparison.grid import Values, points, with_values
from clmerge.comparison.ledger import Ledger, Row
from clmerge.comparison.refold import sweep
from clmerge.comparison.stored_run import StoredRun
from clmerge.merging import Merger

MAX_GRID_DIMENSIONS = 2
_POPULATION = 8
_GENERATIONS = 5


class Search:
    """The validation accuracies of one merger's settings.

    Args:
        run: The run whose task vectors are merged.
        name: Name of the merger.
        merger: It, with the settings that are not searched.
        grid: Values by parameter.

    Attributes:
        tried: What was tried, with the validation accuracies after the last task, in order.
        method: ``grid``, or ``differential_evolution`` where there are more than two parameters.

    Raises:
        ValueError: If the run has tasks without validation images.
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
        self.method = "grid" if len(self.grid) <= MAX_GRID_DIMENSIONS else "differential_evolution"
        self.tried: list[tuple[Values, list[float]]] = []

    @property
    def chosen(self) -> Values:
        """The values of the highest score; the first of equals."""
        return max(self.tried, key=lambda point: mean_accuracy(point[1]))[0]

    def build(self) -> Merger:
        """Return the merger with the chosen values."""
        return with_values(self.merger, self.chosen)

    def try_points(self, candidates: Sequence[Values], ledger: Ledger, memory: int) -> list[float]:
        """Evaluate candidates together after the last task, and return their scores.

        Args:
            candidates: One value for every parameter each.
            ledger: Keeps what is found.
            memory: Bytes of accumulators and weights that are held at a time.
        """
        mergers = {f"{i}": with_values(self.merger, values) for i, values in enumerate(candidates)}
        table = sweep(
            self.run, mergers, ledger, split="val", last_only=True, memory=memory, what=f"settings of {self.name}"
        )
        found = [table[name][len(self.run.tasks)]["task_agnostic"] for name in mergers]
        known = [values for values, _ in self.tried]
        for values, accuracies in zip(candidates, found, strict=True):
            if values not in known:
                self.tried.append((values, accuracies))
                known.append(values)
        return [mean_accuracy(accuracies) for accuracies in found]

    def go(self, ledger: Ledger, memory: int) -> None:
        """Try the whole grid, or with more than two parameters what differential evolution asks for.

        Args:
            ledger: Keeps what is found, so that a search goes on after a kill.
            memory: Bytes of accumulators and weights that are held at a time.
        """
        if self.method == "grid":
            self.try_points(points(self.grid), ledger, memory)
            return
        from scipy.optimize import differential_evolution

        values = list(self.grid.values())

        def objective(indices: Any) -> Any:  # (parameters, candidates): a generation goes over the images together
            candidates = [
                {p: values[i][round(index)] for i, (p, index) in enumerate(zip(self.grid, column, strict=True))}
                for column in indices.T
            ]
            return -np.array(self.try_points(candidates, ledger, memory))

        differential_evolution(
            objective,
            bounds=[(0, len(options) - 1) for options in values],
            integrality=[True] * len(values),
            popsize=_POPULATION,
            maxiter=_GENERATIONS,
            init="sobol",
            updating="deferred",
            vectorized=True,
            polish=False,
            rng=0,
        )

    def to_dict(self, model: str) -> dict[str, Any]:
        """Return the search as the document has it, without a rule.

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


def mean_accuracy(accuracies: Sequence[float]) -> float:
    """Return the mean over the tasks, which is what a search maximises.

    Example:
        >>> mean_accuracy([0.5, 1.0])
        0.75
    """
    return sum(accuracies) / len(accuracies)


def fit_rule(chosen: Sequence[float]) -> tuple[float, float]:
    """Fit ``scale = a * t^b`` to the best scales after tasks 1..t, by least squares in the logarithms.

    Args:
        chosen: The best scales, all positive; with one of them b is 0.

    Returns:
        ``a`` and ``b``.

    Example:
        >>> a, b = fit_rule([1.0, 0.5, 1 / 3])
        >>> round(a, 6), round(b, 6)
        (1.0, -1.0)
    """
    if len(chosen) == 1:
        return chosen[0], 0.0
    b, log_a = np.polyfit(np.log(np.arange(1, len(chosen) + 1)), np.log(chosen), 1)
    return math.exp(log_a), float(b)


def rule_rows(
    run: StoredRun, name: str, merger: Merger, scales: Sequence[float], ledger: Ledger, memory: int
) -> tuple[list[Row], dict[str, Any]]:
    """Evaluate a merger whose scale after task t follows from the best scales after the tasks before.

    After task t the scale is ``a * t^b``, fitted to the scales that were best on the validation images after tasks
    1..t-1, and kept within the values tried. After the first task there are none: the merger's own scale is used.

    Args:
        run: The run.
        name: Name of the merger.
        merger: It.
        scales: Scales to choose from after every task, all positive.
        ledger: Keeps what is found.
        memory: Bytes of accumulators and weights that are held at a time.

    Returns:
        The rows on the test images, and the rule as the document has it.

    Raises:
        ValueError: If a scale is not positive.
    """
    if min(scales) <= 0:
        raise ValueError(f"expected scales above 0 for a rule in t, got {min(scales)}")
    candidates = {f"{scale}": with_values(merger, {"scale": scale}) for scale in scales}
    table = sweep(run, candidates, ledger, split="val", memory=memory, what=f"scales of {name}")
    counts = range(1, len(run.tasks) + 1)
    best = [max(scales, key=lambda s: mean_accuracy(table[f"{s}"][t]["task_agnostic"][:t])) for t in counts]
    used = [float(vars(merger)["scale"])]
    for t in counts[1:]:
        a, b = fit_rule(best[: t - 1])
        used.append(min(max(a * t**b, min(scales)), max(scales)))
    rows = []
    for t in counts:
        one = {name: with_values(merger, {"scale": used[t - 1]})}
        found = sweep(run, one, ledger, order=range(t), last_only=True, memory=memory, what="scale by rule")
        rows.append(found[name][t])
    a, b = fit_rule(best)
    return rows, {"chosen": best, "used": used, "a": a, "b": b}
