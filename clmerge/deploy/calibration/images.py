"""Adaptation images of the tasks so far, for passes over all of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clmerge.streams import AdaptationData, Stream, StreamDataModule
from clmerge.streams.cache import CachedImages, cached
from clmerge.streams.images import ImageDataset

VALIDATION = AdaptationData()
Kept = Mapping[int, ImageDataset | CachedImages]


def check_adaptation(adaptation: AdaptationData, stream: Stream, kind: str) -> None:
    """Refuse images that do not serve a calibration that is fitted for all tasks so far.

    Args:
        adaptation: The images.
        stream: The stream.
        kind: The calibration, for the message.

    Raises:
        ValueError: If there are none of earlier tasks, or none of a task at all.
    """
    if adaptation.source == "current":
        raise ValueError(
            f"expected adaptation images of all tasks so far for {kind}, got those of the current one; set "
            "adaptation.source to val or buffer"
        )
    adaptation.check(stream)


def kept_images(adaptation: AdaptationData, data: StreamDataModule, tasks: Sequence[int]) -> Kept:
    """Return the images by task, decoded only once if they fit into the data module's ``cache_mb``."""
    found = adaptation.images(data, tasks)
    room = data.cache_mb * 2**20 // max(1, len(found))
    return {task: cached(images, room) or images for task, images in found.items()}


def batches_of(images: ImageDataset | CachedImages, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield all images in order, in batches on a device."""
    loader: DataLoader[Any] = DataLoader(images, batch_size=size)
    for batch, _ in loader:
        yield batch.to(device)


def mixed_batches(kept: Kept, size: int, device: torch.device, *, seed: int) -> Iterator[Tensor]:
    """Yield the images of all tasks once, in batches of nearly equal size and random composition.

    Args:
        kept: The images by task.
        size: Largest size of a batch.
        device: Device of the batches.
        seed: Seed of the order.
    """
    places = [(task, position) for task, images in kept.items() for position in range(len(images))]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    for chosen in order.tensor_split(-(-len(places) // size)):
        drawn = [kept[task][position][0] for task, position in (places[index] for index in chosen.tolist())]
        yield torch.stack(drawn).to(device)
