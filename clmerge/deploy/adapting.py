"""Losses of a classifier on declared adaptation data."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clmerge.deploy.learning import Loss, Losses, Request
from clmerge.merging import Given, Outputs
from clmerge.models import Classifier
from clmerge.streams import AdaptationBatch, AdaptationData, StreamDataModule
from clmerge.streams.splits import derived_seed


def adaptation_losses(adaptation: AdaptationData, data: StreamDataModule, *, seed: int) -> Losses:
    """Return the losses by which rules learn on adaptation data: at every step a batch of each task.

    Args:
        adaptation: Which images.
        data: Provides them.
        seed: Seed of the run.
    """

    def losses(model: nn.Module, request: Request) -> Iterator[Sequence[Loss]]:
        assert isinstance(model, Classifier)
        device = next(model.parameters()).device
        classes = {task.index: task.classes for task in data.stream.tasks}
        seen = torch.tensor(sorted({c for task in request.tasks for c in classes[task]}), device=device)
        experts = {}
        if request.objective.needs_expert:
            experts = _experts(model, request, adaptation, data, device)
        number = len(adaptation.images(data, request.tasks))
        batches = adaptation.batches(data, request.tasks, seed=derived_seed(seed, "learning", request.seed))

        def known(batch: AdaptationBatch) -> Given:
            labels = batch.labels.to(device) if request.objective.needs_labels and batch.labels is not None else None
            expert = experts.get(batch.task)
            if expert is not None:
                chosen = batch.positions
                expert = Outputs(expert.logits[chosen].to(device), expert.features[chosen].to(device))
            return Given(torch.tensor(classes[batch.task], device=device), seen, labels, expert)

        while True:
            yield [
                partial(_loss, request=request, images=batch.images.to(device), given=known(batch))
                for batch in (next(batches) for _ in range(number))
            ]

    return losses


def outputs(model: Classifier, images: Tensor) -> Outputs:
    """Return logits and features of images.

    Args:
        model: The classifier.
        images: ``(B, 3, H, W)``, on its device.
    """
    features = model.backbone(images)
    return Outputs(model.head(features), features)


def _loss(model: nn.Module, *, request: Request, images: Tensor, given: Given) -> Tensor:
    assert isinstance(model, Classifier)
    return request.objective(outputs(model, images), given)


@torch.no_grad()
def _experts(
    model: Classifier, request: Request, adaptation: AdaptationData, data: StreamDataModule, device: torch.device
) -> dict[int, Outputs]:
    """Return what the experts say of the images of their own tasks."""
    found = {}
    for task, images in adaptation.images(data, request.tasks).items():
        with request.expert(task):
            loader = DataLoader(images, batch_size=data.eval_batch_size, generator=torch.Generator())
            parts = [outputs(model, batch[0].to(device)) for batch in loader]
        found[task] = Outputs(
            torch.cat([part.logits.cpu() for part in parts]), torch.cat([part.features.cpu() for part in parts])
        )
    return found
