"""Accuracy per task, task-agnostic and task-aware, from the same logits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskAccuracy(Metric):
    """Count the right answers on every task, with and without knowing the task.

    One pass over the test sets of a stream gives both readings of the same logits: *task-agnostic*
    (class-incremental: all classes the head scores compete) and *task-aware* (task-incremental: only the
    classes of the sample's own task compete). The states are integer counts that are summed across processes,
    so the result is the same to the last bit on any number of ranks, whatever share of the samples each of
    them saw.

    A sample is right when its label has the highest logit among the competing classes; of equal logits the
    lowest class id wins. It is wrong when one of the competing logits is NaN, or when all of them are
    ``-inf``: a model that has diverged scores zero instead of stopping the run, and a class that a growing
    head does not score yet (``-inf``) is never right by accident.

    Args:
        num_tasks: Number of tasks of the stream, T.
        num_classes: Number of columns of the logits, C.
        task_classes: Global class ids of each task, one sequence per task. Tasks may share classes
            (domain-incremental streams).
        seen: Indices of the tasks whose classes compete in the task-agnostic reading; samples of other tasks
            are then always wrong there. Every column competes by default.

    Raises:
        ValueError: If ``task_classes`` does not have one non-empty entry per task, or if a class id or an
            index in ``seen`` is out of range.

    Example:
        >>> import torch
        >>> metric = TaskAccuracy(2, 4, [[0, 1], [2, 3]])
        >>> logits = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
        >>> metric.update(logits, labels=torch.tensor([0, 1, 3]), tasks=torch.tensor([0, 0, 1]))
        >>> {name: value.tolist() for name, value in metric.compute().items()}
        {'task_agnostic': [0.5, 1.0], 'task_aware': [1.0, 1.0], 'samples': [2, 1]}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct_agnostic: Tensor
    correct_aware: Tensor
    samples: Tensor
    own_classes: Tensor
    agnostic_classes: Tensor

    def __init__(
        self,
        num_tasks: int,
        num_classes: int,
        task_classes: Sequence[Sequence[int]],
        *,
        seen: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"expected at least one task, got num_tasks={num_tasks}")
        if len(task_classes) != num_tasks:
            raise ValueError(f"expected task_classes to have {num_tasks} entries, got {len(task_classes)}")
        own_classes = torch.zeros(num_tasks, num_classes, dtype=torch.bool)
        for task, classes in enumerate(task_classes):
            wrong = [c for c in classes if not 0 <= c < num_classes]
            if wrong or not classes:
                raise ValueError(
                    f"expected the classes of task {task} to be one or more ids in [0, {num_classes}), "
                    f"got {wrong[:5] or 'none'}"
                )
            own_classes[task, list(classes)] = True
        if seen is None:
            agnostic_classes = torch.ones(num_classes, dtype=torch.bool)
        else:
            wrong = [t for t in seen if not 0 <= t < num_tasks]
            if wrong or not seen:
                raise ValueError(
                    f"expected seen to hold one or more task indices in [0, {num_tasks}), got {list(seen)}"
                )
            agnostic_classes = own_classes[list(seen)].any(dim=0)
        self.num_tasks = num_tasks
        self.num_classes = num_classes
        # Buffers follow the metric to its device; they are rebuilt by the constructor and need no place in
        # checkpoints.
        self.register_buffer("own_classes", own_classes, persistent=False)
        self.register_buffer("agnostic_classes", agnostic_classes, persistent=False)
        for state in ("correct_agnostic", "correct_aware", "samples"):
            self.add_state(state, torch.zeros(num_tasks, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Count one batch.

        Args:
            logits: Scores of all classes, ``(batch, num_classes)``, floating point.
            labels: Global class ids, ``(batch,)``, integer.
            tasks: Index of the task each sample belongs to, ``(batch,)``, integer.

        Raises:
            ValueError: If a shape is wrong, a label or task is out of range, or a label is no class of its
                task.
            TypeError: If the logits are not floating point, or labels or tasks are not integer.
        """
        self._check(logits, labels, tasks)
        one_hot = tasks.unsqueeze(1) == torch.arange(self.num_tasks, device=tasks.device)
        agnostic = predicted(logits, self.agnostic_classes.expand_as(logits)) == labels
        aware = predicted(logits, self.own_classes[tasks]) == labels
        self.correct_agnostic += (one_hot & agnostic.unsqueeze(1)).sum(dim=0)
        self.correct_aware += (one_hot & aware.unsqueeze(1)).sum(dim=0)
        self.samples += one_hot.sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracies of everything counted so far.

        Returns:
            ``task_agnostic`` and ``task_aware``, accuracies in [0, 1], ``(num_tasks,)``, float64 (float32 on
                MPS, which
            has no float64), NaN for a task without samples; ``samples``: counts, ``(num_tasks,)``, int64.
        """
        dtype = torch.float32 if self.samples.device.type == "mps" else torch.float64
        samples = self.samples.to(dtype)
        return {
            # 0 / 0 is NaN, which is what a task without samples gets.
            "task_agnostic": self.correct_agnostic.to(dtype) / samples,
            "task_aware": self.correct_aware.to(dtype) / samples,
            "samples": self.samples.clone(),
        }

    def _check(self, logits: Tensor, labels: Tensor, tasks: Tensor) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"expected logits of shape (batch, {self.num_classes}), got {tuple(logits.shape)}")
        if not logits.is_floating_point():
            raise TypeError(f"expected floating point logits, got {logits.dtype}")
        for name, values in (("labels", labels), ("tasks", tasks)):
            if values.shape != logits.shape[:1]:
                raise ValueError(f"expected {name} of shape ({logits.shape[0]},), got {tuple(values.shape)}")
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise TypeError(f"expected integer {name}, got {values.dtype}")
        # One comparison, hence one device synchronisation, covers both ranges and the label's membership of
        # its task.
        tasks_in = tasks.clamp(0, self.num_tasks - 1)
        labels_in = labels.clamp(0, self.num_classes - 1)
        fits = (tasks == tasks_in) & (labels == labels_in) & self.own_classes[tasks_in, labels_in]
        if not bool(fits.all()):
            first = int((~fits).nonzero()[0, 0])
            raise ValueError(
                f"expected tasks in [0, {self.num_tasks}), labels in [0, {self.num_classes}), every label "
                f"to be a class of its task, got label {int(labels[first])}, task {int(tasks[first])} at "
                f"position {first} of the batch; check the stream and task_classes"
            )


def predicted(logits: Tensor, competing: Tensor) -> Tensor:
    """Return the competing class with the highest logit for each sample, -1 where none wins.

    Of equal logits the lowest class id wins; none wins where a competing logit is NaN or all are ``-inf``.

    Args:
        logits: ``(batch, num_classes)``.
        competing: Which classes compete, of the same shape.
    """
    scores = logits.masked_fill(~competing, float("-inf"))
    found = scores.argmax(dim=1)  # unlike the index max() returns, promised to be the first of equal values
    best = scores.amax(dim=1)
    # amax passes NaN on, so one test of the winner covers NaN anywhere among the competing logits.
    return found.masked_fill(best.isnan() | (best == float("-inf")), -1)
