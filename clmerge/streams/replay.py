"""Replay baselines: images of earlier tasks that are kept and trained on again, unlike in merging."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from clmerge.streams.images import ImageDataset, subset
from clmerge.streams.plan import Transform
from clmerge.streams.samplers import EpochSampler
from clmerge.streams.splits import derived_seed
from clmerge.streams.stream import Stream

Replay: TypeAlias = int | Literal["all"]
"""Number of images of earlier tasks to keep, or all of them (joint training)."""


def replay_memory(stream: Stream, task: int, replay: Replay, transform: Transform | None, *, seed: int) -> Images:
    """Return the training images of earlier tasks that are in memory while a task is trained.

    A number of images is shared evenly by the classes seen before (the first classes get the remainder), as in a
    class-balanced buffer (experience replay, arXiv 1902.10486). Every class has one random order of its images by
    ``seed``, and the first of them are kept: an image, once dropped, never returns. The result is a pure function of
    the arguments, so a resumed run needs no state.

    Args:
        stream: the stream.
        task: index of the task that is trained.
        replay: total number of images, or ``"all"``.
        transform: applied to each image.
        seed: seed of the choice.

    Returns:
        Images with global class ids; none before the second task.
    """
    if not replay:
        return Images([])
    earlier = [stream.dataset(index, "train", transform) for index in range(task)]
    if replay == "all":
        return Images(earlier)
    by_class = ranked_by_class(dict(enumerate(earlier)), seed=seed)
    kept: list[list[int]] = [[] for _ in earlier]
    for rank, order in enumerate(by_class.values()):
        share = replay // len(by_class) + (rank < replay % len(by_class))
        for part, position in order[:share]:
            kept[part].append(position)
    return Images([subset(images, sorted(positions)) for images, positions in zip(earlier, kept, strict=True)])


def ranked_by_class(images: Mapping[int, ImageDataset], *, seed: int) -> dict[int, list[tuple[int, int]]]:
    """Return the places ``(task, position)`` of every class's images, in the class's random order.

    The order of some tasks' images does not change when others are added.

    Args:
        images: the images by task.
        seed: seed of the order.
    """
    by_class: dict[int, list[tuple[int, int]]] = {}
    for task, some in images.items():
        for position, target in enumerate(some.targets):
            by_class.setdefault(target, []).append((task, position))
    # In domain streams a class gets more images with every task: each image has its own random rank, because a shuffle
    # would change the order of the earlier images.
    return {
        target: sorted(places, key=lambda place: random.Random(derived_seed(seed, "replay", target, *place)).random())
        for target, places in by_class.items()
    }


class Images(Dataset[tuple[Any, int]]):
    """Several sets of images as one data set.

    Args:
        parts: the sets.
    """

    def __init__(self, parts: Sequence[ImageDataset]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._places = [(part, index) for part in self.parts for index in range(len(part))]

    @property
    def targets(self) -> list[int]:
        """Global class id of every image."""
        return [target for part in self.parts for target in part.targets]

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images, three per pixel; all images of a part count as large as its first."""
        first = [(len(part), part.image(0)) for part in self.parts]
        return sum(3 * number * image.width * image.height for number, image in first)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        part, position = self._places[index]
        return part[position]


class ReplaySampler(DistributedSampler[tuple[int, int]]):
    """Add to every batch of a task as many images from memory.

    Yields ``(epoch, position)``; positions number the task's images, then those in memory. The memory is traversed
    repeatedly in a random order, from another start in every epoch and on every process.

    Args:
        current: order of the task's own images.
        num_current: number of the task's own images.
        num_memory: number of images in memory, at least one.
        batch_size: images of the task in a batch.
        seed: seed of the memory's order, already specific to the task.

    Example:
        >>> sampler = ReplaySampler(EpochSampler(range(3), seed=0), 3, 10, batch_size=2, seed=0)
        >>> [position >= 3 for _, position in sampler]
        [False, False, True, True, False, True, True]
    """

    def __init__(self, current: EpochSampler, num_current: int, num_memory: int, *, batch_size: int, seed: int) -> None:
        super().__init__(
            cast("Dataset[Any]", range(num_current)), num_replicas=current.num_replicas, rank=current.rank, seed=seed
        )
        self.current = current
        self.num_current = num_current
        self.num_memory = num_memory
        self.batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch."""
        super().set_epoch(epoch)
        self.current.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        memory = self._memory()
        keys = list(self.current)
        for start in range(0, len(keys), self.batch_size):
            yield from keys[start : start + self.batch_size]
            yield from ((self.epoch, next(memory)) for _ in range(self.batch_size))

    def __len__(self) -> int:
        num_batches = -(-len(self.current) // self.batch_size)
        return len(self.current) + num_batches * self.batch_size

    def _memory(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "memory", self.epoch, self.rank))
        while True:
            for position in torch.randperm(self.num_memory, generator=generator).tolist():
                yield self.num_current + position
