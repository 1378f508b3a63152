"""The mean over the valley of the validation loss (SWAD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.training.trajectory.averages import Mean
from clmerge.training.trajectory.rule import AveragedBuffers, TrajectoryRule, Weights, wide_copy


class LossValley(TrajectoryRule):
    """The mean over the valley of the validation loss: SWAD (Cha et al., arXiv 2102.08604).

    The weights between two validations form a segment, their mean, judged by the loss of the training weights at its
    end. The valley begins at the first segment whose loss is the smallest of the ``n_converge`` that begin with it;
    with the mean of these losses times ``1 + tolerance`` as threshold it goes on to the last segment before the first
    one from which ``n_tolerance`` segments in a row lie above the threshold. Segments weigh equally. A fit that does
    not converge gives its last segment. The published code loses the first segment where ``n_tolerance <= n_converge``;
    here it always counts. It keeps up to ``max(n_converge, n_tolerance) + 2`` copies of the weights.

    Args:
        n_converge: Segments in the window that finds the valley's beginning.
        n_tolerance: Segments in the window that finds its end.
        tolerance: Share by which losses in the valley may exceed their mean at its beginning.
        monitor: Logged value of the loss.
        start: Share of the fit after which weights are collected.
        every: Optimizer steps between collected weights.
        buffers: ``recompute``, ``average`` or ``latest``.

    Raises:
        ValueError: If a window is empty or ``tolerance`` is negative.
    """

    def __init__(
        self,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance: float = 0.3,
        *,
        monitor: str = "val/loss",
        start: float = 0.0,
        every: int = 1,
        buffers: AveragedBuffers = "recompute",
    ) -> None:
        if n_converge < 1 or n_tolerance < 1 or tolerance < 0:
            raise ValueError(
                "expected n_converge and n_tolerance of 1 or more and a tolerance of 0 or more, got "
                f"{n_converge}, {n_tolerance} and {tolerance}"
            )
        self.n_converge, self.n_tolerance, self.tolerance = n_converge, n_tolerance, tolerance
        self.monitor = monitor
        super().__init__(start=start, every=every, buffers=buffers)

    @override
    def reset(self) -> None:
        super().reset()
        self._open = Mean(start=0.0)  # the segment since the last validation
        self._valley = Mean(start=0.0)
        self._waiting: list[Weights] = []
        self._losses: list[float] = []
        self._threshold: float | None = None
        self._ended = False

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        self._open.collect(weights)
        self.count += 1

    @override
    def judge(self, score: float) -> None:
        if not self._open.count:
            return
        segment = self._open.compute()
        self._open.reset()
        if self._ended:
            return
        self._waiting.append(segment)
        self._losses.append(score if math.isfinite(score) else math.inf)
        if self._threshold is None:
            self._look_for_valley()
        while self._threshold is not None and len(self._waiting) >= self.n_tolerance:
            if min(self._losses[: self.n_tolerance]) > self._threshold:
                self._ended, self._waiting, self._losses = True, [], []
                return
            self._valley.collect(self._waiting.pop(0))
            del self._losses[0]

    def _look_for_valley(self) -> None:
        self._waiting, self._losses = self._waiting[-self.n_converge :], self._losses[-self.n_converge :]
        found = len(self._losses) == self.n_converge and self._losses[0] == min(self._losses)
        if found and math.isfinite(mean := sum(self._losses) / self.n_converge):
            self._threshold = mean * (1 + self.tolerance)

    @override
    def compute(self) -> Weights:
        if self._threshold is None:
            return self._waiting[-1] if self._waiting else self._open.compute()
        rest: list[Weights] = []
        for position, segment in enumerate(self._waiting):
            if min(self._losses[position:]) > self._threshold:
                break
            rest.append(segment)
        if not rest:
            return self._valley.compute()
        whole = Mean(start=0.0)
        if self._valley.count:
            whole.load_state_dict({"count": self._valley.count, "average": wide_copy(self._valley.compute())})
        for segment in rest:
            whole.collect(segment)
        return whole.compute()

    @override
    def tensors(self) -> list[Weights]:
        return [*self._open.tensors(), *self._valley.tensors(), *self._waiting]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "open": self._open.state_dict(),
            "valley": self._valley.state_dict(),
            "waiting": self._waiting,
            "losses": self._losses,
            "threshold": self._threshold,
            "ended": self._ended,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        self._open.load_state_dict(state["open"])
        self._valley.load_state_dict(state["valley"])
        self._waiting = [dict(weights) for weights in state["waiting"]]
        self._losses, self._threshold, self._ended = list(state["losses"]), state["threshold"], bool(state["ended"])

    @override
    def settings(self) -> dict[str, Any]:
        windows = {"n_converge": self.n_converge, "n_tolerance": self.n_tolerance, "tolerance": self.tolerance}
        return {**windows, "monitor": self.monitor} | {
            name: value for name, value in super().settings().items() if name != "validates"
        }
