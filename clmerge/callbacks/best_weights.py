"""Merge the weights of a fit's best epoch instead of its last."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from clmerge.callbacks.frozen import announces_unfreezing
from clmerge.names import tell


class BestWeights(Callback):
    """Put the weights of the best epoch back at the end of a fit, before they are merged.

    Works with ``EarlyStopping``, at the same moments and with the same values, and with ``MergeCallback`` in any order
    of the callbacks. A copy of the trained weights and of buffers is kept on the CPU and in Lightning's checkpoints, so
    that a resumed fit has the same best epoch.

    Args:
        monitor: Logged value that says how good the weights are.
        mode: Whether the best value is the smallest (``min``) or the largest (``max``).

    Attributes:
        best: The best value so far; None before the first.
        epoch: Its epoch, from 0.

    Raises:
        ValueError: During a fit, if ``monitor`` is not logged, or has no finite value in any epoch.
        RuntimeError: During a fit whose processes hold parts of the weights.

    Example:
        >>> best = BestWeights("val/accuracy", mode="max")
        >>> best.better(0.5), best.better(math.nan)
        (True, False)
    """

    def __init__(self, monitor: str = "val/loss", *, mode: Literal["min", "max"] = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"expected mode to be 'min' or 'max', got {mode!r}")
        self.monitor = monitor
        self.mode = mode
        self._forget()

    def _forget(self) -> None:
        self.best: float | None = None
        self.epoch = 0
        self._weights: dict[str, Tensor] = {}
        self._done = False

    def better(self, value: float) -> bool:
        """Return whether a value is better than the best so far; the first of equal ones is the best."""
        if not math.isfinite(value) or self.best is None:
            return math.isfinite(value)
        return value < self.best if self.mode == "min" else value > self.best

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before Lightning restores a checkpoint
            self._forget()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _validates_every_epoch(trainer):
            self._look(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not _validates_every_epoch(trainer):
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"expected a value {self.monitor!r} for BestWeights, got none in epoch {trainer.current_epoch + 1}: "
                f"log it, hold validation images out, or monitor one of {sorted(trainer.callback_metrics)}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        if trainer.strategy.broadcast(self.better(value)):  # all processes keep the same epoch
            self.best, self.epoch = value, trainer.current_epoch
            self._weights = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in _tensors(pl_module, frozen=announces_unfreezing(trainer)).items()
            }

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is None:
            raise ValueError(f"expected a finite value of {self.monitor!r} in some epoch for BestWeights, got none")
        self._put_back(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run killed between its last checkpoint and its merge has nothing left to train when it resumes, and
        # Lightning does not call on_train_end then. MergeCallback, which is last in a fit, merges after this.
        if not self._done and self.best is not None and trainer.fit_loop.done:
            self._put_back(trainer, pl_module)

    def _put_back(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = _tensors(pl_module, frozen=True)
        with torch.no_grad():
            for name, tensor in self._weights.items():
                own[name].copy_(tensor)
        self._done = True
        if trainer.is_global_zero:
            tell(f"weights of epoch {self.epoch + 1}, the best by {self.monitor} ({self.best:.4g}), are put back")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epoch": self.epoch, "weights": self._weights}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.epoch, self._weights = (state_dict[key] for key in ("best", "epoch", "weights"))


def _validates_every_epoch(trainer: Trainer) -> bool:
    """Whether ``EarlyStopping`` looks at the end of training epochs, where they end with a validation."""
    return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1


def _tensors(module: LightningModule, *, frozen: bool) -> dict[str, Tensor]:
    """Return buffers and trained parameters, with ``frozen`` all parameters, by name."""
    found: dict[str, Tensor] = dict(module.named_buffers())
    found |= {name: p for name, p in module.named_parameters() if frozen or p.requires_grad}
    if sharded := next((name for name, tensor in found.items() if isinstance(tensor, DTensor)), None):
        raise RuntimeError(
            f"expected whole weights in every process for BestWeights, got a part of {sharded}: use a strategy that "
            "does not shard, such as ddp"
        )
    return found
