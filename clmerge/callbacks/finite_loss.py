"""Stop a fit whose loss is NaN or infinite, before its weights can be merged."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class FiniteLoss(Callback):
    """Raise an error if the loss is NaN or infinite, because the weights trained from there on cannot be merged.

    On a CUDA device the loss of a step is checked in the next step, when it has been copied: checking it immediately
    would make the CPU wait for the device in every step.

    Args:
        label: Name of the task in the message.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._copied: tuple[Tensor, torch.cuda.Event, int, int] | None = None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> Any:
        value = loss.detach().mean()
        epoch, step = trainer.current_epoch + 1, trainer.global_step + 1
        if value.device.type != "cuda":
            self._check(float(value), epoch, step)
            return
        self._check_copied()
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied = host, event, epoch, step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_copied()

    def _check_copied(self) -> None:
        if self._copied is not None:
            host, event, epoch, step = self._copied
            self._copied = None
            event.synchronize()
            self._check(float(host), epoch, step)

    def _check(self, loss: float, epoch: int, step: int) -> None:
        if not math.isfinite(loss):
            raise RuntimeError(
                f"expected a finite loss in {self.label}, got {loss} in epoch {epoch}, step {step} of the task; lower "
                "the learning rate (--model.optimizer.lr), warm up (--model.warmup_steps), clip "
                "(--trainer.gradient_clip_val), or train with more precision (--trainer.precision=bf16-mixed or 32)"
            )
