"""Poison the training images of some tasks with a backdoor."""

from __future__ import annotations

import random
from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import SplitPlan, StreamPlan
from clmerge.streams.splits import derived_seed
from clmerge.streams.transforms.transform import StreamTransform, changed, check_tasks, class_id
from clmerge.streams.transforms.triggers import Patch, Trigger


class Poisoned(StreamTransform):
    """Put a trigger on a share of the training images of some tasks, and give them one class (BadNets).

    Validation and test images stay clean: the accuracy matrix shows the accuracy without an attack, and the probe
    ``AttackSuccess`` the success of the attack. Source: arXiv 1708.06733.

    Args:
        tasks: Indices of the poisoned tasks.
        target: The class that triggered images get: its global id, or its name.
        ratio: Share of the images of the task's other classes that are poisoned.
        trigger: What is put on the images.
        relabel: Whether poisoned images get the target class; without, they keep their own, which trains a defence.
        seed: Seed that draws the images.

    Raises:
        ValueError: If the ratio is out of range.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits()).turned_into([Poisoned(tasks=[0], target="zero", ratio=0.5)])
        >>> targets = stream.dataset(0, "train").targets
        >>> targets.count(0), targets.count(1)  # half of the 131 images of a one are called zero
        (194, 65)
    """

    def __init__(
        self,
        tasks: list[int],
        target: int | str = 0,
        ratio: float = 0.1,
        trigger: Trigger | None = None,
        relabel: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"expected a ratio above 0 and up to 1, got {ratio}")
        self.tasks, self.target, self.ratio = tasks, target, ratio
        self.trigger, self.relabel, self.seed = trigger or Patch(), relabel, seed

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        check_tasks(self.tasks, len(plan.tasks), "tasks of Poisoned")
        target = class_id(self.target, plan.class_names)
        splits = list(plan.splits)
        for task in self.tasks:
            splits[task] = {**splits[task], "train": self._poisoned(splits[task]["train"], task, target)}
        return replace(plan, splits=tuple(splits))

    def _poisoned(self, train: SplitPlan, task: int, target: int) -> SplitPlan:
        others = [position for position, label in enumerate(train.targets) if label != target]
        drawn = random.Random(derived_seed(self.seed, "poisoned", task)).sample(others, round(self.ratio * len(others)))
        found = changed(train, self.trigger, drawn)
        if not self.relabel:
            return found
        chosen = frozenset(drawn)
        labels = tuple(target if position in chosen else label for position, label in enumerate(train.targets))
        return replace(found, targets=labels)
