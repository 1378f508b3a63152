"""Measure the statistics that mergers require, at the end of a task while its data is available."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from clmerge.merging import Statistics
from clmerge.models import Classifier
from clmerge.statistics.collectors import diagonal_fisher, gram_matrices
from clmerge.statistics.mask_nodes import mask_node_fisher
from clmerge.statistics.output_factors import output_gram_matrices
from clmerge.streams import StreamDataModule
from clmerge.streams.splits import derived_seed
from clmerge.weights.modes import eval_mode
from clmerge.weights.parametrization import folded


class _KnownLogits(nn.Module):
    """The classifier without the logits of classes that its head does not know (-inf)."""

    def __init__(self, module: Classifier, classes: Tensor) -> None:
        super().__init__()
        self.module = module
        self.classes = classes

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits[:, self.classes]


def measure(
    needed: Set[str],
    module: Classifier,
    data: StreamDataModule,
    task: int,
    *,
    base: Mapping[str, Tensor],
    num_steps: int,
    num_images: int,
    seed: int,
) -> Statistics:
    """Return the ``needed`` statistics of one task.

    ``samples`` and ``steps`` are counts. ``fisher``, ``mask_fisher`` and ``output_gram`` (labels drawn from the model)
    and ``gram`` are measured on ``num_images`` training images of the task, drawn by seed, with the dense weights in
    ordinary layers for any mode of tuning; ``loss`` is the mean loss of the unchanged module, the task's expert, on the
    same images. Every process measures on the same images, so that all ranks get the same merge.

    Args:
        needed: Names of statistics.
        module: The classifier trained on the task.
        data: Provides the task's training images under the evaluation transform.
        task: Index of the task.
        base: theta_0 by parameter name: selects the parameters to measure, and the device of the results.
        num_steps: Optimizer steps of the task.
        num_images: Number of images to measure on.
        seed: Seed of the choice of images.
    """
    whole = _training_set(data, task)
    statistics: dict[str, Any] = {"samples": float(len(whole)), "steps": float(num_steps)}
    if needed <= statistics.keys():
        return statistics
    batches = training_batches(data, task, num_images, seed)
    device = next(module.parameters()).device
    with eval_mode(module):
        with torch.no_grad():
            known = torch.isfinite(module(next(iter(batches))[0].to(device))[0]).nonzero()[:, 0]
        images = [batch[0].to(device) for batch in batches]
        if needed & {"fisher", "mask_fisher", "gram", "output_gram"}:
            with folded(module):  # whatever is trained in their place, these are about the dense weights
                statistics |= _of_weights(needed, _KnownLogits(module, known), images, base, seed=seed, task=task)
        if "loss" in needed:
            with torch.no_grad():
                losses = [
                    float(module.loss(module(batch[0].to(device)), batch[1].to(device))) * len(batch[1])
                    for batch in batches
                ]
            statistics["loss"] = sum(losses) / min(num_images, len(whole))
    return statistics


def training_images(
    module: Classifier, data: StreamDataModule, task: int, *, num_images: int, seed: int
) -> Iterator[Tensor]:
    """Yield the images that statistics are measured on, in batches on the module's device.

    Args:
        module: The classifier.
        data: Provides the task's training images under the evaluation transform.
        task: Index of the task.
        num_images: Number of images to measure on.
        seed: Seed of the choice of images.
    """
    device = next(module.parameters()).device
    for batch in training_batches(data, task, num_images, seed):
        yield batch[0].to(device)


def training_batches(data: StreamDataModule, task: int, num_images: int, seed: int) -> DataLoader[Any]:
    """Return batches of the training images that statistics of a task are measured on, with labels.

    Args:
        data: Provides the task's training images under the evaluation transform.
        task: Index of the task.
        num_images: Number of images, drawn by seed.
        seed: Seed of the choice.
    """
    whole = _training_set(data, task)
    generator = torch.Generator().manual_seed(derived_seed(seed, "statistics", task))
    chosen = torch.randperm(len(whole), generator=generator)[:num_images].tolist()
    return DataLoader(Subset(whole, chosen), batch_size=data.eval_batch_size)


def _training_set(data: StreamDataModule, task: int) -> Any:
    """Return the training images of a task under the evaluation transform; of a branch, those of its part."""
    whole: Any = data.eval_dataloader("train", [task]).dataset
    return whole if data.part[1] == 1 else Subset(whole, data.part_positions)


def _of_weights(
    needed: Set[str], wrapped: nn.Module, images: list[Tensor], base: Mapping[str, Tensor], *, seed: int, task: int
) -> dict[str, dict[str, Tensor]]:
    names = [f"module.{name}" for name in base]
    found = {}
    if "fisher" in needed:
        found["fisher"] = diagonal_fisher(
            wrapped, images, names, labels="sampled", seed=derived_seed(seed, "fisher", task)
        )
    if "mask_fisher" in needed:
        found["mask_fisher"] = mask_node_fisher(
            wrapped, images, names, labels="sampled", seed=derived_seed(seed, "mask_fisher", task)
        )
    if "gram" in needed:
        found["gram"] = gram_matrices(wrapped, images, names)
    if "output_gram" in needed:
        found["output_gram"] = output_gram_matrices(
            wrapped, images, names, seed=derived_seed(seed, "output_gram", task)
        )
    return {name: _plain(tensors, base) for name, tensors in found.items()}


def _plain(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the wrapper's prefix from the names, and move the tensors to the base's device."""
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {name: tensor.to(base[name].device) for name, tensor in named.items()}
