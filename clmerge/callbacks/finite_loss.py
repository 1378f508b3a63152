"""Stop a fit whose loss is no number, before its weights are none either."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override


class FiniteLoss(Callback):
    """Refuse to go on with a loss that is NaN or infinite: nothing that is trained from there on can be merged.

    Args:
        label: What is being trained.
    """

    def __init__(self, label: str) -> None:
        self.label = label

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> Any:
        if not torch.isfinite(loss.detach()).all():
            raise RuntimeError(
                f"expected a finite loss in {self.label}, got {float(loss.detach().mean())} in epoch "
                f"{trainer.current_epoch + 1}, step {trainer.global_step + 1} of the task; lower the learning rate "
                "(--model.optimizer.lr), warm up (--model.warmup_steps), clip (--trainer.gradient_clip_val), or train "
                "with more precision (--trainer.precision=bf16-mixed or 32)"
            )
