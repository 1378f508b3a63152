"""The contract of a data source: one labelled image data set with a train and a test split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from typing_extensions import override

from clmerge.streams.decoding import decode_image

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Templates: TypeAlias = list[str] | str | None


class LabelledImages(ABC):
    """Map-style access to RGB images and their labels.

    Attributes:
        targets: class id of every image, known without decoding an image.
    """

    targets: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def image(self, index: int) -> Image:
        """Return image ``index`` in mode RGB."""

    def where(self, index: int) -> str:
        """Return the origin of image ``index``, such as its file."""
        return f"image {index}"

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.image(index), self.targets[index]


class ArrayImages(LabelledImages):
    """Images held in one uint8 array.

    Args:
        images: ``(num_images, height, width)`` grey or ``(num_images, height, width, 3)`` RGB, uint8.
        targets: class id of every image, length ``num_images``.
        origin: origin of the array, for messages (default: not given).

    Raises:
        ValueError: if the array has another shape or type, or the lengths differ.
    """

    def __init__(self, images: np.ndarray, targets: Sequence[int], *, origin: str = "") -> None:
        self.origin = f" of {origin}" if origin else ""
        grey = images.ndim == 3
        if str(images.dtype) != "uint8" or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
            raise ValueError(
                "expected uint8 images, (num_images, height, width) or (num_images, height, width, 3), "
                f"got {images.dtype} of shape {images.shape}{self.origin}"
            )
        if len(images) != len(targets):
            raise ValueError(
                f"expected one label per image, got {len(images)} images{self.origin} and {len(targets)} labels"
            )
        self.images = images
        self.targets = [int(target) for target in targets]

    @override
    def image(self, index: int) -> Image:
        import PIL.Image

        return PIL.Image.fromarray(self.images[index]).convert("RGB")

    @override
    def where(self, index: int) -> str:
        return f"image {index}{self.origin}"


class EncodedImages(LabelledImages):
    """Images that are encoded as files are, such as JPEG, but are no files of their own."""

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """Return the bytes of image ``index`` before decoding."""

    @override
    def image(self, index: int) -> Image:
        return decode_image(self.encoded(index), self.where(index))


class ImageSubset(LabelledImages):
    """A selection of another set's images.

    Args:
        images: the set to select from.
        indices: positions in ``images``, in the order wanted.
    """

    def __init__(self, images: LabelledImages, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = list(indices)
        self.targets = [images.targets[index] for index in self.indices]

    @override
    def image(self, index: int) -> Image:
        return self.images.image(self.indices[index])

    @override
    def where(self, index: int) -> str:
        return self.images.where(self.indices[index])


class DataSource(ABC):
    """One labelled image data set.

    Building a source reads nothing; a property or split is read on first access, and kept.

    Args:
        name: name of the data set, which also selects its prompt templates.
        templates: prompt templates with ``{}`` for the class name, or the name of the data set whose
            templates to use ("generic" for the plain ``a photo of a {}.``). Default: those of the data set
            itself, or the plain one where it has none.
    """

    def __init__(self, name: str, *, templates: Templates = None) -> None:
        self.name = name
        self._templates = templates

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Readable class names by class id."""

    @property
    def prompt_names(self) -> list[tuple[str, ...]]:
        """Names to put into the prompts by class id; several if the protocol has synonyms."""
        return [(name,) for name in self.class_names]

    @abstractmethod
    def _load(self, split: str) -> LabelledImages:
        """Open the split "train" or "test"."""

    def _load_validation(self) -> LabelledImages | None:
        """Open the data set's own validation split, if it has one."""
        return None

    def train(self) -> LabelledImages:
        """Return the training images."""
        return self._train

    def test(self) -> LabelledImages:
        """Return the test images."""
        return self._test

    def val(self) -> LabelledImages | None:
        """Return the data set's own validation images; None if they must be cut from the training images."""
        return self._val

    @cached_property
    def _train(self) -> LabelledImages:
        return self._checked("train", self._load("train"))

    @cached_property
    def _test(self) -> LabelledImages:
        return self._checked("test", self._load("test"))

    @cached_property
    def _val(self) -> LabelledImages | None:
        images = self._load_validation()
        return None if images is None else self._checked("val", images)

    def _checked(self, split: str, images: LabelledImages) -> LabelledImages:
        num_classes = len(self.class_names)
        for index, target in enumerate(images.targets):
            if not 0 <= target < num_classes:
                raise ValueError(
                    f"expected labels in 0..{num_classes - 1} ({num_classes} class names), got {target} for "
                    f"{images.where(index)} in the {split} split of {self.name}"
                )
        return images

    @property
    def has_plain_templates(self) -> bool:
        """Whether the prompts are the plain ones because none were given and none are known for the data set."""
        from clmerge.models.templates import has_templates

        return self._templates is None and not has_templates(self.name)

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates of this data set, ``{}`` stands for the class name.

        Raises:
            ValueError: if the data set whose templates to use is not known, or a template has no place for the name.
        """
        from clmerge.models.templates import GENERIC, check_template, prompt_templates

        if self.has_plain_templates:
            return GENERIC
        if isinstance(self._templates, list):
            return tuple(check_template(template) for template in self._templates)
        return prompt_templates(self._templates or self.name)
