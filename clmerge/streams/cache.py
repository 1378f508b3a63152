"""Serve the evaluation images of several tasks as one data set, and cache them as tensors if they fit."""

from __future__ import annotations

import math
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clmerge.streams.images import ImageDataset

_SHARE_OF_DISK = 0.5


class CachedImages(Dataset[tuple[Tensor, int]]):
    """Transformed images held in memory.

    Args:
        images: ``(num_images, channels, height, width)``.
        targets: global class ids, length ``num_images``.
        on_disk: whether the images are in a memory-mapped file.
    """

    def __init__(self, images: Tensor, targets: list[int], *, on_disk: bool = False) -> None:
        self.images = images
        self.targets = targets
        self.on_disk = on_disk

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def cached(
    dataset: ImageDataset, max_bytes: int, file: Path | None = None, *, num_workers: int = 0
) -> CachedImages | None:
    """Transform all images once and keep the results, if they fit and the transform is not random.

    Args:
        dataset: images with their evaluation transform.
        max_bytes: available memory.
        file: file for images that do not fit into memory, if the disk has room (default: they are not kept).
        num_workers: processes that decode images for the file.

    Returns:
        The kept images; None if they do not fit, are not tensors of one shape, or the first one differs when it is
        transformed again.
    """
    if not len(dataset):
        return None
    first, again = dataset[0][0], dataset[0][0]
    if not isinstance(first, Tensor) or not torch.equal(first, again):
        return None
    shape = (len(dataset), *first.shape)
    size = first.nbytes * len(dataset)
    if size <= max_bytes:
        images, num_workers = first.new_empty(shape), 0
    # A mapped file takes disk space only when it is written, and a full disk would then kill the process.
    elif file is not None and size < shutil.disk_usage(file.parent).free * _SHARE_OF_DISK:
        images = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=first.dtype).view(shape)
    else:
        return None
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, generator=torch.Generator())
    for index, (image, _) in enumerate(loader):
        if image.shape != first.shape:
            return None
        images[index] = image
    return CachedImages(images, dataset.targets, on_disk=size > max_bytes)


class TaskImages(Dataset[tuple[Any, int, int]]):
    """Images of several tasks, each item ``(image, global class id, task)``.

    Args:
        parts: the images of each task.
        tasks: the task each part belongs to.

    Example:
        >>> part = CachedImages(torch.zeros(2, 1), [5, 6])
        >>> TaskImages([part, part], [0, 3])[2][1:]
        (5, 3)
    """

    def __init__(self, parts: Sequence[ImageDataset | CachedImages], tasks: Sequence[int]) -> None:
        self.parts = list(parts)
        self.tasks = list(tasks)
        self._ends: list[int] = []
        for part in self.parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(part))

    @property
    def in_memory(self) -> bool:
        """Whether all images are cached, so that none needs decoding."""
        return all(isinstance(part, CachedImages) for part in self.parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        part = bisect_right(self._ends, index)
        start = self._ends[part - 1] if part else 0
        image, target = self.parts[part][index - start]
        return image, target, self.tasks[part]
