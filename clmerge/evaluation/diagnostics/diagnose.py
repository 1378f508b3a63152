"""Compute a run's diagnostics document in one call."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from clmerge.evaluation.diagnostics.behaviour import first_images
from clmerge.evaluation.diagnostics.document import document
from clmerge.evaluation.diagnostics.layers import diagnose_layers
from clmerge.evaluation.diagnostics.models import diagnose_models
from clmerge.evaluation.diagnostics.tangent import tangent_images, tangent_localisation
from clmerge.evaluation.diagnostics.vectors import diagnose_vectors
from clmerge.results.results import Setting
from clmerge.streams.plan import Split
from clmerge.streams.splits import derived_seed
from clmerge.weights import State, TaskVectorBank

if TYPE_CHECKING:  # imports Lightning, which is not needed to read a document
    from clmerge.streams import StreamDataModule


_TANGENT_IMAGES = 16


def _joined(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def diagnose(
    module: nn.Module,
    weights: Callable[[State], State],
    bank: TaskVectorBank,
    merged: Mapping[str, State],
    data: "StreamDataModule",
    *,
    setting: Setting = "task_agnostic",
    num_images: int = 256,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Diagnose the task vectors, the experts and the merged models of a stream.

    Models are compared on validation images, or on test images if some task has no validation images; the document
    records which. The experts of the first and the last task are compared layer by layer, on half as many images of
    both together.

    Args:
        module: The classifier, with a head for all tasks.
        weights: Maps a task vector to the module's weights, as for ``diagnose_models``.
        bank: The task vectors of all tasks.
        merged: Merged vector of every merger, scale included.
        data: Provides the stream's images; already set up.
        setting: Whether all classes compete, or only those of the image's task.
        num_images: Maximum number of images per task, drawn by seed because data sets are often sorted by class.
        seed: Seed of the draw.
        progress: Called with a description of the current measurement.

    Returns:
        The diagnostics document (docs/diagnostics.md); ``vectors`` and ``layers`` are None for a stream of one task.
    """
    tasks = data.stream.tasks
    held_out = all(len(data.stream.dataset(task.index, "val")) for task in tasks)
    split: Split = "val" if held_out else "test"
    loaders = []
    for task in tasks:
        whole: Any = data.eval_dataloader(split, [task.index]).dataset
        generator = torch.Generator().manual_seed(derived_seed(seed, "diagnose", task.index))
        chosen = sorted(torch.randperm(len(whole), generator=generator)[:num_images].tolist())
        loaders.append(DataLoader(Subset(whole, chosen), batch_size=data.eval_batch_size))
    progress("diagnosing task vectors")
    vectors = diagnose_vectors(bank) if len(tasks) > 1 else None
    models = diagnose_models(
        module,
        weights,
        bank,
        merged,
        loaders,
        task_classes=[task.classes for task in tasks],
        setting=setting,
        num_images=num_images,
        progress=progress,
    )
    layers = None
    if len(tasks) > 1:
        progress("diagnosing layers")
        ends = (0, len(tasks) - 1)
        batches = [batch for task in ends for batch in first_images(loaders[task], -(-num_images // 4))]
        own = sorted({*tasks[ends[0]].classes, *tasks[ends[1]].classes}) if setting == "task_aware" else None
        found = diagnose_layers(module, weights, (bank[ends[0]], bank[ends[1]]), batches, classes=own)
        layers = {"tasks": list(ends), "images": sum(len(labels) for _, labels in batches), "layers": found}
        zero = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in bank[0].items()}
        base = weights(zero)
        if number := tangent_images(base, _TANGENT_IMAGES):
            one, two = (_joined(first_images(loaders[task], number)) for task in ends)
            orders = ((ends[0], one, two), (ends[1], two, one))
            layers["tangent"] = [tangent_localisation(module, base, weights(bank[t]), a, b) for t, a, b in orders]
    names = [task.name for task in tasks]
    return document(names, vectors=vectors, models={"split": split, **models}, layers=layers)
