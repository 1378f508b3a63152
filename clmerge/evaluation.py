"""Evaluate several sets of weights of one model on all tasks of a stream in one pass over the images."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from clmerge.metrics import TaskAccuracy
from clmerge.modules import ContinualClassifier, sum_over_processes
from clmerge.streams import StreamDataModule
from clmerge.weights.exchange import Exchange
from clmerge.weights.modes import eval_mode
from clmerge.weights.swap import swapped

Rows = dict[str, dict[str, list[float]]]


class Evaluator(LightningModule):
    """Score models that differ in weights only; every image is decoded and moved to the device once.

    Args:
        module: The classifier; its own weights are used for a model whose weights are ``None``.
        weights: Model name -> weights by the module's parameter and buffer names, without the ``_orig_mod.``
            of ``torch.compile``. What is not named stays the module's own.
        task_classes: Global class ids of every task.
        num_classes: Number of classes ``C`` of the stream.

    Raises:
        RuntimeError: If weights are named or shaped unlike the module's.
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
        self.weights = {
            name: None if state is None else _own_names(module, state, name) for name, state in weights.items()
        }
        self._exchange: Exchange | None = None
        self._rows: Rows = {}
        self._accuracies = {name: TaskAccuracy(len(task_classes), num_classes, task_classes) for name in weights}
        # A ModuleDict refuses names with dots, and mergers are named after settings such as density0.1.
        self.metrics = nn.ModuleList(self._accuracies.values())

    @override
    def on_test_start(self) -> None:
        self.weights = {
            name: None if state is None else {key: value.to(self.device) for key, value in state.items()}
            for name, state in self.weights.items()
        }
        names = {key for state in self.weights.values() for key in state or ()}
        # Here, because the Trainer has moved the module by now.
        self._exchange = Exchange(self.module, names, share=len(self.weights) > 1).__enter__()

    @override
    def on_test_end(self) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the module its own weights back, also after an exception."""
        if self._exchange is not None:
            self._exchange.__exit__()
            self._exchange = None

    @override
    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, tasks = batch
        assert self._exchange is not None
        self._exchange.next_input()
        for name, state in self.weights.items():
            self._exchange.put(state or {})
            self._accuracies[name].update(self.module(images).float(), labels, tasks)

    @override
    def on_test_epoch_end(self) -> None:
        # Counts of several processes are added up here, while they are on a device that the processes share.
        for name, accuracy in self._accuracies.items():
            result = accuracy.compute()
            self._rows[name] = {kind: result[kind].reshape(-1).tolist() for kind in ("task_agnostic", "task_aware")}

    def rows(self) -> Rows:
        """Return model name -> ``task_agnostic`` and ``task_aware``: one accuracy in [0, 1] per task.

        Raises:
            RuntimeError: Before a ``trainer.test``.
        """
        if not self._rows and self.weights:
            raise RuntimeError("expected an Evaluator that has run, got a new one; call trainer.test first")
        return self._rows


def _own_names(module: nn.Module, state: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Give ``state`` the names that ``functional_call`` needs; it would ignore any other."""
    own = {
        name.replace("_orig_mod.", ""): (name, tensor.shape)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    for name, tensor in state.items():
        if name not in own or own[name][1] != tensor.shape:
            got = f"shape {tuple(own[name][1])}" if name in own else "none of that name"
            raise RuntimeError(
                f"expected {name!r} of shape {tuple(tensor.shape)} in {type(module).__name__}, as model "
                f"{model!r} has it, got {got}; use the architecture its weights were made with"
            )
    return {own[name][0]: tensor for name, tensor in state.items()}


def evaluate(
    trainer: Trainer,
    module: ContinualClassifier,
    weights: Mapping[str, Mapping[str, Tensor] | None],
    data: StreamDataModule,
    *,
    task_classes: Sequence[Sequence[int]],
    num_classes: int,
    split: Literal["val", "test"] = "test",
) -> Rows:
    """Return the accuracy on every task for every set of weights, from one ``trainer.test``.

    Args:
        trainer: A Trainer without a MergeCallback.
        module: The classifier; unchanged afterwards.
        weights: Model name -> weights, or None for the module's own.
        data: Serves the test images of all tasks.
        task_classes: Global class ids of every task.
        num_classes: Number of classes of the stream.
        split: Which images of every task.

    Returns:
        Model name -> ``task_agnostic`` and ``task_aware``: one accuracy in [0, 1] per task, NaN for a task
        without test images.

    Raises:
        RuntimeError: If weights are named or shaped unlike the module's.
    """
    evaluator = Evaluator(module, weights, task_classes, num_classes)
    try:
        if split == "test":
            trainer.test(evaluator, datamodule=data, verbose=False)
        else:
            trainer.test(evaluator, dataloaders=data.eval_dataloader(split), verbose=False)
    finally:
        evaluator.restore()
    return evaluator.rows()


class _Probabilities(LightningModule):
    def __init__(self, module: ContinualClassifier) -> None:
        super().__init__()
        self.module = module

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, tasks = batch
        return self.module(images).float().softmax(dim=1).cpu(), labels.cpu(), tasks.cpu()


def probabilities(
    trainer: Trainer, module: ContinualClassifier, weights: Mapping[str, Tensor], data: StreamDataModule
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one model believes of every test image of the stream, in one process.

    Args:
        trainer: A Trainer without a MergeCallback.
        module: The classifier; unchanged afterwards.
        weights: Weights by the module's names; what is not named stays the module's own.
        data: Serves the test images of all tasks.

    Returns:
        Probabilities ``(num_images, num_classes)``, labels and tasks ``(num_images,)``, on the CPU.
    """
    with swapped(module, weights):
        found = trainer.predict(_Probabilities(module), dataloaders=data.eval_dataloader("test"))
    assert found is not None
    beliefs, labels, tasks = zip(*found, strict=True)
    return torch.cat(beliefs), torch.cat(labels), torch.cat(tasks)


@torch.no_grad()
def accuracy_on(
    module: ContinualClassifier, loader: DataLoader[Any], task_classes: Sequence[Sequence[int]] | None = None
) -> float:
    """Return the share of images that the module classifies right, among all classes its head knows or the task's own.

    Args:
        module: The classifier, scored in evaluation mode; its weights and modes are the same afterwards.
        loader: Batches of images and global labels. In a distributed run every process brings its share of
            them and gets the accuracy over all.
        task_classes: Global class ids of every task, for task-aware accuracy; batches then say the task of each image.

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
