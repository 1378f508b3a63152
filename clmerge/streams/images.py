"""The images of one task and split as a PyTorch data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from clmerge.streams.stream import SplitPlan, Transform


class ImageDataset(Dataset[tuple[Any, int]]):
    """Images of one task and split, labelled with global class ids.

    Holds no Avalanche object, so it is picklable and indexing costs nothing beyond the image itself.

    Args:
        plan: which images, and their global class ids.
        transform: applied to the RGB PIL image; None returns the image as it is.
    """

    def __init__(self, plan: SplitPlan, transform: Transform | None) -> None:
        self.plan = plan
        self.transform = transform

    @property
    def targets(self) -> list[int]:
        """Global class id of every image."""
        return list(self.plan.targets)

    def __len__(self) -> int:
        return len(self.plan.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.plan.images.image(self.plan.indices[index])
        return (image if self.transform is None else self.transform(image)), self.plan.targets[index]


def subset(images: ImageDataset, positions: Sequence[int]) -> ImageDataset:
    """Return some of the images.

    Args:
        images: the images.
        positions: which of them, in this order.
    """
    plan = images.plan
    indices, targets = (tuple(values[p] for p in positions) for values in (plan.indices, plan.targets))
    return ImageDataset(SplitPlan(plan.images, indices, targets), images.transform)
