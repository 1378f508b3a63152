"""Evaluate several sets of weights of one model on all tasks of a stream in one pass over the images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.metrics import TaskAccuracy
from clmerge.modules import ContinualClassifier
from clmerge.streams import StreamDataModule

Rows = dict[str, dict[str, list[float]]]


class Evaluator(LightningModule):
    """Score models that differ in weights only; every image is decoded and moved to the device once.

    Args:
        module: The classifier; its own weights are used for a model whose weights are ``None``.
        weights: Model name -> weights by the module's parameter names.
        task_classes: Global class ids of every task.
        num_classes: Number of classes ``C`` of the stream.
    """

    def __init__(
        self,
        module: ContinualClassifier,
        weights: Mapping[str, Mapping[str, Tensor] | None],
        task_classes: Sequence[Sequence[int]],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.module = module
        self.weights = dict(weights)
        self._accuracies = {name: TaskAccuracy(len(task_classes), num_classes, task_classes) for name in weights}
        # A ModuleDict refuses names with dots, and mergers are named after settings such as density0.1.
        self.metrics = nn.ModuleList(self._accuracies.values())

    @override
    def on_test_start(self) -> None:
        self.weights = {
            name: None if state is None else {key: value.to(self.device) for key, value in state.items()}
            for name, state in self.weights.items()
        }

    @override
    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, tasks = batch
        for name, state in self.weights.items():
            logits = self.module(images) if state is None else functional_call(self.module, dict(state), (images,))
            self._accuracies[name].update(logits.float(), labels, tasks)

    def rows(self) -> Rows:
        """Return model name -> ``task_agnostic`` and ``task_aware`` accuracies, one per task of the stream."""
        found: Rows = {}
        for name, accuracy in self._accuracies.items():
            result = accuracy.compute()
            found[name] = {kind: result[kind].tolist() for kind in ("task_agnostic", "task_aware")}
        return found


def evaluate(
    trainer: Trainer,
    module: ContinualClassifier,
    weights: Mapping[str, Mapping[str, Tensor] | None],
    data: StreamDataModule,
    *,
    task_classes: Sequence[Sequence[int]],
    num_classes: int,
) -> Rows:
    """Return the accuracy on every task for every set of weights, from one ``trainer.test``.

    Args:
        trainer: A Trainer without a MergeCallback.
        module: The classifier; unchanged afterwards.
        weights: Model name -> weights, or None for the module's own.
        data: Serves the test images of all tasks.
        task_classes: Global class ids of every task.
        num_classes: Number of classes of the stream.
    """
    evaluator = Evaluator(module, weights, task_classes, num_classes)
    trainer.test(evaluator, datamodule=data, verbose=False)
    return evaluator.rows()


@torch.no_grad()
def accuracy_on(module: ContinualClassifier, loader: DataLoader[Any]) -> float:
    """Return the plain accuracy of the module as it stands, over all classes its head knows."""
    correct = total = 0
    device = next(module.parameters()).device
    for images, labels, *_ in loader:
        predicted = module(images.to(device)).argmax(dim=1)
        correct += int((predicted == labels.to(device)).sum())
        total += len(labels)
    return correct / max(1, total)
