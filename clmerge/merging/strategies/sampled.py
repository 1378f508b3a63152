"""Strategies of the library ``optuna``: a Gaussian process, and NSGA-II for a Pareto front."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from clmerge.merging.strategies.extra import needed
from clmerge.merging.strategies.strategy import LIMIT, Generations, Strategy

_POPULATION = 10


class _Sampled(Strategy):
    """Base of the strategies whose points a sampler of optuna draws."""

    batch = 1
    num_goals = 1

    @abstractmethod
    def _sampler(self, samplers: Any) -> Any:
        """Return the sampler of optuna."""

    def _gains(self, accuracies: Sequence[float]) -> list[float]:
        return [self.problem.score(accuracies)]

    @override
    def _generate(self) -> Generations:
        optuna = needed("optuna", self.name)
        space = self.problem.space
        ranges = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in space.grid}
        with _quiet(optuna):
            directions = ["maximize"] * self.num_goals
            study: Any = optuna.create_study(sampler=self._sampler(optuna.samplers), directions=directions)
            study.enqueue_trial(dict(zip(space.grid, space.unit(self.problem.start), strict=True)))
        left = self.budget
        while left > 0:
            with _quiet(optuna):
                trials = [study.ask(ranges) for _ in range(min(self.batch, left))]
            told = yield np.array([[trial.params[name] for name in space.grid] for trial in trials])
            left -= len(trials)
            with _quiet(optuna):
                for trial, found in zip(trials, told, strict=True):
                    study.tell(trial, self._gains(found))


class Gaussian(_Sampled):
    """Bayesian optimisation with a Gaussian process, one point at a time (optuna's GPSampler).

    For few and dear evaluations, as in Bayesian checkpoint merging (arXiv 2403.19390). The first ten points are drawn.
    """

    name = "gaussian"

    @override
    def _sampler(self, samplers: Any) -> Any:
        return samplers.GPSampler(seed=self.problem.seed)


class Nsga(_Sampled):
    """NSGA-II: evolve points that no other one beats on all tasks at once (optuna's NSGAIISampler)."""

    name = "nsga"
    default_budget = 60
    batch = _POPULATION

    @override
    def _generate(self) -> Generations:
        self.num_goals = len(self.problem.goal.counted)
        yield from super()._generate()

    @override
    def _sampler(self, samplers: Any) -> Any:
        return samplers.NSGAIISampler(population_size=_POPULATION, seed=self.problem.seed)

    @override
    def _gains(self, accuracies: Sequence[float]) -> list[float]:
        missed = LIMIT * self.problem.goal.shortfall(accuracies)
        return [gain - missed for gain in self.problem.goal.gains(accuracies)]


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep optuna's log, its notes on experimental parts, and the global generators as they were."""
    verbosity = optuna.logging.get_verbosity()
    numpy_state = np.random.get_state()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        # The process is fitted by gradients, also for a rule that is updated without.
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        np.random.set_state(numpy_state)
