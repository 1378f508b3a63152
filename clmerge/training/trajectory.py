"""Rules that average the weights along the training of one task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

Weights: TypeAlias = dict[str, Tensor]
Every: TypeAlias = int | Literal["epoch"]
AveragedBuffers: TypeAlias = Literal["recompute", "average", "latest"]
Validates: TypeAlias = Literal["training", "average"]


class TrajectoryRule(ABC):
    """An average of the weights that one fit passes through; ``TrajectoryAverage`` collects them and puts it in place.

    Averages are float32 (float64 for float64 weights) whatever the weights' dtype, so that those of low-precision
    weights do not stall (SWALP, arXiv 1904.11943). A constant trajectory is returned bit for bit.

    Args:
        start: Share of the fit's optimizer steps after which weights are collected, from 0 to 1.
        every: Optimizer steps between collected weights, or ``epoch`` for the end of every epoch.
        buffers: Running statistics of the average: ``recompute`` on the training images (``update_bn`` of stochastic
            weight averaging), ``average``, or ``latest``. Integer buffers are always the latest.
        validates: What a validation inside the fit evaluates: the ``training`` weights or the ``average`` so far.

    Attributes:
        count: Number of weights collected.

    Raises:
        ValueError: If an argument is out of range.
    """

    monitor: str | None = None  # the logged value that judges what was collected, if the rule needs one

    def __init__(
        self,
        *,
        start: float = 0.0,
        every: Every = 1,
        buffers: AveragedBuffers = "recompute",
        validates: Validates = "training",
    ) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f"expected start as a share of the fit from 0 to 1, got {start}")
        if every != "epoch" and (isinstance(every, str) or every < 1):
            raise ValueError(f"expected every as 1 step or more, or 'epoch', got {every!r}")
        self.start, self.every = start, every
        self.buffers, self.validates = buffers, validates
        self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self.count = 0

    @abstractmethod
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights as they are now.

        Args:
            weights: Floating tensors by name, the same names every time; they are copied.
        """

    def judge(self, score: float) -> None:
        """Take in the monitored value of what was collected since the last one; for rules with a ``monitor``."""
        raise TypeError(f"expected a rule that is judged by a validation, got {type(self).__name__}")

    @abstractmethod
    def compute(self) -> Weights:
        """Return the average, empty before anything is collected; not to be changed in place."""

    def candidate(self) -> Weights:
        """Return what a validation of the average evaluates: the average, unless the rule has one on trial."""
        return self.compute()

    @abstractmethod
    def tensors(self) -> list[Weights]:
        """Return all sets of weights that the rule keeps."""

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the rule keeps."""
        return sum(tensor.nbytes for weights in self.tensors() for tensor in weights.values())

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs: tensors and primitives."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {name: getattr(self, name) for name in ("start", "every", "buffers", "validates")}


class _Running(TrajectoryRule):
    """A rule that keeps one average."""

    _average: Weights

    @override
    def reset(self) -> None:
        super().reset()
        self._average = {}

    def weight(self) -> float:
        """Return the share of the weights collected next."""
        raise NotImplementedError

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        if self.count:
            _move_towards(self._average, weights, self.weight())
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
        self._window: list[Weights] = []

    @override
    def collect(self, weights: Mapping[str, Tensor]) -> None:
        self._window = [*self._window[-(self.k - 1) :], wide_copy(weights)] if self.k > 1 else [wide_copy(weights)]
        self.count += 1

    @override
    def compute(self) -> Weights:
        return mean_of(self._window)

    @override
    def tensors(self) -> list[Weights]:
        return list(self._window)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "window": self._window}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self._window = int(state["count"]), [dict(weights) for weights in state["window"]]

    @override
    def settings(self) -> dict[str, Any]:
        return {"k": self.k, **super().settings()}


class LossValley(TrajectoryRule):
    """The mean over the valley of the validation loss: SWAD (Cha et al., arXiv 2102.08604).

    The weights between two validations form a segment, their mean, judged by the loss of the training weights at its
    end. The valley begins at the first segment whose loss is the smallest of the ``n_converge`` that begin with it; with
    the mean of these losses times ``1 + tolerance`` as threshold it goes on to the last segment before the first one
    from which ``n_tolerance`` segments in a row lie above the threshold. Segments weigh equally. A fit that does not
    converge gives its last segment. The published code loses the first segment where ``n_tolerance <= n_converge``; here
    it always counts. It keeps up to ``max(n_converge, n_tolerance) + 2`` copies of the weights.

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
        return {**windows, "monitor": self.monitor} | {name: value for name, value in super().settings().items() if name != "validates"}


class Accepting(TrajectoryRule):
    """The mean of the epochs that do not make it worse: adaptive SWA (Demir et al., arXiv 2406.19092).

    The end of an epoch is taken into the mean on trial; the validation of that mean, its running statistics
    recomputed, decides whether it stays. The published code restores the earlier mean from an alias of the new one, and
    so takes in every epoch; here a rejected epoch leaves the mean bit for bit as it was. It keeps two copies of the weights.

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
        _move_towards(self._trial, weights, 1 / (self.accepted + 1))
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


def wide_copy(weights: Mapping[str, Tensor]) -> Weights:
    """Return copies in float32, or float64 where the weights are."""
    return {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for name, tensor in weights.items()
    }


def mean_of(points: Sequence[Mapping[str, Tensor]]) -> Weights:
    """Return the mean of several sets of weights, which is exactly theirs if all are equal; empty of none."""
    mean = Mean(start=0.0)
    for point in points:
        mean.collect(point)
    return mean.compute()


@torch.no_grad()
def _move_towards(average: Weights, weights: Mapping[str, Tensor], weight: float) -> None:
    """Move an average towards weights by a share, in place but for its first step after a resume on another device."""
    for name, tensor in weights.items():
        average[name] = placed_like(average[name], tensor)
    same, rest = [], []
    for name, tensor in weights.items():
        (same if average[name].dtype == tensor.dtype else rest).append(name)
    if same:
        torch._foreach_lerp_(_of(average, same), [weights[name].detach() for name in same], weight)
    for name in rest:  # one tensor at a time, so that there is never a wide copy of all of them
        average[name].lerp_(weights[name].detach().to(average[name].dtype), weight)


def placed_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a tensor where ``reference`` lies: on its device and, where that is sharded, in its shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(reference, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor if tensor.device == reference.device else tensor.to(reference.device)


def _of(weights: Weights, names: Iterable[str]) -> list[Tensor]:
    return [weights[name] for name in names]
