"""Give a share of the training images a wrong label."""

from __future__ import annotations

import random
from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import SplitPlan, StreamPlan
from clmerge.streams.splits import derived_seed
from clmerge.streams.transforms.transform import StreamTransform, check_tasks


class LabelNoise(StreamTransform):
    """Give a share of the training images another class of their task, every other one with equal chance.

    Symmetric label noise (arXiv 1804.06872). Validation and test labels stay right.

    Args:
        ratio: Share of a task's training images that get a wrong label.
        tasks: Indices of the tasks; default all.
        seed: Seed that draws images and labels.

    Raises:
        ValueError: If the ratio is out of range.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits()).turned_into([LabelNoise(ratio=1.0)])
        >>> wrong = stream.dataset(0, "train").targets
        >>> right = ClassIncremental(SklearnDigits()).dataset(0, "train").targets
        >>> sum(a + b for a, b in zip(wrong, right)) == len(right)  # every zero is called one, and every one zero
        True
    """

    def __init__(self, ratio: float = 0.2, tasks: list[int] | None = None, seed: int = 0) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"expected a ratio above 0 and up to 1, got {ratio}")
        self.ratio, self.tasks, self.seed = ratio, tasks, seed

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        check_tasks(self.tasks or (), len(plan.tasks), "tasks of LabelNoise")
        splits = list(plan.splits)
        for task in range(len(splits)) if self.tasks is None else self.tasks:
            splits[task] = {**splits[task], "train": self._noisy(splits[task]["train"], plan, task)}
        return replace(plan, splits=tuple(splits))

    def _noisy(self, train: SplitPlan, plan: StreamPlan, task: int) -> SplitPlan:
        classes = plan.tasks[task].classes
        if len(classes) < 2:
            raise ValueError(
                f"expected two classes or more in a task of LabelNoise, got one in {plan.tasks[task].name}"
            )
        draw = random.Random(derived_seed(self.seed, "label noise", task))
        labels = list(train.targets)
        for position in draw.sample(range(len(labels)), round(self.ratio * len(labels))):
            labels[position] = draw.choice([label for label in classes if label != labels[position]])
        return SplitPlan(train.images, train.indices, tuple(labels))
