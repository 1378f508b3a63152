"""Leave a few images of every class to train on."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import Split, SplitPlan, StreamPlan
from clmerge.streams.splits import derived_seed
from clmerge.streams.transforms.transform import StreamTransform

_MOST_VALIDATION = 4  # validation images of a class in CoOp's protocol


class FewShot(StreamTransform):
    """Keep ``shots`` training images of every class of a task, and min(4, shots) validation images.

    The protocol of CoOp (arXiv 2109.01134): 1, 2, 4, 8 and 16 shots, seeds 1, 2 and 3, all test images. A class with
    fewer images keeps all of them.

    Args:
        shots: Training images of every class.
        seed: Seed that draws the images.

    Raises:
        ValueError: If there is no shot.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits()).turned_into([FewShot(shots=8)])
        >>> [len(stream.dataset(0, split)) for split in ("train", "val", "test")]
        [16, 8, 72]
    """

    def __init__(self, shots: int = 16, seed: int = 1) -> None:
        if shots < 1:
            raise ValueError(f"expected one shot or more, got {shots}")
        self.shots, self.seed = shots, seed

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        counts: dict[Split, int] = {"train": self.shots, "val": min(_MOST_VALIDATION, self.shots)}
        splits = [
            {
                split: self._few(own, counts[split], split, task) if split in counts else own
                for split, own in parts.items()
            }
            for task, parts in enumerate(plan.splits)
        ]
        return replace(plan, splits=tuple(splits))

    def _few(self, plan: SplitPlan, count: int, split: str, task: int) -> SplitPlan:
        of_class: dict[int, list[int]] = defaultdict(list)
        for position, label in enumerate(plan.targets):
            of_class[label].append(position)
        kept: list[int] = []
        for label, positions in of_class.items():
            draw = random.Random(derived_seed(self.seed, "shots", split, task, label))
            kept += draw.sample(positions, min(count, len(positions)))
        kept.sort()
        return SplitPlan(plan.images, tuple(plan.indices[p] for p in kept), tuple(plan.targets[p] for p in kept))
