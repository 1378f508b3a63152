"""The base class of streams: tasks over one set of classes, and their images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

from clmerge.streams.overlap import require_disjoint
from clmerge.streams.plan import Evaluation, Split, SplitPlan, StreamPlan, Task, Transform
from clmerge.streams.transforms.transform import StreamTransform, check_tasks, class_id

if TYPE_CHECKING:
    from clmerge.streams.images import ImageDataset

_SPLIT_NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}


class Stream(ABC):
    """A sequence of tasks over one common set of classes.

    Building a stream reads no data; labels are read on first access to tasks, class names or images.

    Attributes:
        kind: Kind of the stream.
        evaluation: Default reading of the logits: whether all classes compete, or only those of the image's task.
    """

    kind: str = "stream"
    evaluation: Evaluation = "task_agnostic"
    _transforms: tuple[StreamTransform, ...] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name of the stream, safe in file names."""

    @abstractmethod
    def _build(self) -> StreamPlan:
        """Read the labels and lay out the tasks."""

    @cached_property
    def _plan(self) -> StreamPlan:
        plan = _told_apart(self._build())
        require_disjoint(plan)
        for transform in self._transforms:
            plan = transform.apply(plan)
        return plan

    def turned_into(self, transforms: Sequence[StreamTransform]) -> Self:
        """Return the stream, whose tasks are from now on what the transforms make of them, in their order.

        Args:
            transforms: The transforms; they replace earlier ones.
        """
        self.__dict__.pop("_plan", None)
        self._transforms = tuple(transforms)
        return self

    @property
    def tasks(self) -> list[Task]:
        """The tasks in order."""
        return list(self._plan.tasks)

    @property
    def class_names(self) -> list[str]:
        """Display names of all classes by global class id, all different."""
        return list(self._plan.class_names)

    @property
    def held_out(self) -> list[Task]:
        """Tasks that a transform has taken out of the stream, for probes; their indices count from 0."""
        return [task for task, _ in self._plan.held_out]

    def held_out_plan(self, task: int, split: Split) -> SplitPlan:
        """Return one split of a task that was taken out of the stream.

        Args:
            task: Its index among :attr:`held_out`.
            split: The split.
        """
        return self._plan.held_out[task][1][split]

    def class_id(self, target: int | str) -> int:
        """Return the global id of a class that is given by id or name.

        Raises:
            ValueError: if there is no such class.
        """
        return class_id(target, self.class_names)

    def check_tasks(self, tasks: Sequence[int], whose: str) -> None:
        """Refuse tasks that the stream does not have.

        Args:
            tasks: indices of tasks.
            whose: what the tasks are given for, for the message.

        Raises:
            ValueError: if there is no such task.
        """
        check_tasks(tasks, len(self._plan.tasks), whose)

    def templates_for(self, class_id: int) -> tuple[str, ...]:
        """Return the prompt templates of one class, ``{}`` stands for the class name.

        Raises:
            ValueError: if the class's data set has no templates and none were given.
        """
        source = self._plan.sources[class_id]
        if source is None:
            raise ValueError(
                f"expected prompt templates for class {class_id} ({self._plan.class_names[class_id]!r}), but "
                f"stream {self.name} has none: give it templates, or use a head that needs no text"
            )
        return source.templates

    @property
    def plain_sources(self) -> list[str]:
        """Names of the data sets whose prompts are the plain ones, because none were given and none are known."""
        sources = dict.fromkeys(source for source in self._plan.sources if source is not None)
        return [source.name for source in sources if source.has_plain_templates]

    @property
    def class_prompts(self) -> list[list[str]]:
        """Formatted prompts of every class by global class id."""
        return [
            [template.replace("{}", name) for name in names for template in self.templates_for(class_id)]
            for class_id, names in enumerate(self._plan.prompt_names)
        ]

    def dataset(self, task: int, split: Split, transform: Transform | None = None) -> ImageDataset:
        """Return the images of one task.

        Args:
            task: index of the task.
            split: "train", "val" (held out of the training data) or "test".
            transform: applied to each RGB PIL image (default: none).

        Raises:
            ValueError: if there is no such task or split.
        """
        plans = self._plan.splits
        if not 0 <= task < len(plans):
            raise ValueError(f"expected a task in 0..{len(plans) - 1} of stream {self.name}, got {task}")
        if split not in plans[task]:
            raise ValueError(f"expected a split in {sorted(plans[task])}, got {split!r}")
        from clmerge.streams.images import ImageDataset  # imports torch

        label = f"{_SPLIT_NAMES[split]} images of task {task + 1}, {self._plan.tasks[task].label}"
        return ImageDataset(plans[task][split], transform, label=label)

    def keep(self, task: int, split: Split, positions: Sequence[int]) -> None:
        """Restrict one split of a task to some of its images.

        Args:
            task: index of the task.
            split: the split.
            positions: the images that stay, as positions in ``dataset(task, split)``.
        """
        plan = self._plan.splits[task][split]
        indices, targets = (tuple(values[p] for p in positions) for values in (plan.indices, plan.targets))
        self._plan.splits[task][split] = SplitPlan(plan.images, indices, targets)


def _told_apart(plan: StreamPlan) -> StreamPlan:
    """Number class names that repeat, as ``crane`` does in ImageNet, so that a name denotes one class everywhere."""
    taken: set[str] = set()
    names: list[str] = []
    for name in plan.class_names:
        own, count = name, 1
        while own in taken or (count > 1 and own in plan.class_names):
            count += 1
            own = f"{name}-{count}"
        taken.add(own)
        names.append(own)
    tasks = [replace(task, class_names=tuple(names[class_id] for class_id in task.classes)) for task in plan.tasks]
    return replace(plan, class_names=tuple(names), tasks=tuple(tasks))
