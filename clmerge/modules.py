"""The LightningModule that fine-tunes one task: backbone, head, loss and optimizer."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from typing_extensions import override

from clmerge.models import Backbone, Full, Head, Tuning, ZeroShotHead
from clmerge.regularizers import Regularizer, regularized_loss
from clmerge.sharpness import SAM
from clmerge.weights.modes import eval_mode

Batch = tuple[Tensor, Tensor]
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class ContinualClassifier(LightningModule):
    """A backbone and a head that are fine-tuned one task after another.

    Args:
        backbone: The image encoder.
        head: From features to logits; default a frozen zero-shot text head.
        tuning: How the backbone is fine-tuned; default ``Full``, all weights that it offers (for CLIP the image tower).
        loss_classes: Which classes compete in the loss: those of the ``current`` task (MagMax's choice), all
            ``seen`` so far, or ``all`` of the stream (only for a head that knows them).
        optimizer: Optimizer class with its settings; default AdamW with lr 1e-5 and weight decay 0.1.
        schedule: Learning rate over the steps of one task: ``cosine`` to zero, or ``constant``.
        warmup_steps: Linear warm-up at the start of every task, in optimizer steps.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).
        regularizers: Terms that are added to the loss, for example ``[EWC, LwF]``.

    Attributes:
        old_classes: Classes seen before the task that is trained.
        epoch_offset: Epochs of earlier tasks, added to the ``epoch`` that loggers are told.
        tuning: How the backbone is fine-tuned.
        trained_names: Dense names of what is trained and may be merged; the head's parameters are not among them.

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
        super().__init__()
        self.backbone = backbone
        self.head = ZeroShotHead() if head is None else head
        if loss_classes == "all" and not self.head.open_vocabulary:
            raise ValueError(
                f"expected loss_classes 'current' or 'seen' with {type(self.head).__name__}, got 'all': "
                "it does not know classes of tasks to come"
            )
        if warmup_steps < 0 or not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                "expected warmup_steps of 0 or more and label_smoothing in [0, 1), "
                f"got {warmup_steps} and {label_smoothing}"
            )
        self.loss_classes = loss_classes
        self.optimizer_factory = optimizer or partial(AdamW, lr=1e-5, weight_decay=0.1)
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.label_smoothing = label_smoothing
        self.regularizers = nn.ModuleList(regularizers or [])
        self.epoch_offset = 0
        self.old_classes: list[int] = []
        self._task_classes: list[int] = []
        self._seen_classes: list[int] = []
        self._on_device: dict[tuple[type | float, ...], Tensor] = {}
        # Metrics add up sums and counts over processes; Lightning's own mean averages the shares' rounded sizes.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.val_accuracy = MeanMetric(nan_strategy="disable")
        self.tuning = Full() if tuning is None else tuning
        self.trained_names = tuple(f"backbone.model.{name}" for name in self.tuning.prepare(backbone))
        if regularizers and not self.trained_names:
            raise ValueError(f"expected no regularizers for a backbone that is frozen, got {len(regularizers)}")

    def begin_stream(self, num_classes: int, prompts: Sequence[Sequence[str]] = ()) -> None:
        """Build the head for a stream of ``num_classes`` classes.

        Args:
            num_classes: Number of classes ``C`` of the whole stream.
            prompts: One list of prompts per class; needed by open-vocabulary heads only.
        """
        self.head.build(self.backbone, num_classes, prompts)

    def begin_task(self, classes: Sequence[int], batches: Iterable[Batch] | None = None) -> None:
        """Get ready to train a task.

        Args:
            classes: Global class ids of the task.
            batches: Training images under the evaluation transform with their labels; read only by heads
                that start from class means. Under DDP every process may bring its share of them.

        Raises:
            ValueError: If a head that starts from class means gets no ``batches``, or none with images of
                one of the classes.
        """
        self._task_classes = sorted(set(classes))
        self.old_classes = self._seen_classes
        self._seen_classes = sorted({*self._seen_classes, *classes})
        prototypes = None
        if self.head.wants_prototypes and batches is not None:
            prototypes = self._class_means(self._task_classes, batches)
        self.head.add_classes(self._task_classes, prototypes)
        self.head.train_blocks(self._task_classes if self.loss_classes == "current" else None)

    def resume_tasks(self, tasks: Sequence[Sequence[int]]) -> None:
        """Take note of the tasks that were trained, and of no others.

        Their parts of the head come with ``load_state_dict``.

        Args:
            tasks: Global class ids of every task, the latest last.
        """
        self._task_classes = sorted(set(tasks[-1]))
        self._seen_classes = sorted({label for classes in tasks for label in classes})

    @torch.no_grad()
    def _class_means(self, classes: list[int], batches: Iterable[Batch]) -> Tensor:
        device = next(self.backbone.parameters()).device
        sums = torch.zeros(len(classes), self.backbone.feature_dim, device=device)
        counts = torch.zeros(len(classes), 1, device=device)
        position = {c: i for i, c in enumerate(classes)}
        with eval_mode(self.backbone):
            for images, labels, *_ in batches:
                rows = torch.tensor([position[int(c)] for c in labels], device=device)
                features = functional.normalize(self.backbone(images.to(device)).float(), dim=-1)
                sums.index_add_(0, rows, features)
                counts.index_add_(0, rows, torch.ones(len(rows), 1, device=device))
        sums, counts = sum_over_processes(sums), sum_over_processes(counts)
        if missing := [c for c, count in zip(classes, counts.flatten().tolist(), strict=True) if not count]:
            raise ValueError(f"expected training images of every class of the task, got none of class {missing[0]}")
        return sums / counts

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape ``(B, C)`` over all classes of the stream, ``-inf`` for unknown ones."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over the classes that ``loss_classes`` names.

        Args:
            logits: Logits over all classes of the stream, ``(B, C)``.
            labels: Global class ids, ``(B,)``.
        """
        if self.loss_classes != "all":
            classes = self._task_classes if self.loss_classes == "current" else self._seen_classes
            columns = self._there(classes, logits.device)
            logits = logits[:, columns]
            labels = torch.searchsorted(columns, labels)
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch[0], batch[1]
        terms: dict[str, Tensor] = {}
        if self.regularizers:
            loss, terms = regularized_loss(self, images, labels)
        else:
            loss = self.loss(self(images), labels)
        # Every process has equally many images in a training step, so that the mean of their means is exact.
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        for name, term in terms.items():
            self.log(f"train/{name}", term.detach(), sync_dist=True)
            loss = loss + term
        # Lightning keeps an "epoch" that a module logs itself; its own would start at 0 again in every task.
        self.log("epoch", self._there([float(self.epoch_offset + self.current_epoch)], loss.device)[0])
        return loss

    def _there(self, numbers: Sequence[float], device: torch.device) -> Tensor:
        """Return numbers as a tensor on a device; copying them there in every step would make a GPU wait."""
        key: tuple[type | float, ...] = (*map(type, numbers), *numbers)
        # Class 1 and epoch 1.0 are equal, but only one of them is an index.
        if key not in self._on_device or self._on_device[key].device != device:
            # The classes of the task, those seen, and the epoch are all there is at a time.
            self._on_device = dict(list(self._on_device.items())[-3:])
            self._on_device[key] = torch.tensor(list(numbers), device=device)
        return self._on_device[key]

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch[0], batch[1]
        logits = self(images)
        columns = self._there(self._task_classes, logits.device)
        # Once per image: torchmetrics ignores weights where it does not look for NaN, and drops NaN where it does.
        self.val_loss.update(self.loss(logits, labels).expand(len(labels)))
        self.val_accuracy.update((columns[logits[:, columns].argmax(dim=1)] == labels).float())
        self.log("val/loss", self.val_loss)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        # One value a process, all of them equal: their mean is exact.
        self.log("epoch", float(self.epoch_offset + self.current_epoch), sync_dist=True)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
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


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up ``values`` over all processes of a distributed run, in the same order on each of them.

    Goes through the CPU, because evaluation between two fits runs there even where NCCL does not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts: list[Tensor] = [torch.empty(0)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values.cpu())
    return torch.stack(parts).sum(dim=0).to(values.device)
