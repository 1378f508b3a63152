"""Several exponential moving averages of one fit, of which held-out images choose one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.training.trajectory.averages import EMA
from clmerge.training.trajectory.rule import AveragedBuffers, Every, TrajectoryRule, Weights


class Horizons(TrajectoryRule):
    """Moving averages of several horizons along one fit; at its end the one that scores best on held-out images stays.

    A long horizon averages more noise away, and remembers weights that were further from the goal: how long is best
    depends on the length of the fit and on its learning rate (Jain et al., arXiv 1610.03774, for least squares). One
    fit tries them all. An average of decay ``b`` looks back ``1 / (1 - b)`` collections. ``TrajectoryAverage`` needs
    ``score``, which the learner gives: the accuracy on the validation images of the task. The memory is one copy of
    the weights for every horizon.

    Args:
        decays: Decays of the averages, from 0 to below 1 and all different; the first of equally good ones stays. 0 is
            the last weights.
        warmup: As for ``EMA``.
        start: Share of the fit after which weights are collected.
        every: Optimizer steps between collected weights, or ``epoch``.
        buffers: ``recompute``, ``average`` or ``latest``.

    Attributes:
        scores: Score of every decay, once one was chosen.

    Raises:
        ValueError: If decays are out of range, equal, or none.
    """

    requires_score = True

    def __init__(
        self,
        decays: Sequence[float] = (0.9, 0.99, 0.999),
        *,
        warmup: bool = True,
        start: float = 0.0,
        every: Every = 1,
        buffers: AveragedBuffers = "recompute",
    ) -> None:
        if not decays or len(set(decays)) < len(decays):
            raise ValueError(f"expected different decays, one or more, got {list(decays)}")
        self.decays, self.warmup = list(decays), warmup
        self._averages = [EMA(decay, warmup=warmup, start=start, every=every, buffers=buffers) for decay in decays]
        super().__init__(start=start, every=every, buffers=buffers)

    @override
    def reset(self) -> None:
        super().reset()
        for average in self._averages:
            average.reset()
        self._chosen = 0
        self.scores: dict[str, float] = {}

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        for average in self._averages:
            average.collect(weights)
        self.count += 1

    @override
    def choices(self) -> dict[str, Weights]:
        return {str(decay): one.compute() for decay, one in zip(self.decays, self._averages, strict=True) if one.count}

    @override
    def choose(self, scores: Mapping[str, float]) -> None:
        self.scores = dict(scores)
        self._chosen = [str(decay) for decay in self.decays].index(max(scores, key=scores.__getitem__))

    @override
    def compute(self) -> Weights:
        return self._averages[self._chosen].compute()

    @override
    def tensors(self) -> list[Weights]:
        return [weights for average in self._averages for weights in average.tensors()]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "averages": [average.state_dict() for average in self._averages]}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        for average, own in zip(self._averages, state["averages"], strict=True):
            average.load_state_dict(own)

    @override
    def settings(self) -> dict[str, Any]:
        own = {name: value for name, value in super().settings().items() if name != "validates"}
        return {"decays": self.decays, "warmup": self.warmup, **own}
