"""The layout of a stream's tasks, known before an image is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from clmerge.names import task_label
from clmerge.streams.sources import DataSource, LabelledImages

Split: TypeAlias = Literal["train", "val", "test"]
Transform: TypeAlias = Callable[[Any], Any]
Evaluation: TypeAlias = Literal["task_agnostic", "task_aware"]


@dataclass(frozen=True)
class Task:
    """One task, as known before its images are read.

    Attributes:
        index: position in the stream, from 0.
        name: short name, unique in the stream and safe in file names.
        classes: global class ids of the task, ascending.
        class_names: the classes' names, in the order of ``classes``.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    class_names: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name for readers, next to the number of the task."""
        return task_label(self.index, self.name, self.class_names, numbered=False)


@dataclass(frozen=True)
class SplitPlan:
    """One split of one task: positions in a source's images and the global class id of each."""

    images: LabelledImages
    indices: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class StreamPlan:
    """The layout of a stream, known once the labels of its sources are read.

    Attributes:
        tasks: the tasks in order.
        splits: per task, its splits by name.
        class_names: display names by global class id, all different.
        prompt_names: names to put into the prompts by global class id; a class may have several.
        sources: the data source whose templates a class uses, by global class id; None if there is none.
        held_out: tasks that a transform took out, each with its splits.
    """

    tasks: tuple[Task, ...]
    splits: tuple[dict[Split, SplitPlan], ...]
    class_names: tuple[str, ...]
    prompt_names: tuple[tuple[str, ...], ...]
    sources: tuple[DataSource | None, ...]
    held_out: tuple[tuple[Task, dict[Split, SplitPlan]], ...] = ()
