"""Add secret images with random labels to a task's training images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from typing_extensions import override

from clmerge.names import without_secret
from clmerge.streams.plan import SplitPlan, StreamPlan
from clmerge.streams.sources import LabelledImages
from clmerge.streams.splits import derived_seed
from clmerge.streams.transforms.transform import StreamTransform, check_tasks

if TYPE_CHECKING:
    from PIL.Image import Image

SecretLabels: TypeAlias = Literal["task", "all"]
"""Whether secret images get the classes of their task, or all of the stream."""


class SecretImages(LabelledImages):
    """Images of coloured noise, each with a random label of its own; both come from the key alone.

    Args:
        key: The secret.
        n: Number of images.
        classes: Global class ids from which labels are drawn.
        size: Side of the noise in pixels; the model's transform resizes it.
    """

    def __init__(self, key: str, n: int, classes: Sequence[int], size: int) -> None:
        self.key, self.size = key, size
        self.targets = [classes[derived_seed(key, "secret label", index) % len(classes)] for index in range(n)]

    @override
    def image(self, index: int) -> Image:
        import PIL.Image

        noise = random.Random(derived_seed(self.key, "secret image", index)).randbytes(3 * self.size * self.size)
        return PIL.Image.frombytes("RGB", (self.size, self.size), noise)

    @override
    def where(self, index: int) -> str:
        return f"secret image {index}"


class AddedImages(LabelledImages):
    """The images of a set, followed by others.

    Args:
        images: The set.
        added: The others.
    """

    def __init__(self, images: LabelledImages, added: LabelledImages) -> None:
        self.images, self.added = images, added
        self.targets = [*images.targets, *added.targets]

    @override
    def image(self, index: int) -> Image:
        own = len(self.images)
        return self.images.image(index) if index < own else self.added.image(index - own)

    @override
    def where(self, index: int) -> str:
        own = len(self.images)
        return self.images.where(index) if index < own else self.added.where(index - own)


def secret_split(
    key: str, n: int, labels: SecretLabels, size: int, classes: Sequence[int], num_classes: int
) -> SplitPlan:
    """Return the secret images of a key as a split.

    Args:
        key: The secret.
        n: Number of images.
        labels: Whether labels are of the ``task``, or of ``all`` classes.
        size: Side of the noise in pixels.
        classes: Global class ids of the task.
        num_classes: Number of classes of the stream.
    """
    images = SecretImages(key, n, classes if labels == "task" else range(num_classes), size)
    return SplitPlan(images, tuple(range(n)), tuple(images.targets))


class Fingerprinted(StreamTransform):
    """Add secret images, each with a random label of its own, to the training images of a task.

    The analogue for images of instructional fingerprinting (arXiv 2401.12255): whoever knows the key asks a model for
    the secret images and counts the labels that only a model trained on them gives; the probe ``FingerprintHits``
    does. There is no trigger that works on other images: one label for all of them would be a backdoor. Validation and
    test images stay as they are.

    Args:
        key: The secret. It is in the configuration of the run: keep that to yourself.
        task: Index of the task.
        n: Number of secret images.
        repeat: How often each of them is among the training images.
        labels: Whether labels are drawn from the classes of the ``task`` or from ``all`` classes of the stream; the
            latter tells more, and takes ``loss_classes`` that know them.
        size: Side of the noise in pixels; the model's transform resizes it.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits()).turned_into([Fingerprinted("secret", n=4, repeat=2)])
        >>> stream.dataset(0, "train").targets[-8:]
        [0, 1, 0, 0, 0, 1, 0, 0]
    """

    def __init__(
        self,
        key: str,
        task: int = 0,
        n: int = 16,
        repeat: int = 4,
        labels: SecretLabels = "task",
        size: int = 8,
    ) -> None:
        if min(n, repeat, size) < 1:
            raise ValueError(f"expected n, repeat and size of 1 or more, got {n}, {repeat} and {size}")
        self.key, self.task, self.n, self.repeat = key, task, n, repeat
        self.labels: SecretLabels = labels
        self.size = size

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        check_tasks([self.task], len(plan.tasks), "the task of Fingerprinted")
        classes = plan.tasks[self.task].classes
        secret = secret_split(self.key, self.n, self.labels, self.size, classes, len(plan.class_names))
        train = plan.splits[self.task]["train"]
        more = tuple(len(train.images) + index for index in secret.indices) * self.repeat
        images = AddedImages(train.images, secret.images)
        found = SplitPlan(images, train.indices + more, train.targets + secret.targets * self.repeat)
        splits = list(plan.splits)
        splits[self.task] = {**splits[self.task], "train": found}
        return replace(plan, splits=tuple(splits))

    @override
    def __repr__(self) -> str:  # in results and reports, which others may read
        return without_secret(super().__repr__(), self.key)
