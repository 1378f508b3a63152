"""Images in one NumPy archive, the layout of MedMNIST."""

from __future__ import annotations

import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from clmerge.streams.class_names import readable
from clmerge.streams.sources import ArrayImages, DataSource, LabelledImages, Templates

if TYPE_CHECKING:
    import numpy as np


class NpzSource(DataSource):
    """One ``.npz`` file in MedMNIST's layout.

    The file holds ``train_images`` and ``test_images`` (uint8, ``(num_images, height, width)`` grey or with a
    last axis of three), ``train_labels`` and ``test_labels`` (``(num_images,)`` or ``(num_images, 1)``). Optional
    are ``val_images`` and ``val_labels``, the validation split, and ``classes``, the class names.

    Args:
        path: the file.
        name: name of the data set, which selects its prompt templates (default: the file's name).
        names: class names by class id (default: ``classes`` of the file).
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        RuntimeError: if the file or one of its arrays is missing or damaged (when first needed).
        ValueError: if an array has the wrong shape or type, or there are no class names.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        names: list[str] | None = None,
        templates: Templates = None,
    ) -> None:
        self.path = Path(path).expanduser()
        super().__init__(name or self.path.stem, templates=templates)
        self._names = names

    @property
    @override
    def class_names(self) -> list[str]:
        return self._class_names

    @cached_property
    def _class_names(self) -> list[str]:
        if self._names is not None:
            return self._names
        found = self._arrays(["classes"])
        if not found:
            raise ValueError(f"expected class names, but {self.path} has no array 'classes': pass names=[...]")
        if found["classes"].ndim != 1:
            raise ValueError(
                f"expected one class name per class id in 'classes' of {self.path}, got an array of shape "
                f"{found['classes'].shape}"
            )
        return [readable(str(name)) for name in found["classes"]]

    def _arrays(self, keys: list[str]) -> dict[str, np.ndarray]:
        import numpy as np

        if not self.path.is_file():
            raise RuntimeError(f"expected an .npz file in MedMNIST's layout at {self.path.absolute()}, found none")
        try:
            # Without pickle an archive is plain numbers and cannot run code.
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in keys if key in archive}
        except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise RuntimeError(
                f"expected an .npz file of plain arrays at {self.path.absolute()}, got {error}"
            ) from error

    @override
    def _load(self, split: str) -> LabelledImages:
        keys = [f"{split}_images", f"{split}_labels"]
        found = self._arrays(keys)
        missing = [key for key in keys if key not in found]
        if missing:
            raise RuntimeError(f"expected arrays {keys} in {self.path}, found no {missing}")
        labels = found[keys[1]]
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1:
            raise ValueError(
                f"expected one label per image, {keys[1]} of shape (num_images,) or (num_images, 1), got "
                f"shape {labels.shape} in {self.path}"
            )
        if labels.dtype.kind not in "iu":
            raise ValueError(f"expected whole numbers as labels in {keys[1]} of {self.path}, got {labels.dtype}")
        return ArrayImages(found[keys[0]], labels.tolist(), origin=f"{keys[0]} of {self.path}")

    @override
    def _load_validation(self) -> LabelledImages | None:
        return self._load("val") if self._arrays(["val_labels"]) else None
