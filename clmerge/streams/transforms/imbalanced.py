"""Make some classes rare in training."""

from __future__ import annotations

import random
from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import SplitPlan, StreamPlan
from clmerge.streams.splits import derived_seed
from clmerge.streams.transforms.transform import StreamTransform


class Imbalanced(StreamTransform):
    """Keep fewer and fewer training images from the first class of the stream to the last (long-tailed data).

    Class i of C keeps the share ``factor ** (-i / (C - 1))`` of its images, at least one: the first all of them, the
    last one in ``factor`` (Cui et al., arXiv 1901.05555). Validation and test images stay.

    Args:
        factor: How much rarer the last class is than the first.
        seed: Seed that draws the images.

    Raises:
        ValueError: If the factor is below 1.

    Example:
        >>> from collections import Counter
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits(), num_tasks=1).turned_into([Imbalanced(factor=10)])
        >>> counts = Counter(stream.dataset(0, "train").targets)
        >>> counts[0], counts[9]
        (128, 13)
    """

    def __init__(self, factor: float = 10.0, seed: int = 0) -> None:
        if not 1 <= factor < float("inf"):
            raise ValueError(f"expected a factor of 1 or more, got {factor}")
        self.factor, self.seed = factor, seed

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        splits = [
            {**parts, "train": self._fewer(parts["train"], task, len(plan.class_names))}
            for task, parts in enumerate(plan.splits)
        ]
        return replace(plan, splits=tuple(splits))

    def _fewer(self, train: SplitPlan, task: int, num_classes: int) -> SplitPlan:
        kept: list[int] = []
        for label in sorted(set(train.targets)):
            positions = [position for position, own in enumerate(train.targets) if own == label]
            share = self.factor ** (-label / max(1, num_classes - 1))
            draw = random.Random(derived_seed(self.seed, "imbalanced", task, label))
            kept += draw.sample(positions, max(1, round(share * len(positions))))
        kept.sort()
        return SplitPlan(train.images, tuple(train.indices[p] for p in kept), tuple(train.targets[p] for p in kept))
