"""The mean of the epochs that do not make it worse (adaptive SWA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from clmerge.training.trajectory.rule import AveragedBuffers, TrajectoryRule, Weights, move_towards, wide_copy


class Accepting(TrajectoryRule):
    """The mean of the epochs that do not make it worse: adaptive SWA (Demir et al., arXiv 2406.19092).

    The end of an epoch is taken into the mean on trial; the validation of that mean, its running statistics
    recomputed, decides whether it stays. The published code restores the earlier mean from an alias of the new one, and
    so takes in every epoch; here a rejected epoch leaves the mean bit for bit as it was. It keeps two copies of the
    weights.

    Args:
        monitor: Logged value that says how good the mean is.
        mode: Whether the best value is the largest (``max``) or the smallest (``min``).
        start: Share of the fit after which weights are collected.
        buffers: ``recompute``, ``average`` or ``latest``.

    Raises:
        ValueError: For another ``mode``.
    """

    def __init__(
        self,
        monitor: str = "val/accuracy",
        *,
        mode: Literal["max", "min"] = "max",
        start: float = 0.0,
        buffers: AveragedBuffers = "recompute",
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"expected mode to be 'max' or 'min', got {mode!r}")
        self.monitor, self.mode = monitor, mode
        super().__init__(start=start, every="epoch", buffers=buffers, validates="average")

    @override
    def reset(self) -> None:
        super().reset()
        self._mean: Weights = {}
        self._trial: Weights = {}
        self.accepted = 0
        self.best: float | None = None

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        self._trial = wide_copy(self._mean or weights)
        move_towards(self._trial, weights, 1 / (self.accepted + 1))
        self.count += 1

    @override
    def judge(self, score: float) -> None:
        if self._trial and math.isfinite(score) and (self.best is None or self._as_good(score, self.best)):
            self._mean, self.best = self._trial, score
            self.accepted += 1
        self._trial = {}

    def _as_good(self, score: float, best: float) -> bool:
        return score >= best if self.mode == "max" else score <= best

    @override
    def compute(self) -> Weights:
        return self._mean

    @override
    def candidate(self) -> Weights:
        return self._trial

    @override
    def tensors(self) -> list[Weights]:
        return [self._mean, self._trial]

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"count": self.count, "accepted": self.accepted, "best": self.best}
        return {**own, "mean": self._mean, "trial": self._trial}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.accepted, self.best = int(state["count"]), int(state["accepted"]), state["best"]
        self._mean, self._trial = dict(state["mean"]), dict(state["trial"])

    @override
    def settings(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode, "start": self.start, "buffers": self.buffers}
