"""Stream transforms: what the data of a stream is turned into before anything is trained on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from typing_extensions import override

from clmerge.settings import Configured
from clmerge.streams.plan import SplitPlan, StreamPlan
from clmerge.streams.sources import LabelledImages

if TYPE_CHECKING:
    from PIL.Image import Image

Change = Callable[["Image", int], "Image"]
"""Turns an RGB image, and its index in the data set, into another RGB image of the same size."""


class StreamTransform(Configured, ABC):
    """Turn the tasks of a stream into others: poisoned, corrupted, fewer images, tasks held out.

    It works on the layout of the stream, before an image is read, and is a pure function of its settings and of the
    layout: a resumed run sees the same images. Subclasses keep every constructor argument under its own name.
    """

    @abstractmethod
    def apply(self, plan: StreamPlan) -> StreamPlan:
        """Return the new layout.

        Args:
            plan: The tasks, their images and the classes; must not be changed.

        Raises:
            ValueError: If the stream has no such task or class.
        """


class ChangedImages(LabelledImages):
    """The images of another set, some of them changed.

    Args:
        images: The other set.
        change: What changes an image.
        only: Positions of the images to change; default all.
    """

    def __init__(self, images: LabelledImages, change: Change, only: Collection[int] | None = None) -> None:
        self.images, self.change = images, change
        self.only = None if only is None else frozenset(only)
        self.targets = images.targets

    @override
    def image(self, index: int) -> Image:
        image = self.images.image(index)
        return self.change(image, index) if self.only is None or index in self.only else image

    @override
    def where(self, index: int) -> str:
        return self.images.where(index)


def changed(plan: SplitPlan, change: Change, positions: Sequence[int] | None = None) -> SplitPlan:
    """Return a split whose images are changed.

    Args:
        plan: The split.
        change: What changes an image.
        positions: Positions in the split of the images to change; default all.
    """
    only = None if positions is None else {plan.indices[position] for position in positions}
    return SplitPlan(ChangedImages(plan.images, change, only), plan.indices, plan.targets)


def check_tasks(tasks: Sequence[int], num_tasks: int, whose: str) -> None:
    """Refuse tasks that a stream does not have.

    Args:
        tasks: Indices of tasks.
        num_tasks: Number of tasks of the stream.
        whose: What the tasks are given for, for the message.

    Raises:
        ValueError: If there is no such task.
    """
    if wrong := [task for task in tasks if not 0 <= task < num_tasks]:
        raise ValueError(f"expected {whose} to be in 0..{num_tasks - 1}, the tasks of the stream, got {wrong[0]}")


def class_id(target: int | str, class_names: Sequence[str]) -> int:
    """Return the global id of a class that is given by id or name.

    Args:
        target: Id or name.
        class_names: Names of all classes.

    Raises:
        ValueError: If there is no such class.
    """
    if isinstance(target, str) and target in class_names:
        return list(class_names).index(target)
    if isinstance(target, int) and 0 <= target < len(class_names):
        return target
    known = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
    raise ValueError(f"expected a class of the stream (0 to {len(class_names) - 1}, or one of {known}), got {target!r}")
