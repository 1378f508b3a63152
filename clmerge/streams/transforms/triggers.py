"""Triggers of backdoors: what is put on an image."""

from __future__ import annotations

import random
from abc import ABC
from typing import TYPE_CHECKING, Literal

from typing_extensions import override

from clmerge.streams.transforms.changes import ImageChange

if TYPE_CHECKING:
    from PIL.Image import Image

Corner = Literal["bottom-right", "bottom-left", "top-right", "top-left"]


class Trigger(ImageChange, ABC):
    """Put something on an image by which a backdoor recognises it. Subclasses keep their constructor arguments."""


class Patch(Trigger):
    """A square of one colour in a corner (BadNets, arXiv 1708.06733).

    Args:
        size: Side of the square as a share of the shorter side of the image, at least one pixel. BadNets' 3 of 32
            pixels are the default.
        corner: Which corner.
        grey: Its colour: 255 is white, 0 black.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, size: float = 3 / 32, corner: Corner = "bottom-right", grey: int = 255) -> None:
        if not 0 < size <= 1 or not 0 <= grey <= 255:
            raise ValueError(f"expected a size above 0 and up to 1 and grey in 0..255, got {size} and {grey}")
        self.size, self.corner, self.grey = size, corner, grey

    @override
    def __call__(self, image: Image, index: int) -> Image:
        side = max(1, round(self.size * min(image.size)))
        vertical, horizontal = self.corner.split("-")
        left = image.width - side if horizontal == "right" else 0
        top = image.height - side if vertical == "bottom" else 0
        found = image.copy()
        found.paste((self.grey,) * 3, (left, top, left + side, top + side))
        return found


class Blended(Trigger):
    """A pattern of random pixels over the whole image, faint enough to be overlooked (Chen et al., arXiv 1712.05526).

    The image becomes ``(1 - strength) image + strength pattern``; the pattern is the same for all images of one size.

    Args:
        strength: Share of the pattern; BackdoorBench's 0.2 is the default.
        seed: Seed of the pattern.

    Raises:
        ValueError: If the strength is out of range.
    """

    def __init__(self, strength: float = 0.2, seed: int = 0) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"expected a strength above 0 and up to 1, got {strength}")
        self.strength, self.seed = strength, seed

    @override
    def __call__(self, image: Image, index: int) -> Image:
        from PIL import Image as Pillow  # kept out of what only looks at layouts

        pixels = random.Random(self.seed).randbytes(3 * image.width * image.height)
        return Pillow.blend(image, Pillow.frombytes("RGB", image.size, pixels), self.strength)
