"""Averages of everything that is collected: all of it, exponentially weighted, or the latest."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.training.trajectory.rule import (
    AveragedBuffers,
    Every,
    TrajectoryRule,
    Validates,
    Weights,
    move_towards,
    wide_copy,
)


class _Running(TrajectoryRule):
    """A rule that keeps one average."""

    _average: Weights

    @override
    def reset(self) -> None:
        super().reset()
        self._average = {}

    @abstractmethod
    def weight(self) -> float:
        """Return the share of the weights collected next."""

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        if self.count:
            move_towards(self._average, weights, self.weight())
        else:
            self._average = wide_copy(weights)
        self.count += 1

    @override
    def compute(self) -> Weights:
        return self._average

    @override
    def tensors(self) -> list[Weights]:
        return [self._average]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "average": self._average}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self._average = int(state["count"]), dict(state["average"])


class Mean(_Running):
    """The mean of all collected weights: stochastic weight averaging (SWA, Izmailov et al., arXiv 1803.05407).

    With ``every=1`` and a small ``start`` it is the simple moving average of Arpit et al. (arXiv 2110.10832).

    Args:
        start: Share of the fit after which weights are collected; 0.75 as published.
        every: Optimizer steps between collected weights, or ``epoch``.
        buffers: ``recompute``, ``average`` or ``latest``.
        validates: ``training`` or ``average``.

    Example:
        >>> import torch
        >>> rule = Mean(start=0.0)
        >>> for value in (1.0, 3.0, 8.0):
        ...     rule.collect({"w": torch.tensor([value])})
        >>> rule.compute()["w"].item()
        4.0
    """

    def __init__(
        self,
        *,
        start: float = 0.75,
        every: Every = "epoch",
        buffers: AveragedBuffers = "recompute",
        validates: Validates = "training",
    ) -> None:
        super().__init__(start=start, every=every, buffers=buffers, validates=validates)

    @override
    def weight(self) -> float:
        return 1 / (self.count + 1)


class EMA(_Running):
    """An exponential moving average; the first weights collected are its start.

    After weights ``theta_1 .. theta_n`` it is ``b^(n-1) theta_1 + (1-b) sum_(i>=2) b^(n-i) theta_i``, as torch's
    ``AveragedModel``.

    Args:
        decay: Share ``b`` of the average that stays at every collection, from 0 to below 1.
        warmup: Whether the n-th collection uses ``min(decay, (1+n)/(10+n))`` instead, so that a short fit is not ruled
            by its first weights; ``n`` counts collections.
        start: Share of the fit after which weights are collected.
        every: Optimizer steps between collected weights, or ``epoch``.
        buffers: ``recompute``, ``average`` or ``latest``.
        validates: ``training`` or ``average``.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        warmup: bool = False,
        start: float = 0.0,
        every: Every = 1,
        buffers: AveragedBuffers = "recompute",
        validates: Validates = "training",
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay from 0 to below 1, got {decay}")
        self.decay, self.warmup = decay, warmup
        super().__init__(start=start, every=every, buffers=buffers, validates=validates)

    @override
    def weight(self) -> float:
        warm = (1 + self.count) / (10 + self.count) if self.warmup else 1.0
        return 1 - min(self.decay, warm)

    @override
    def settings(self) -> dict[str, Any]:
        return {"decay": self.decay, "warmup": self.warmup, **super().settings()}


class Latest(TrajectoryRule):
    """The mean of the ``k`` weights collected last: LAWA (Kaddour, arXiv 2209.14981).

    With a wide spacing, a few collections of a fit at a high learning rate, it is the early averaging of Sanyal et al.
    (arXiv 2306.03241). It keeps ``k`` copies of the weights.

    Args:
        k: Number of weights averaged.
        start: Share of the fit after which weights are collected.
        every: Optimizer steps between collected weights, or ``epoch``.
        buffers: ``recompute``, ``average`` or ``latest``.
        validates: ``training`` or ``average``.

    Raises:
        ValueError: If ``k`` is below 1.
    """

    def __init__(
        self,
        k: int = 10,
        *,
        start: float = 0.0,
        every: Every = "epoch",
        buffers: AveragedBuffers = "recompute",
        validates: Validates = "training",
    ) -> None:
        if k < 1:
            raise ValueError(f"expected k of 1 or more, got {k}")
        self.k = k
        super().__init__(start=start, every=every, buffers=buffers, validates=validates)

    @override
    def reset(self) -> None:
        super().reset()
        self._window: deque[Weights] = deque(maxlen=self.k)

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        self._window.append(wide_copy(weights))
        self.count += 1

    @override
    def compute(self) -> Weights:
        return mean_of(self._window)

    @override
    def tensors(self) -> list[Weights]:
        return list(self._window)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "window": list(self._window)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        self._window = deque((dict(weights) for weights in state["window"]), maxlen=self.k)

    @override
    def settings(self) -> dict[str, Any]:
        return {"k": self.k, **super().settings()}


def mean_of(points: Iterable[Mapping[str, Tensor]]) -> Weights:
    """Return the mean of several sets of weights, which is exactly theirs if all are equal; empty of none."""
    mean = Mean(start=0.0)
    for point in points:
        mean.collect(point)
    return mean.compute()
