"""Strategies of a search: they ask for points, are told the accuracies, and ask again."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from clmerge.merging.strategies.goal import Goal
from clmerge.merging.strategies.space import Space, Units

Told = Sequence[Sequence[float]]
"""The accuracies on all tasks of every point that was asked for."""

Generations = Generator[Units, Told, None]
"""Yields the points of a generation, and is sent their accuracies."""

LIMIT = 10.0  # what a missed limit costs in a score, per unit of accuracy


@dataclass
class Problem:
    """What a strategy works on.

    Attributes:
        space: The values of the parameters.
        goal: What is maximised.
        budget: How many points may be asked for; None: the strategy's own choice.
        start: Values to begin near, where the strategy begins somewhere.
        images: Number of images behind each accuracy; two accuracies nearer than one image are equal.
        seed: Seed of what is drawn.
    """

    space: Space
    goal: Goal
    budget: int | None = None
    start: Mapping[str, Any] = field(default_factory=dict)
    images: int = 1000
    seed: int = 0

    def score(self, accuracies: Sequence[float]) -> float:
        """Return the score of a point, lowered where it misses a limit."""
        return self.goal.score(accuracies) - LIMIT * self.goal.shortfall(accuracies)


class Strategy(ABC):
    """Ask for points a generation at a time, so that one pass over the images evaluates all of it.

    A strategy is deterministic: told the same accuracies, it asks for the same points. A search that was interrupted
    goes on from stored accuracies.

    Args:
        problem: What it works on.

    Attributes:
        name: Its name on the command line and in documents.
        stays_listed: Whether it asks for listed values only.
        default_budget: The budget if none is given.
    """

    name: ClassVar[str]
    stays_listed: ClassVar[bool] = False
    default_budget: ClassVar[int] = 40

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.budget = self.default_budget if problem.budget is None else problem.budget
        self._generations = self._generate()
        self._asked: Units | None = next(self._generations, None)

    @abstractmethod
    def _generate(self) -> Generations:
        """Yield generations."""

    def ask(self) -> list[dict[str, Any]]:
        """Return the points to evaluate next; none when the search is over."""
        if self._asked is None:
            return []
        space = self.problem.space
        return space.listed(self._asked) if self.stays_listed else space.between(self._asked)

    def tell(self, accuracies: Told) -> None:
        """Report the accuracies of the points that were asked for.

        Args:
            accuracies: One list per point, with an accuracy for every task of the run.
        """
        try:
            self._asked = self._generations.send(accuracies)
        except StopIteration:
            self._asked = None


def sobol(dimensions: int, count: int, seed: int) -> Units:
    """Return the first points of a scrambled Sobol sequence, shape (count, dimensions)."""
    from scipy.stats import qmc

    drawn = qmc.Sobol(dimensions, rng=np.random.default_rng(seed)).random_base2(max(count - 1, 0).bit_length())
    return np.asarray(drawn[:count], dtype=np.float64)
