"""Adaptation data: the images that a rule, router or calibration may look at beside each task's training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from clmerge.streams.cache import CachedImages, cached
from clmerge.streams.images import ImageDataset, subset
from clmerge.streams.plan import Split
from clmerge.streams.replay import Images, ranked_by_class
from clmerge.streams.splits import derived_seed

if TYPE_CHECKING:
    from clmerge.streams.datamodule import StreamDataModule
    from clmerge.streams.stream import Stream

Source: TypeAlias = Literal["val", "buffer", "current", "test"]

_SPLITS: dict[Source, Split] = {"val": "val", "buffer": "train", "current": "train", "test": "test"}


@dataclass(frozen=True)
class AdaptationBatch:
    """Images of one task, for adapting.

    Attributes:
        images: ``(B, channels, height, width)``, under the evaluation transform, on the CPU.
        labels: Global class ids ``(B,)``; None where labels may not be seen.
        task: Index of the task.
        positions: Positions of the images among the task's, ``(B,)``.
    """

    images: Tensor
    labels: Tensor | None
    task: int
    positions: Tensor


@dataclass(frozen=True)
class AdaptationData:
    """One declared source of images for everything that adapts a merged model.

    ``str()`` of it is the model's ``data`` in results.json and stands beside its accuracies in every table.

    Args:
        source: ``val`` (validation images of all tasks so far), ``buffer`` (training images that are kept of every
            class), ``current`` (training images of the latest task), or ``test``: the images that the model is scored
            on (transductive), which published methods adapt on and nothing here does unless it is named.
        per_class: Images of every class, drawn by the data module's seed as replay draws them; default all, which a
            buffer refuses.
        labels: Whether what adapts may see labels.
        batch_size: Images per step and task.

    Raises:
        ValueError: If a number is out of range, or a buffer has no size.

    Example:
        >>> str(AdaptationData()), str(AdaptationData("buffer", per_class=10, labels=True))
        ('val(unlabelled)', 'buffer(10 per class, labelled)')
        >>> str(AdaptationData("test"))
        'test(transductive, unlabelled)'
    """

    source: Source = "val"
    per_class: int | None = None
    labels: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.source not in _SPLITS:
            raise ValueError(f"expected adaptation.source to be one of {list(_SPLITS)}, got {self.source!r}")
        if self.batch_size < 1 or (self.per_class is not None and self.per_class < 1):
            raise ValueError(
                "expected adaptation.batch_size and adaptation.per_class of 1 or more, got "
                f"{self.batch_size} and {self.per_class}"
            )
        if self.source == "buffer" and self.per_class is None:
            raise ValueError("expected adaptation.per_class, the images that a buffer keeps of every class, got none")

    def __str__(self) -> str:
        transductive = ["transductive"] if self.source == "test" else []
        number = [] if self.per_class is None else [f"{self.per_class} per class"]
        labels = "labelled" if self.labels else "unlabelled"
        return f"{self.source}({', '.join([*transductive, *number, labels])})"

    def told(self, *, labels: bool) -> str:
        """Return its name in the results of a model that reads labels or not, whether or not it may."""
        return str(replace(self, labels=labels))

    def check(self, stream: Stream, *, labels: bool = False) -> None:
        """Refuse a stream or a method that this data does not serve, before anything is computed.

        Args:
            stream: The stream.
            labels: Whether the method reads labels.

        Raises:
            ValueError: If the method needs labels that it may not see, or a task has no such images.
        """
        if labels and not self.labels:
            raise ValueError(f"expected labelled adaptation data, got {self}; allow them with adaptation.labels=true")
        for task in stream.tasks:
            if not len(stream.dataset(task.index, _SPLITS[self.source])):
                more = "; set stream.val_fraction above 0, or another adaptation.source" if self.source == "val" else ""
                raise ValueError(
                    f"expected adaptation images of every task, got {self} of a stream without "
                    f"{_SPLITS[self.source]} images of task {task.name}{more}"
                )

    def images(self, data: StreamDataModule, tasks: Sequence[int]) -> dict[int, ImageDataset]:
        """Return the images by task, under the evaluation transform.

        Args:
            data: Provides the stream's images.
            tasks: The tasks merged so far, the latest last.

        Returns:
            A data set with labels for every task that has images: the latest alone for ``current``.
        """
        transform = data.eval_transform
        wanted = tasks[-1:] if self.source == "current" else tasks
        found = {task: data.stream.dataset(task, _SPLITS[self.source], transform) for task in wanted}
        if self.per_class is not None:
            chosen: dict[int, list[int]] = {task: [] for task in found}
            for places in ranked_by_class(found, seed=data.seed).values():
                for task, position in places[: self.per_class]:
                    chosen[task].append(position)
            found = {task: subset(found[task], sorted(positions)) for task, positions in chosen.items()}
        return {task: images for task, images in found.items() if len(images)}

    def nbytes(self, data: StreamDataModule, tasks: Sequence[int]) -> int:
        """Return the bytes of the decoded images of earlier tasks that must be kept: 0 unless it is a buffer.

        Args:
            data: Provides the stream's images.
            tasks: The tasks merged so far.
        """
        return Images(list(self.images(data, tasks).values())).nbytes if self.source == "buffer" else 0

    def batches(self, data: StreamDataModule, tasks: Sequence[int], *, seed: int) -> Iterator[AdaptationBatch]:
        """Yield batches without end, each of one task, the tasks in turn.

        Every task's images are shuffled anew when all of them were seen; batches are a pure function of the images and
        the seed, equal on every process.

        Args:
            data: Provides the stream's images.
            tasks: The tasks merged so far, the latest last.
            seed: Seed of the order.

        Raises:
            ValueError: If there are no images.
        """
        found = self.images(data, tasks)
        if not found:
            raise ValueError(f"expected adaptation images, got none of {self} in stream {data.stream.name}")
        room = data.cache_mb * 2**20 // len(found)
        kept = {task: cached(images, room) or images for task, images in found.items()}
        orders = {task: _positions(len(images), seed, task) for task, images in found.items()}
        while True:
            for task, images in kept.items():
                yield self._batch(images, task, orders[task])

    def _batch(self, images: ImageDataset | CachedImages, task: int, order: Iterator[int]) -> AdaptationBatch:
        positions = [next(order) for _ in range(min(self.batch_size, len(images)))]
        items: list[tuple[Any, int]] = [images[position] for position in positions]
        labels = torch.tensor([target for _, target in items]) if self.labels else None
        return AdaptationBatch(torch.stack([image for image, _ in items]), labels, task, torch.tensor(positions))


def _positions(number: int, seed: int, task: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(derived_seed(seed, "adaptation", task))
    while True:
        yield from torch.randperm(number, generator=generator).tolist()
