"""Evaluate several predictors on all tasks of a stream in one pass over the images."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from clmerge.deploy.predictors import Predictor
from clmerge.distributed import sum_over_processes
from clmerge.evaluation.evaluator import Evaluator, Rows
from clmerge.evaluation.probes.measuring import Probing, measure
from clmerge.models import Classifier
from clmerge.streams import StreamDataModule
from clmerge.weights.modes import eval_mode

Split: TypeAlias = Literal["val", "test", "all"]


def evaluate(
    trainer: Trainer,
    module: Classifier,
    predictors: Mapping[str, Predictor],
    data: StreamDataModule,
    *,
    task_classes: Sequence[Sequence[int]],
    num_classes: int,
    split: Split = "test",
    tasks: Sequence[int] | None = None,
    confusion: bool = False,
    probing: Probing | None = None,
) -> Rows:
    """Return the accuracy of every predictor on every task, from one ``trainer.test``.

    Args:
        trainer: A Trainer without a MergeCallback; with ``inference_mode=False`` if a probe needs gradients.
        module: The classifier; unchanged afterwards.
        predictors: Predictors by name.
        data: Provides the test images of all tasks.
        task_classes: Global class ids of every task.
        num_classes: Number of classes of the stream.
        split: Split of every task to evaluate on; ``all`` are the training, validation and test images.
        tasks: Indices of the tasks to evaluate on; default all.
        confusion: Whether answers are counted by class, too. Counts of C classes take 16 C (C + 1) bytes for every
            predictor, on its device; of more than 2000 classes pairs are not counted.
        probing: Probes of the predictors. Those that look at the test images do so in the same pass; other images and
            weights follow.

    Returns:
        Name -> ``task_agnostic`` and ``task_aware``, one accuracy in [0, 1] per task; NaN for a task without test
        images or unknown to the predictor, and for every ``task_agnostic`` accuracy of a predictor that needs the task.
        With ``confusion``, also a :class:`clmerge.results.confusion.Confusion` for every reading that is defined, over
        the images of the tasks that the predictor knows. With ``probing``, ``probes``: the findings by probe.

    Raises:
        RuntimeError: If names or shapes of weights differ from the module's.
    """
    riding = () if probing is None else probing.riding
    reading = "task_agnostic" if probing is None else probing.occasion.reading
    evaluator = Evaluator(
        module, predictors, task_classes, num_classes, confusion=confusion, probes=riding, reading=reading
    )
    try:
        if split == "test" and (tasks is None or len(tasks) == len(task_classes)):
            trainer.test(evaluator, datamodule=data, verbose=False)
        else:
            trainer.test(evaluator, dataloaders=data.eval_dataloader(split, tasks), verbose=False)
    finally:
        evaluator.restore()
    rows = evaluator.rows()
    if probing is not None:
        for name, found in measure(trainer, module, predictors, data, probing, evaluator.seen()).items():
            rows[name]["probes"] = found
    return rows


@torch.no_grad()
def accuracy_on(
    module: Classifier, loader: DataLoader[Any], task_classes: Sequence[Sequence[int]] | None = None
) -> float:
    """Return the module's accuracy, among all classes its head knows or among the classes of each image's task.

    Args:
        module: The classifier, run in evaluation mode; unchanged afterwards.
        loader: Batches of images and global labels. In a distributed run every process passes its share of
            them and gets the accuracy over all.
        task_classes: Global class ids of every task, for task-aware accuracy; batches then hold the task of each image.

    Raises:
        ValueError: If there are no images.
    """
    correct = total = 0
    device = next(module.parameters()).device
    with eval_mode(module):
        for images, labels, *tasks in loader:
            logits = module(images.to(device))
            if task_classes is not None:
                for row, task in zip(logits, tasks[0].tolist(), strict=True):
                    others = torch.ones_like(row, dtype=torch.bool)
                    others[list(task_classes[task])] = False
                    row[others] = -torch.inf
            predicted = logits.argmax(dim=1)
            correct += int((predicted == labels.to(device)).sum())
            total += len(labels)
    counts = sum_over_processes(torch.tensor([correct, total]))
    if not counts[1]:
        raise ValueError("expected images to compute an accuracy on, got none")
    return float(counts[0] / counts[1].double())
