"""Train in the span of weights that the same fit passed through before (trainable weight averaging)."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from clmerge.callbacks.frozen import refuse_unfreezing
from clmerge.callbacks.ranks import refuse_parts
from clmerge.callbacks.step_hooks import StepHooks
from clmerge.training.trajectory import Weights, mean_of
from clmerge.training.trajectory.rule import wide_copy
from clmerge.weights.selection import trained_parameters
from clmerge.weights.swap import assign


class Subspace(StepHooks):
    """Learn how to average the weights along a fit, in its last part (trainable weight averaging, arXiv 2205.13104).

    In the first part of a fit, up to ``start``, the weights are collected at equal distances. Then the model is set to
    their mean, and every optimizer step is projected onto their span, so that the rest of the fit learns one
    coefficient for each of them. As published, the span is that of the weights themselves, not of their differences;
    published steps are plain SGD's, and here any optimizer's, weight decay included.

    The state is saved in Lightning's checkpoints, so that a fit that was killed resumes to the same bits. It takes
    ``points`` copies of the trained weights, float32 or wider, and one more during a step.

    Args:
        points: Number of weights collected; in a fit of fewer steps those of every step.
        start: Share of the fit's optimizer steps after which the subspace is trained.

    Raises:
        ValueError: If a number is out of range; during a fit, if it has no end, or no step before ``start``.
        RuntimeError: During a fit whose processes hold parts of the weights.

    Example:
        >>> Subspace(points=5, start=0.5).points
        5
    """

    def __init__(self, points: int = 10, *, start: float = 0.5) -> None:
        if points < 1 or not 0 < start < 1:
            raise ValueError(f"expected 1 point or more and start between 0 and 1, got points={points}, start={start}")
        super().__init__()
        self.points, self.start = points, start
        self._forget()

    def _forget(self) -> None:
        self._collected: list[Weights] = []
        self._basis: list[Weights] = []
        self._before: Weights = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._forget()  # before Lightning restores a checkpoint

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_parts(pl_module, type(self).__name__)
        refuse_unfreezing(trainer, type(self).__name__)
        total = float(trainer.estimated_stepping_batches)
        if not math.isfinite(total) or self.start * total < 1:
            raise ValueError(
                f"expected a fit with {math.ceil(1 / self.start)} optimizer steps or more and an end for "
                f"Subspace(start={self.start}), got {total:g}: raise start, or train longer"
            )
        self._around_steps(
            trainer, before=lambda _: self._remember(pl_module), after=lambda _: self._project(pl_module)
        )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = math.floor(self.start * float(trainer.estimated_stepping_batches))
        points, position = min(self.points, last), len(self._collected) + 1
        if self._basis or trainer.global_step < last * position // points:
            return
        parameters = trained_parameters(pl_module)
        self._collected.append(wide_copy(parameters))
        if position == points:
            # Those of before a resume are where the checkpoint was read to.
            self._collected = [
                {name: point[name].to(p.device) for name, p in parameters.items()} for point in self._collected
            ]
            assign(parameters, mean_of(self._collected))
            self._basis = orthonormal(self._collected)
            self._collected = []

    def _remember(self, pl_module: LightningModule) -> None:
        if self._basis:
            self._before = wide_copy(trained_parameters(pl_module))

    @torch.no_grad()
    def _project(self, pl_module: LightningModule) -> None:
        if not self._before:
            return
        parameters = trained_parameters(pl_module)
        moved = {
            name: parameter.to(self._before[name].dtype) - self._before[name] for name, parameter in parameters.items()
        }
        total = {name: tensor.clone() for name, tensor in self._before.items()}
        for position, direction in enumerate(self._basis):
            placed = {name: tensor.to(moved[name].device) for name, tensor in direction.items()}
            self._basis[position] = placed
            along = _inner(placed, moved)
            for name, tensor in placed.items():
                total[name].add_(tensor * along.to(tensor))
        assign(parameters, total)
        self._before = {}

    @override
    def _leave(self) -> None:
        super()._leave()
        self._before = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"collected": _stored(self._collected), "basis": _stored(self._basis)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._collected = [dict(point) for point in state_dict["collected"]]
        self._basis = [dict(direction) for direction in state_dict["basis"]]


def orthonormal(points: list[Weights]) -> list[Weights]:
    """Return an orthonormal basis of the span of several sets of weights; dependent ones add nothing."""
    basis: list[Weights] = []
    for point in points:
        rest = {name: tensor.clone() for name, tensor in point.items()}
        size = _inner(rest, rest).sqrt()
        for _ in range(2):  # once more, because rounding of nearly equal weights leaves parts of the others
            for direction in basis:
                along = _inner(direction, rest)
                for name, tensor in direction.items():
                    rest[name].sub_(tensor * along.to(tensor))
        norm = _inner(rest, rest).sqrt()
        if norm > 1e-6 * size:
            basis.append({name: tensor / norm.to(tensor) for name, tensor in rest.items()})
    return basis


def _inner(first: Weights, second: Weights) -> Tensor:
    return torch.stack([(tensor.double() * second[name].double()).sum() for name, tensor in first.items()]).sum()


def _stored(points: list[Weights]) -> list[Weights]:
    return [{name: tensor.to("cpu", copy=True) for name, tensor in point.items()} for point in points]
