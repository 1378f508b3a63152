"""A quadratic surrogate of the accuracies, and the search that goes by it (MAP, arXiv 2406.07529)."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from clmerge.merging.strategies.goal import front
from clmerge.merging.strategies.space import Units
from clmerge.merging.strategies.strategy import Generations, Strategy, sobol

_DRAWN = 4096  # points at which the surrogate is read
_BATCH = 8


class Surrogate:
    """Accuracies as ``sigmoid(q_0 + b c + c^T Q c)`` of the coefficients ``c``, one function per task.

    The logits are linear in the unknowns, so they are fitted by least squares; the paper fits the accuracies with a
    nonlinear routine. Accuracies are kept half an image away from 0 and 1.

    Args:
        points: Coefficients, shape (points, parameters).
        accuracies: Shape (points, tasks).
        images: Number of images behind each accuracy.

    Attributes:
        terms: Solution, shape ((d + 1)(d + 2) / 2, tasks): constant, linear, then products i <= j.

    Raises:
        ValueError: If there are fewer points than unknowns.

    Example:
        >>> fitted = Surrogate(np.array([[0.0], [0.5], [1.0]]), np.array([[0.5], [0.8], [0.7]]))
        >>> fitted.terms[1:].ravel().round(4)
        array([ 4.6979, -3.8506])
    """

    def __init__(self, points: Units, accuracies: NDArray[np.float64], images: int = 1000) -> None:
        if len(points) < (needed := num_terms(points.shape[1])):
            raise ValueError(f"expected {needed} points or more for {points.shape[1]} parameters, got {len(points)}")
        kept = np.clip(accuracies, 0.5 / images, 1 - 0.5 / images)
        solved = np.linalg.lstsq(_products(points), np.log(kept / (1 - kept)), rcond=None)[0]
        self.terms: NDArray[np.float64] = solved.astype(np.float64)

    def predict(self, points: Units) -> NDArray[np.float64]:
        """Return the accuracies at other coefficients, shape (points, tasks)."""
        found: NDArray[np.float64] = 1 / (1 + np.exp(-_products(points) @ self.terms))
        return found


def num_terms(dimensions: int) -> int:
    """Return the number of unknowns of a quadratic function: ``(d + 1)(d + 2) / 2``."""
    return (dimensions + 1) * (dimensions + 2) // 2


class Quadratic(Strategy):
    """Fit a quadratic surrogate per task, and try where it is best (MAP, arXiv 2406.07529).

    Half of the budget, and twice as many points as there are unknowns if it allows that, goes to points that fill the
    space: the middle, every parameter alone at its top, a Sobol sequence. Then the surrogate is fitted again after
    every eight points: the next are its optimum for the goal, and points of its predicted Pareto front that are spread
    over the tasks. All that is reported was measured. The paper finds the front with NSGA-III in a space three times as
    large as the one it samples; here no point lies outside of the ranges.
    """

    name = "quadratic"

    @override
    def _generate(self) -> Generations:
        problem, size = self.problem, len(self.problem.space)
        unknowns = num_terms(size)
        budget = self.budget if problem.budget is not None else max(self.budget, 3 * unknowns)
        if budget <= unknowns:
            raise ValueError(
                f"expected a budget above {unknowns} for a quadratic function of {size} parameters, got {budget}"
            )
        count = min(2 * unknowns, max(unknowns, budget // 2))
        filled = np.vstack([np.full((1, size), 0.5), np.eye(size), sobol(size, count, problem.seed)])[:count]
        points, told = filled, list((yield filled))
        drawn = np.vstack([sobol(size, _DRAWN, problem.seed + 1), np.eye(size)])
        while (left := budget - len(points)) > 0:
            tasks = sorted({*problem.goal.counted, *problem.goal.at_least})
            fitted = Surrogate(points, np.array([[row[task] for task in tasks] for row in told]), problem.images)
            rows = np.full((len(drawn), len(problem.goal.weights)), np.nan)
            rows[:, tasks] = fitted.predict(drawn)
            scores = np.array([problem.score(row) for row in rows.tolist()])
            gains = np.array([problem.goal.gains(row) for row in rows.tolist()])
            picked = _picked(scores, gains, points, drawn, min(left, _BATCH))
            if not picked:
                return
            asked = drawn[picked]
            told += list((yield asked))
            points = np.vstack([points, asked])


def _picked(scores: Units, gains: Units, points: Units, drawn: Units, count: int) -> list[int]:
    """Return the best new point by score, then points of the front, each the best for a task or far from the others."""
    new = [i for i in np.argsort(-scores, kind="stable") if not (points == drawn[i]).all(axis=1).any()]
    picked = [int(i) for i in new[:1]]
    best = [int(i) for i in np.array(new)[_unbeaten(gains[new])]] if new else []
    for task in range(gains.shape[1]):
        picked += [i for i in sorted(best, key=lambda i: -gains[i][task])[:1] if i not in picked]
    while len(picked) < count and (rest := [i for i in best if i not in picked]):
        picked.append(max(rest, key=lambda i: float(np.abs(gains[picked] - gains[i]).sum(axis=1).min())))
    return picked[:count]


def _unbeaten(gains: Units) -> list[int]:
    """Return the front of many points; of those with the largest sums first, so that few are compared."""
    order = np.argsort(-gains.sum(axis=1), kind="stable")[:512]
    return [int(order[i]) for i in front(gains[order].tolist())]


def _products(points: Units) -> NDArray[np.float64]:
    size = points.shape[1]
    squares = [points[:, i] * points[:, j] for i in range(size) for j in range(i, size)]
    return np.column_stack([np.ones(len(points)), points, *squares])
