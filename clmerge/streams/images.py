"""The images of one task and split as a PyTorch data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.plan import SplitPlan, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageDataset(Dataset[tuple[Any, int]]):
    """Images of one task and split, labelled with global class ids.

    Holds no Avalanche object, so it is picklable and indexing has no overhead beyond the image itself.

    Args:
        plan: the images and their global class ids.
        transform: applied to the RGB PIL image; None returns the image unchanged.
        label: name of the images in messages.
    """

    def __init__(self, plan: SplitPlan, transform: Transform | None, *, label: str = "images") -> None:
        self.plan = plan
        self.transform = transform
        self.label = label

    @property
    def targets(self) -> list[int]:
        """Global class id of every image."""
        return list(self.plan.targets)

    def __len__(self) -> int:
        return len(self.plan.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.plan.targets[index]

    def where(self, index: int) -> str:
        """Return the origin of an image, such as its file."""
        return self.plan.images.where(self.plan.indices[index])

    def image(self, index: int) -> Image:
        """Return one image in mode RGB, before the transform.

        Raises:
            UnreadableImageError: if the image cannot be decoded; the message names the image and the task.
        """
        try:
            return self.plan.images.image(self.plan.indices[index])
        except UnreadableImageError as error:
            reason = str(error)
        except (ValueError, TypeError):  # not a damaged image: the source is configured wrong, and its message says how
            raise
        except Exception as error:  # raised by sources outside of clmerge: torchvision's, Avalanche's
            reason = f"expected an image, got {error or type(error).__name__} ({self.where(index)})"
        raise UnreadableImageError(f"{reason}, in the {self.label}")


def subset(images: ImageDataset, positions: Sequence[int]) -> ImageDataset:
    """Return some of the images.

    Args:
        images: the images.
        positions: their positions, in the order wanted.
    """
    plan = images.plan
    indices, targets = (tuple(values[p] for p in positions) for values in (plan.indices, plan.targets))
    return ImageDataset(SplitPlan(plan.images, indices, targets), images.transform, label=images.label)
