"""Changes of images: what a trigger, a corruption or a domain makes of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from typing_extensions import override

from clmerge.settings import Configured

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageChange(Configured, ABC):
    """Turn an image into another one of the same size, before the backbone's transform.

    Subclasses keep their constructor arguments, and change an image in the same way whenever they see it.
    """

    @property
    def domain(self) -> str:
        """Name of the domain of images that are changed so."""
        return self.label

    @abstractmethod
    def __call__(self, image: Image, index: int) -> Image:
        """Return the changed image.

        Args:
            image: An RGB image; must not be changed.
            index: Its index in the data set.
        """


class Unchanged(ImageChange):
    """Leave images as they are: the domain of clean images."""

    name = "clean"

    @override
    def __call__(self, image: Image, index: int) -> Image:
        return image


class Rotation(ImageChange):
    """Rotate images about their centre, as in RotatedMNIST (arXiv 1508.07680); what comes in from outside is black.

    Args:
        degrees: Angle, counter-clockwise.
    """

    name = "rotated"

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    @property
    @override
    def domain(self) -> str:
        return f"{self.name}-{self.degrees:g}"

    @override
    def __call__(self, image: Image, index: int) -> Image:
        from PIL.Image import Resampling

        return image.rotate(self.degrees, resample=Resampling.BILINEAR)
