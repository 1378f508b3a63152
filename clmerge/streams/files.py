"""Images in files: the common base of folder trees and file lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from clmerge.streams.decoding import open_image
from clmerge.streams.sources import LabelledImages

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FileImages(LabelledImages):
    """Images that are decoded on access.

    Args:
        paths: path of every image.
        targets: class id of every image, length of ``paths``.
    """

    def __init__(self, paths: Sequence[Path], targets: Sequence[int]) -> None:
        if len(paths) != len(targets):
            raise ValueError(f"expected one label per image, got {len(paths)} images and {len(targets)} labels")
        self.paths = list(paths)
        self.targets = list(targets)

    @override
    def image(self, index: int) -> Image:
        return open_image(self.paths[index])

    @override
    def where(self, index: int) -> str:
        return str(self.paths[index])

    def select(self, indices: Sequence[int]) -> FileImages:
        """Return the images at the given positions."""
        return FileImages([self.paths[i] for i in indices], [self.targets[i] for i in indices])


def read_lines(path: Path, what: str) -> list[str]:
    """Return the non-empty lines of a text file without surrounding blanks.

    Raises:
        RuntimeError: if there is no such file, or it is not UTF-8; the message says that ``what`` was expected.
    """
    if not path.is_file():
        raise RuntimeError(f"expected {what} at {path.absolute()}, found no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise RuntimeError(f"expected {what} in UTF-8 at {path.absolute()}, got other bytes ({error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
