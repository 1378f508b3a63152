"""The contract of rules that average the weights along a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

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
    requires_score: bool = False  # whether it keeps several averages, of which held-out images choose one at the end

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
        if not (every == "epoch" or (isinstance(every, int) and every >= 1)):
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

    def choices(self) -> dict[str, Weights]:
        """Return the averages to choose from, by what they are; none for a rule with a single one."""
        return {}

    def choose(self, scores: Mapping[str, float]) -> None:
        """Take in the score of every choice; for rules with ``requires_score``."""
        raise TypeError(f"expected a rule with several averages to choose from, got {type(self).__name__}")

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


def wide_copy(weights: Mapping[str, Tensor]) -> Weights:
    """Return copies in float32, or float64 where the weights are."""
    return {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for name, tensor in weights.items()
    }


@torch.no_grad()
def move_towards(average: Weights, weights: Mapping[str, Tensor], weight: float) -> None:
    """Move an average towards weights by a share, in place but for its first step after a resume on another device."""
    for name, tensor in weights.items():
        average[name] = _placed_like(average[name], tensor)
    same: list[str] = []
    rest: list[str] = []
    for name, tensor in weights.items():
        (same if average[name].dtype == tensor.dtype else rest).append(name)
    if same:
        torch._foreach_lerp_(_of(average, same), [weights[name].detach() for name in same], weight)
    for name in rest:  # one tensor at a time, so that there is never a wide copy of all of them
        average[name].lerp_(weights[name].detach().to(average[name].dtype), weight)


def _placed_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Return a tensor where ``reference`` lies: on its device and, where that is sharded, in its shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(reference, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor if tensor.device == reference.device else tensor.to(reference.device)


def _of(weights: Weights, names: Iterable[str]) -> list[Tensor]:
    return [weights[name] for name in names]
