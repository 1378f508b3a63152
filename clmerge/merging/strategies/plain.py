"""Strategies that need no further library: grid, preferences, differential evolution."""

import itertools
import math

import numpy as np
from typing_extensions import override

from clmerge.merging.strategies.space import Units, is_numeric
from clmerge.merging.strategies.strategy import Generations, Strategy, sobol

_POPULATION = 8  # per parameter
_GENERATIONS = 5


class Grid(Strategy):
    """All combinations of the listed values, in one generation."""

    name = "grid"
    stays_listed = True

    @override
    def _generate(self) -> Generations:
        sides = [np.linspace(0, 1, len(values)) for values in self.problem.space.grid.values()]
        yield np.array(list(itertools.product(*sides)))


class Preferences(Strategy):
    """Weights that sum to 1, evenly spread over the simplex: a sweep over what is wanted of each task.

    With ``TaskArithmetic(scale=1)`` over ``weights[*]`` it interpolates as rewarded soups (arXiv 2306.04488) and
    personalized soups (arXiv 2310.11564) do. Steps are as fine as the budget allows; every single task is among them.
    """

    name = "preferences"

    @override
    def _generate(self) -> Generations:
        space = self.problem.space
        for name, values in space.grid.items():
            if not is_numeric(values) or (min(values), max(values)) != (0, 1):
                raise ValueError(f"expected weights from 0 to 1 for preferences, got {values} as {name}")
        size, steps = len(space), 1
        while math.comb(steps + size, size - 1) <= self.budget and size > 1:
            steps += 1
        yield simplex(size, steps)


class DifferentialEvolution(Strategy):
    """Differential evolution (best1bin) over the listed values: 5 generations of 8 points per parameter."""

    name = "differential_evolution"
    stays_listed = True

    @override
    def _generate(self) -> Generations:
        space, rng = self.problem.space, np.random.default_rng(self.problem.seed)
        size = max(_POPULATION * len(space), 5)
        budget = size * (1 + _GENERATIONS) if self.problem.budget is None else self.problem.budget
        size = min(size, max(budget, 5))
        members = sobol(len(space), size, self.problem.seed)
        told = yield members
        scores = np.array([self.problem.score(found) for found in told])
        left = budget - size
        while left >= size:
            trials = self._mutants(members, members[scores.argmax()], rng)
            told = yield trials
            found = np.array([self.problem.score(each) for each in told])
            better = found >= scores
            members = np.where(better[:, None], trials, members)
            scores = np.where(better, found, scores)
            left -= size

    def _mutants(self, members: Units, best: Units, rng: np.random.Generator) -> Units:
        size, dimensions = members.shape
        pairs = np.array([rng.choice(np.delete(np.arange(size), i), 2, replace=False) for i in range(size)])
        strength = rng.uniform(0.5, 1.0)
        mutants = best + strength * (members[pairs[:, 0]] - members[pairs[:, 1]])
        outside = (mutants < 0) | (mutants > 1)
        mutants = np.where(outside, rng.uniform(size=mutants.shape), mutants)
        crossed = rng.uniform(size=mutants.shape) < 0.7
        crossed[np.arange(size), rng.integers(dimensions, size=size)] = True
        return np.where(crossed, mutants, members)


def simplex(size: int, steps: int) -> Units:
    """Return all points with coordinates that are multiples of ``1 / steps`` and sum to 1, shape (points, size).

    Example:
        >>> simplex(2, 2)
        array([[1. , 0. ],
               [0.5, 0.5],
               [0. , 1. ]])
    """
    bars = itertools.combinations(range(steps + size - 1), size - 1)
    rows = [np.diff([-1, *each, steps + size - 1]) - 1 for each in bars]
    return np.array(rows[::-1], dtype=np.float64) / steps
