"""Answers counted by class, task-agnostic and task-aware, from the same logits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from clmerge.results.confusion import MOST_CLASSES
from clmerge.results.metrics.accuracy import predicted


class ConfusionCounts(Metric):
    """Count images by their class and by the class that won, with and without knowing the task.

    Which class wins is decided as in :class:`clmerge.results.metrics.TaskAccuracy`, which checks the batches. The state
    is one table of integer counts, whatever the number of images, that is summed across processes.

    Args:
        num_classes: Number of columns of the logits, C.
        task_classes: Global class ids of each task, one sequence per task.

    Example:
        >>> counts = ConfusionCounts(3, [[0, 1], [2]])
        >>> counts.update(torch.tensor([[0.0, 1.0, 2.0]]), labels=torch.tensor([0]), tasks=torch.tensor([0]))
        >>> [table[0].tolist() for table in counts.compute()]
        [[0, 0, 1, 0], [0, 1, 0, 0]]
    """

    is_differentiable = False
    full_state_update = False

    counts: Tensor
    own_classes: Tensor

    def __init__(self, num_classes: int, task_classes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        own_classes = torch.zeros(len(task_classes), num_classes, dtype=torch.bool)
        for task, classes in enumerate(task_classes):
            own_classes[task, list(classes)] = True
        self.num_classes = num_classes
        self.counts_pairs = num_classes <= MOST_CLASSES
        self.register_buffer("own_classes", own_classes, persistent=False)
        width = num_classes + 1 if self.counts_pairs else 2
        self.add_state("counts", torch.zeros(2, num_classes, width, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Count one batch.

        Args:
            logits: Scores of all classes, ``(batch, num_classes)``, floating point.
            labels: Global class ids, ``(batch,)``, integer.
            tasks: Index of the task each sample belongs to, ``(batch,)``, integer.
        """
        width = self.counts.shape[2]
        for reading, competing in enumerate((torch.ones_like(logits, dtype=torch.bool), self.own_classes[tasks])):
            found = predicted(logits, competing)
            column = found % width if self.counts_pairs else (found != labels).long()  # -1, no class, is the last one
            cells = labels * width + column
            self.counts[reading].view(-1).index_add_(0, cells, torch.ones_like(cells))

    def compute(self) -> Tensor:
        """Return the counts, task-agnostic and task-aware: ``(2, C, C + 1)``, the last column where no class won.

        Above 2000 classes, ``(2, C, 2)``: classified rightly and wrongly.
        """
        return self.counts.clone()
