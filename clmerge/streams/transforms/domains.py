"""Turn a stream into domains: the same classes, changed in another way in every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from typing_extensions import override

from clmerge.names import safe_name
from clmerge.streams.plan import Split, SplitPlan, StreamPlan, Task
from clmerge.streams.splits import dealt, derived_seed
from clmerge.streams.task_names import unique_names
from clmerge.streams.transforms.changes import ImageChange
from clmerge.streams.transforms.transform import StreamTransform, changed


class Domains(StreamTransform):
    """One task per change: domain-incremental tasks out of one data set, as RotatedMNIST is made of MNIST.

    Args:
        changes: The change of every domain, in the order of the tasks.
        tasks: Whether the tasks of the stream are ``joined`` before, so that every domain has all classes, or stay
            ``apart``: every task becomes one task per change.
        images: Whether the images of a split are ``split`` among the domains, class by class (as in DomainBed, arXiv
            2007.01434), or every domain has ``all`` of them. Training and test images stay apart in both.
        seed: Seed of the split.

    Raises:
        ValueError: If there is no change.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> from clmerge.streams.transforms import Rotation
        >>> angles = [Rotation(degrees) for degrees in (0, 15, 30)]
        >>> stream = ClassIncremental(SklearnDigits()).turned_into([Domains(angles)])
        >>> [(task.name, len(task.classes), len(stream.dataset(task.index, "train"))) for task in stream.tasks]
        [('rotated_0', 10, 432), ('rotated_15', 10, 432), ('rotated_30', 10, 431)]
    """

    def __init__(
        self,
        changes: list[ImageChange],
        tasks: Literal["joined", "apart"] = "joined",
        images: Literal["split", "all"] = "split",
        seed: int = 0,
    ) -> None:
        if not changes:
            raise ValueError("expected one change or more for Domains, got none")
        self.changes, self.tasks, self.images, self.seed = changes, tasks, images, seed

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        everything = range(len(plan.tasks))
        groups = [list(everything)] if self.tasks == "joined" else [[task] for task in everything]
        names: list[str] = []
        classes: list[tuple[int, ...]] = []
        splits: list[dict[Split, SplitPlan]] = []
        for number, group in enumerate(groups):
            parts: dict[Split, list[SplitPlan]] = {
                split: self._parts(_joined([plan.splits[task][split] for task in group]), split, number)
                for split in plan.splits[group[0]]
            }
            for domain, change in enumerate(self.changes):
                own = change.domain if self.tasks == "joined" else f"{plan.tasks[number].name}-{change.domain}"
                names.append(safe_name(own))
                classes.append(tuple(sorted({label for task in group for label in plan.tasks[task].classes})))
                splits.append({split: changed(found[domain], change) for split, found in parts.items()})
        tasks = [
            Task(index, name, own, tuple(plan.class_names[label] for label in own))
            for index, (name, own) in enumerate(zip(unique_names(names), classes, strict=True))
        ]
        return replace(plan, tasks=tuple(tasks), splits=tuple(splits))

    def _parts(self, whole: SplitPlan, split: str, group: int) -> list[SplitPlan]:
        """Return the images of one split of every domain, unchanged."""
        count = len(self.changes)
        if self.images == "all" or not whole.indices:
            return [whole] * count
        return [
            SplitPlan(whole.images, tuple(whole.indices[p] for p in part), tuple(whole.targets[p] for p in part))
            for part in dealt(whole.targets, count, seed=derived_seed(self.seed, "domains", split, group))
        ]


def _joined(plans: Sequence[SplitPlan]) -> SplitPlan:
    images = plans[0].images
    if any(plan.images is not images for plan in plans):
        raise ValueError(
            "expected tasks of one data set for Domains, got several: use DomainIncremental for data sets that are "
            "domains, tasks='apart' to keep the tasks, or Domains before the transforms that change images"
        )
    return SplitPlan(
        images,
        tuple(index for plan in plans for index in plan.indices),
        tuple(target for plan in plans for target in plan.targets),
    )
