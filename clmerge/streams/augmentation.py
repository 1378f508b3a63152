"""Random changes of training images, before the backbone's own transform brings them to its size and colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clmerge.streams.plan import Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class Augmentation:
    """Transforms of pictures, one after another, then the backbone's transform for evaluation.

    Args:
        steps: torchvision's v2 transforms, each from a picture to a picture.
        finish: transform from a picture to the backbone's input; default none.

    Raises:
        ValueError: when a step refuses its settings, at the first image.
        TypeError: when a step returns anything but a picture, at the first image.

    Example:
        >>> import PIL.Image
        >>> from torchvision.transforms import v2
        >>> flip = Augmentation([v2.RandomHorizontalFlip(p=1.0)], lambda image: image.getpixel((0, 0)))
        >>> image = PIL.Image.new("L", (2, 1))
        >>> image.putpixel((1, 0), 255)
        >>> flip(image)
        255
    """

    def __init__(self, steps: Sequence[Transform], finish: Transform | None) -> None:
        self.steps = list(steps)
        self.finish = finish

    def __call__(self, image: Image) -> Any:
        """Return the backbone's input of a picture."""
        import PIL.Image

        for step in self.steps:
            try:
                image = step(image)
            except (ValueError, TypeError, RuntimeError) as error:
                raise ValueError(f"expected settings that {step} of data.augmentation accepts, got: {error}") from error
            if not isinstance(image, PIL.Image.Image):
                raise TypeError(
                    f"expected a step of data.augmentation that returns a picture, got a {type(image).__name__} from "
                    f"{type(step).__name__}: leave it out, the backbone's transform makes tensors of the pictures"
                )
        return image if self.finish is None else self.finish(image)
