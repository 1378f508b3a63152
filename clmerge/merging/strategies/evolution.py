"""CMA-ES, by the library ``cma``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from typing_extensions import override

from clmerge.merging.strategies.extra import needed
from clmerge.merging.strategies.strategy import Generations, Strategy

_WIDTH = 1 / 6  # of the first generation, as a share of the range; mergekit's


class CmaEs(Strategy):
    """Covariance matrix adaptation over numbers in their ranges, from the merger's own settings (library ``cma``).

    The evolutionary search of model merging (arXiv 2403.13187), with the first width of mergekit. Points are clipped to
    the ranges by the library's boundary handling. It ends with the last generation that fits into the budget, or when
    the library finds no further progress.
    """

    name = "cma_es"

    @override
    def _generate(self) -> Generations:
        cma = needed("cma", self.name)
        problem = self.problem
        own = _OwnGenerator()
        with own.used():
            evolution: Any = cma.CMAEvolutionStrategy(
                np.clip(problem.space.unit(problem.start), 0.05, 0.95),
                _WIDTH,
                # Seed 0 would be the time; a limit of the width is an error of cma 4.5 in one dimension.
                {"bounds": [0, 1], "seed": problem.seed + 1, "maxstd": np.inf, "verbose": -9},
            )
        left = self.budget
        while left > 0 and not evolution.stop():
            with own.used():
                asked = np.array(evolution.ask())
            told = yield asked[:left]
            left -= len(asked)
            if left <= 0:
                return
            with own.used():
                evolution.tell(list(asked), [-problem.score(found) for found in told])


class _OwnGenerator:
    """A state of NumPy's global generator of its own: ``cma`` seeds and draws from the global one."""

    def __init__(self) -> None:
        self._state = np.random.get_state()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Put the own state in place within a block, and the previous one back after it."""
        before = np.random.get_state()
        np.random.set_state(self._state)
        try:
            yield
        finally:
            self._state = np.random.get_state()
            np.random.set_state(before)
