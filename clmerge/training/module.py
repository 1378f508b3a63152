"""The LightningModule around a classifier: how one task is trained."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from typing_extensions import override

from clmerge.lightning_compat import logs_this_step
from clmerge.models import Backbone, Classifier, Head, Tuning
from clmerge.models.classifier import Batch
from clmerge.training.regularizers import Regularizer, regularized_logits
from clmerge.training.sharpness import SAM

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class ContinualClassifier(Classifier, LightningModule):
    """A classifier that Lightning fine-tunes, one task after another.

    Args:
        backbone: The image encoder.
        head: Maps features to logits; default a frozen zero-shot text head.
        tuning: How the backbone is fine-tuned; default ``Full``, all of its trainable weights (for CLIP the image
            tower).
        loss_classes: Which classes compete in the loss: those of the ``current`` task (MagMax's choice), all
            ``seen`` so far, or ``all`` of the stream (only for a head that knows them).
        optimizer: Optimizer class with its settings; default AdamW with lr 1e-5 and weight decay 0.1.
        schedule: Learning rate over the steps of one task: ``cosine`` to zero, or ``constant``.
        warmup_steps: Linear warm-up at the start of every task, in optimizer steps.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        regularizers: Terms that are added to the loss, for example ``[EWC, LwF]``.

    Attributes:
        old_classes: Classes seen before the current task.
        epoch_offset: Epochs of earlier tasks, added to the logged ``epoch``.
        tuning: How the backbone is fine-tuned.
        trained_names: Dense names of the trained weights that may be merged; without the head's parameters.

    Raises:
        ValueError: For ``loss_classes='all'`` with a head that must learn its classes, for a tuning that
            matches nothing in the backbone, or for a setting out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        *,
        tuning: Tuning | None = None,
        loss_classes: Literal["current", "seen", "all"] = "current",
        optimizer: OptimizerFactory | None = None,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
        regularizers: Sequence[Regularizer] | None = None,
    ) -> None:
        super().__init__(backbone, head, tuning=tuning, loss_classes=loss_classes, label_smoothing=label_smoothing)
        if warmup_steps < 0:
            raise ValueError(f"expected warmup_steps of 0 or more, got {warmup_steps}")
        if regularizers and not self.trained_names:
            raise ValueError(f"expected no regularizers for a backbone that is frozen, got {len(regularizers)}")
        self.optimizer_factory = optimizer or partial(AdamW, lr=1e-5, weight_decay=0.1)
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.regularizers = nn.ModuleList(regularizers or [])
        self.epoch_offset = 0
        self.optimizer_settings: dict[str, float] = {}  # those of one fit, such as a branch, in place of the factory's
        # Metrics add up sums and counts over processes; Lightning's own mean is inexact for shares of unequal size.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_accuracy = MeanMetric(nan_strategy="disable")

    @override
    def begin_stream(self, num_classes: int, prompts: Sequence[Sequence[str]] = ()) -> None:
        super().begin_stream(num_classes, prompts)
        for one in self.regularizers:
            one.begin_stream(self, num_classes, prompts)  # type: ignore[operator]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch[0], batch[1]
        terms: dict[str, Tensor] = {}
        if self.regularizers:
            added: list[Regularizer] = list(self.regularizers)  # type: ignore[arg-type]
            logits, terms = regularized_logits(self, added, images)
        else:
            logits = self(images)
        loss = self.loss(logits, labels)
        # Every process has equally many images in a training step, so the mean of their means is exact.
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        if logs_this_step(self.trainer):  # both cost time, and no loss depends on them
            self.log("train/accuracy", self.right(logits.detach(), labels).mean(), sync_dist=True)
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log("train/lr", torch.full((), rate, device=loss.device))  # filled there: a copy makes a GPU wait
        for name, term in terms.items():
            self.log(f"train/{name}", term.detach(), sync_dist=True)
            loss = loss + term
        # Lightning keeps an "epoch" that a module logs itself; its own would start at 0 again in every task.
        epoch = float(self.epoch_offset + self.current_epoch)
        self.log("epoch", torch.full((), epoch, device=loss.device))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch[0], batch[1]
        logits = self(images)
        # Once per image: torchmetrics ignores weights where it does not look for NaN, and drops NaN where it does.
        self.val_loss.update(self.loss(logits, labels).expand(len(labels)))
        self.val_accuracy.update(self.right(logits, labels))
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        # One value per process, all equal: their mean is exact.
        self.log("epoch", float(self.epoch_offset + self.current_epoch), sync_dist=True)

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return an optimizer of the parameters.

        Raises:
            ValueError: If the optimizer refuses its settings.
        """
        try:
            return self.optimizer_factory(parameters)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"expected settings that the optimizer accepts, got: {error}; see model.optimizer"
            ) from error

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer([p for p in self.parameters() if p.requires_grad])
        for group in optimizer.param_groups:
            if unknown := next((name for name in self.optimizer_settings if name not in group), None):
                raise ValueError(
                    f"expected a setting of {type(optimizer).__name__}, one of {sorted(group.keys() - {'params'})}, "
                    f"got {unknown!r}"
                )
            group.update(self.optimizer_settings)
        if isinstance(optimizer, SAM) and self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"expected trainer.accumulate_grad_batches=1 with {type(optimizer).__name__}, got "
                f"{self.trainer.accumulate_grad_batches}: only the last batch could be run again; use a larger batch"
            )
        if self.schedule == "constant" and not self.warmup_steps:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) and self.schedule == "cosine":
            raise ValueError(
                "expected a fit of known length for schedule='cosine', got an endless one; "
                "set the Trainer's max_epochs or max_steps, or schedule='constant'"
            )
        total = 2**63 if math.isinf(steps) else int(steps)
        if self.warmup_steps >= total:
            warnings.warn(
                f"warmup_steps={self.warmup_steps} is not shorter than the {total} steps of this task: the "
                f"learning rate reaches {total / self.warmup_steps:.0%} of its value",
                UserWarning,
                stacklevel=2,
            )
        factor = partial(lr_factor, total=total, warmup=self.warmup_steps, cosine=self.schedule == "cosine")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }


def lr_factor(step: int, *, total: int, warmup: int, cosine: bool) -> float:
    """Return the learning-rate factor of one step: linear warm-up, then cosine to zero, or constant.

    Args:
        step: Optimizer steps taken in this task.
        total: Optimizer steps of the whole task.
        warmup: Steps of the warm-up.
        cosine: Whether the rate falls to zero after the warm-up.

    Returns:
        A number in [0, 1].

    Example:
        >>> [round(lr_factor(s, total=4, warmup=2, cosine=True), 2) for s in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    if not cosine:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
