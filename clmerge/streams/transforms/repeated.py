"""Let some tasks arrive several times, as if several parties had trained on them."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import Split, SplitPlan, StreamPlan, Task
from clmerge.streams.splits import dealt, derived_seed
from clmerge.streams.task_names import unique_names
from clmerge.streams.transforms.transform import StreamTransform, check_tasks


class Repeated(StreamTransform):
    """Let some tasks arrive several times in a row, each time under a name of its own: ``a``, ``a-2``, ``a-3``.

    Validation and test images are those of the task every time. Transforms that follow count the tasks of the new
    stream: after ``Repeated(tasks=[0], times=3)`` its repetitions are 0, 1 and 2, and the second task is 3.

    Args:
        tasks: Indices of the tasks that are repeated.
        times: How often each of them arrives.
        split: Whether the training images are divided among the times, equally many of every class in each; without,
            all come every time.
        seed: Seed that divides the images.

    Raises:
        ValueError: If a task does not arrive twice or more, or has fewer images than times.

    Example:
        >>> from clmerge.streams import ClassIncremental, SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits(), num_tasks=2).turned_into([Repeated(tasks=[1], times=2)])
        >>> [(task.name, len(stream.dataset(task.index, "train"))) for task in stream.tasks]
        [('zero-one-and-3', 649), ('five-six-and-3', 323), ('five-six-and-3-2', 323)]
    """

    def __init__(self, tasks: list[int], times: int = 2, split: bool = True, seed: int = 0) -> None:
        if times < 2:
            raise ValueError(f"expected times of 2 or more for Repeated, got {times}")
        self.tasks, self.times, self.split, self.seed = tasks, times, split, seed

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        check_tasks(self.tasks, len(plan.tasks), "tasks of Repeated")
        found: list[tuple[Task, dict[Split, SplitPlan]]] = []
        for task, splits in zip(plan.tasks, plan.splits, strict=True):
            parts = self._parts(splits["train"], task.index) if task.index in self.tasks else [splits["train"]]
            found += [(task, {**splits, "train": part}) for part in parts]
        names = unique_names([task.name for task, _ in found])
        tasks = [
            replace(task, index=i, name=name) for i, ((task, _), name) in enumerate(zip(found, names, strict=True))
        ]
        return replace(plan, tasks=tuple(tasks), splits=tuple(splits for _, splits in found))

    def _parts(self, train: SplitPlan, task: int) -> list[SplitPlan]:
        if not self.split:
            return [train] * self.times
        parts = dealt(train.targets, self.times, seed=derived_seed(self.seed, "repeated", task))
        return [
            SplitPlan(train.images, *(tuple(values[p] for p in part) for values in (train.indices, train.targets)))
            for part in parts
        ]
