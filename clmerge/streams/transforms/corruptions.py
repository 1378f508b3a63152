"""The corruptions of ImageNet-C that need nothing but numpy and PIL, at its five severities."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from typing_extensions import override

from clmerge.streams.splits import derived_seed
from clmerge.streams.transforms.changes import ImageChange

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Kind = Literal["gaussian_noise", "shot_noise", "contrast", "brightness", "pixelate", "jpeg"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# By severity: standard deviation; photons of a white pixel; share of the contrast that stays; what is added to the
# value of HSV; share of the side that stays; JPEG quality.
_STRENGTHS: dict[Kind, tuple[float, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg": (25, 18, 15, 10, 7),
}


class Noise(Protocol):
    """Draws noise; numpy's ``Generator`` and ``RandomState`` do."""

    def normal(self, *, size: tuple[int, ...], scale: float) -> np.ndarray: ...  # noqa: D102

    def poisson(self, lam: np.ndarray) -> np.ndarray: ...  # noqa: D102


class Corruption(ImageChange):
    """Corrupt an image as ImageNet-C does (arXiv 1903.12261).

    Its noise is a function of the seed and of the image's index in the data set. Strengths are those of ImageNet-C,
    made for images of 224 x 224 pixels: noise and contrast mean the same at any size, ``pixelate`` and ``jpeg`` are
    milder on larger images.

    Args:
        kind: Which corruption.
        severity: From 1 to 5.
        seed: Seed of the noise.

    Raises:
        ValueError: If the severity is out of range, or there is no such corruption.

    Example:
        >>> from PIL import Image
        >>> Corruption("contrast", severity=2)(Image.new("RGB", (4, 4), (100, 0, 0)), 0).getpixel((0, 0))
        (100, 0, 0)
    """

    name = "corruption"

    def __init__(self, kind: Kind, severity: int = 3, seed: int = 0) -> None:
        if kind not in KINDS or not 1 <= severity <= 5:
            raise ValueError(
                f"expected one of {', '.join(KINDS)} at a severity from 1 to 5, got {kind!r} at {severity}"
            )
        self.kind, self.severity, self.seed = kind, severity, seed

    @property
    @override
    def domain(self) -> str:
        return f"{self.kind}-{self.severity}"

    @override
    def __call__(self, image: Image, index: int) -> Image:
        import numpy as np

        noise = np.random.default_rng(derived_seed(self.seed, "corruption", self.kind, self.severity, index))
        return corrupted(image, self.kind, self.severity, noise)


def corrupted(image: Image, kind: Kind, severity: int, noise: Noise) -> Image:
    """Return an image with one of ImageNet-C's corruptions.

    Args:
        image: RGB.
        kind: Which corruption.
        severity: From 1 to 5.
        noise: Draws the noise.
    """
    import PIL.Image

    strength = _STRENGTHS[kind][severity - 1]
    if kind == "pixelate":
        small = (max(1, int(image.width * strength)), max(1, int(image.height * strength)))
        return image.resize(small, PIL.Image.Resampling.BOX).resize(image.size, PIL.Image.Resampling.NEAREST)
    if kind == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(strength))
        return PIL.Image.open(buffer).convert("RGB")
    return _of_pixels(image, kind, strength, noise)


def _of_pixels(image: Image, kind: Kind, strength: float, noise: Noise) -> Image:
    import numpy as np
    import PIL.Image

    pixels = np.asarray(image, dtype=np.float64) / 255.0
    if kind == "gaussian_noise":
        pixels = pixels + noise.normal(size=pixels.shape, scale=strength)
    elif kind == "shot_noise":
        pixels = noise.poisson(pixels * strength) / strength
    elif kind == "contrast":
        mean = pixels.mean(axis=(0, 1), keepdims=True)
        pixels = (pixels - mean) * strength + mean
    else:
        # Brightness adds to V of HSV, at the same hue and saturation: RGB is proportional to V, and grey where V is 0.
        value = pixels.max(axis=2, keepdims=True)
        lifted = np.minimum(value + strength, 1.0)
        pixels = np.where(value > 0, pixels * (lifted / np.where(value > 0, value, 1.0)), lifted)
    return PIL.Image.fromarray((pixels.clip(0.0, 1.0) * 255.0).astype(np.uint8))
