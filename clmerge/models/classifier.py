"""A classifier over the classes of a stream: backbone, head, mode of tuning, and the classes in the loss."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from clmerge.distributed import sum_over_processes
from clmerge.models.backbone import Backbone
from clmerge.models.heads import Head, ZeroShotHead
from clmerge.models.tuning import Full, Tuning
from clmerge.weights.modes import eval_mode

Batch = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """A backbone and a head, tuned one task after another; independent of the training loop.

    Args:
        backbone: The image encoder.
        head: Maps features to logits; default a frozen zero-shot text head.
        tuning: How the backbone is fine-tuned; default ``Full``, all of its trainable weights (for CLIP the image
            tower).
        loss_classes: Which classes compete in the loss: those of the ``current`` task (MagMax's choice), all
            ``seen`` so far, or ``all`` of the stream (only for a head that knows them).
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1).

    Attributes:
        old_classes: Classes seen before the current task.
        tuning: How the backbone is fine-tuned.
        trained_names: Dense names of the trained weights that may be merged; without the head's parameters.

    Raises:
        ValueError: For a text head with a backbone that has no text tower, ``loss_classes='all'`` with a head that
            must learn its classes, a tuning that matches nothing in the backbone, or a label smoothing out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        *,
        tuning: Tuning | None = None,
        loss_classes: Literal["current", "seen", "all"] = "current",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ZeroShotHead() if head is None else head
        if self.head.open_vocabulary and type(backbone).encode_text is Backbone.encode_text:
            raise ValueError(
                f"expected a head that learns its classes for {type(backbone).__name__}, which has no text tower, got "
                f"{'none' if head is None else type(head).__name__}: set model.head to LinearHead or CosineHead"
            )
        if loss_classes == "all" and not self.head.open_vocabulary:
            raise ValueError(
                f"expected loss_classes 'current' or 'seen' with {type(self.head).__name__}, got 'all': "
                "it does not know classes of tasks to come"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"expected label_smoothing in [0, 1), got {label_smoothing}")
        self.loss_classes = loss_classes
        self.label_smoothing = label_smoothing
        self.old_classes: list[int] = []
        self._task_classes: list[int] = []
        self._seen_classes: list[int] = []
        self._on_device: dict[tuple[int, ...], Tensor] = {}
        self.tuning = Full() if tuning is None else tuning
        self.trained_names = tuple(f"backbone.model.{name}" for name in self.tuning.prepare(backbone))

    def begin_stream(self, num_classes: int, prompts: Sequence[Sequence[str]] = ()) -> None:
        """Build the head for a stream of ``num_classes`` classes.

        Args:
            num_classes: Number of classes ``C`` of the whole stream.
            prompts: One list of prompts per class; needed by open-vocabulary heads only.
        """
        self.head.build(self.backbone, num_classes, prompts)

    def begin_task(self, classes: Sequence[int], batches: Iterable[Batch] | None = None) -> None:
        """Prepare for training a task.

        Args:
            classes: Global class ids of the task.
            batches: Training images under the evaluation transform with their labels; read only by heads
                that start from class means. Under DDP every process may pass a part of them.

        Raises:
            ValueError: If a head that starts from class means gets no ``batches``, or no images of one of the
                classes.
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
        """Set the tasks that were trained so far, replacing any earlier ones.

        Their parts of the head are restored by ``load_state_dict``.

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
        """Return the mean cross-entropy over the classes selected by ``loss_classes``.

        Args:
            logits: Logits over all classes of the stream, ``(B, C)``.
            labels: Global class ids, ``(B,)``.
        """
        if self.loss_classes != "all":
            columns = self._columns(self.competing(logits.shape[1]), logits.device)
            logits = logits[:, columns]
            labels = torch.searchsorted(columns, labels)
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def competing(self, num_classes: int) -> Sequence[int]:
        """Return the classes that compete in the loss.

        Args:
            num_classes: Number of classes of the whole stream.
        """
        if self.loss_classes == "all":
            return range(num_classes)
        return self._task_classes if self.loss_classes == "current" else self._seen_classes

    def right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return 1.0 for every image classified correctly among the task's classes, else 0.0: ``(B,)``.

        Args:
            logits: Logits over all classes of the stream, ``(B, C)``.
            labels: Global class ids, ``(B,)``.
        """
        columns = self._columns(self._task_classes, logits.device)
        return (columns[logits[:, columns].argmax(dim=1)] == labels).float()

    def _columns(self, classes: Sequence[int], device: torch.device) -> Tensor:
        """Return classes as a cached index on a device; copying them in every step would make a GPU wait."""
        key = tuple(classes)
        if key not in self._on_device or self._on_device[key].device != device:
            # At most two sets are in use at a time: the task's classes and the classes seen.
            self._on_device = dict(list(self._on_device.items())[-1:])
            self._on_device[key] = torch.tensor(key, device=device)
        return self._on_device[key]
