"""Decode image files of any mode to eight-bit RGB, without clipping values or showing transparent pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_TIFF_BITS = 258
# Formats whose mode "I" holds 16-bit values.
_SIXTEEN_BITS = ("PNG", "PPM")


class UnreadableImageError(RuntimeError):
    """Raised for an image that cannot be decoded; the message names the image and the reason.

    Args:
        message: the message. A worker process passes its whole traceback, of which the last message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def open_image(path: Path) -> Image:
    """Decode an image file, rotated by its EXIF orientation; of several frames or pages, the first.

    Returns:
        An image of mode RGB.

    Raises:
        UnreadableImageError: if there is no such file, or it holds no image that `as_rgb` can convert.
    """
    try:
        return _decode(path)
    # Damaged files raise almost any error: OSError, SyntaxError, struct.error, zlib.error, DecompressionBombError.
    except Exception as error:
        raise UnreadableImageError(f"expected an image in {path}, got {_what_is_there(path, error)}") from error


def decode_image(data: bytes, where: str) -> Image:
    """Decode the bytes of an image file as `open_image` does.

    Args:
        data: content of the file.
        where: its origin, for messages.

    Raises:
        UnreadableImageError: if the bytes are no image that `as_rgb` can convert.
    """
    try:
        return _decode(io.BytesIO(data))
    except Exception as error:
        found = (" ".join(str(error).split()) or type(error).__name__) if data else "no bytes"
        raise UnreadableImageError(f"expected an image in {where}, got {found}") from error


def _decode(file: Path | io.BytesIO) -> Image:
    import PIL.Image
    from PIL import ImageOps

    with PIL.Image.open(file) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return as_rgb(image)


def as_rgb(image: Image) -> Image:
    """Return an image in mode RGB.

    16-bit grey (modes I;16 and, from PNG and PGM files, I) is scaled to 8 bits, so that 65535 becomes 255; Pillow's own
    conversion clips values above 255. Transparent pixels are blended with white; Pillow's own conversion shows their
    stored colour, often black. CMYK, palettes and one-bit images are converted as Pillow does it.

    Args:
        image: an image of any mode.

    Raises:
        ValueError: if the range of its values is not known (32-bit integers or floats).
    """
    import PIL.Image

    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS):
        return _from_sixteen_bits(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise ValueError(f"pixels that are {kind}, of which no value is known to be white: save it with 8 or 16 bits")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = PIL.Image.new("RGBA", layers.size, "white")
        return PIL.Image.alpha_composite(white, layers).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bits(image: Image) -> Image:
    import numpy as np
    import PIL.Image

    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS, (16,))
    top = 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1
    values = np.asarray(image).astype(np.float64).clip(0, top)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = top - values
    return PIL.Image.fromarray((values * (255.0 / top)).round().astype(np.uint8)).convert("RGB")


def _what_is_there(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return "no such file"
    if path.is_file() and not path.stat().st_size:
        return "an empty file"
    return " ".join(str(error).split()) or type(error).__name__
