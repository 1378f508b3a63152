"""Class-incremental streams: one data set whose classes arrive in groups."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Literal, TypeAlias

from typing_extensions import override

from clmerge.names import safe_name
from clmerge.streams.avalanche_index import IndexDataset, avalanche_benchmarks, experience_indices
from clmerge.streams.layout import ValidationCut
from clmerge.streams.orders import CLASS_ORDERS
from clmerge.streams.plan import StreamPlan, Task
from clmerge.streams.sources import DataSource
from clmerge.streams.splits import derived_seed
from clmerge.streams.stream import Stream
from clmerge.streams.task_names import task_names

NamedOrder: TypeAlias = Literal[
    "natural", "random", "magmax_cifar100", "magmax_cub200", "magmax_imagenet_r", "magmax_domainnet"
]
ClassOrder: TypeAlias = NamedOrder | list[int]

_DEFAULT_NUM_TASKS = 5


class ClassIncremental(Stream):
    """The classes of one data set arrive in groups, one group per task.

    Class ids stay those of the data set. No class is dropped: if the classes do not divide evenly, task ``i`` gets
    the classes ``floor(n i / T)`` to ``floor(n (i + 1) / T) - 1`` of the order, as in MagMax (arXiv 2407.06322).

    Args:
        source: the data set.
        num_tasks: number of tasks.
        classes_per_task: number of classes of every task, for an uneven stream; sets the number of tasks.
        base_classes: number of classes of the first task; the others are divided evenly over the remaining
            tasks.
        class_order: order of arrival: "natural" (by class id), "random" (drawn from ``seed``), the name of a
            published order, or a list of all class ids.
        seed: seed of the random order and of the validation cut.
        val_fraction: share of each class's training images held out for validation; 0 for none. If the data set has
            its own validation split, that is used instead, unless this is 0.
        max_val: upper bound of the validation images of one task (default: no bound).

    Raises:
        ValueError: if the options contradict each other or the data set (the latter when the data is first
            read).

    Example:
        >>> from clmerge.streams import SklearnDigits
        >>> stream = ClassIncremental(SklearnDigits(), num_tasks=3)
        >>> [task.classes for task in stream.tasks]
        [(0, 1, 2), (3, 4, 5), (6, 7, 8, 9)]
        >>> stream.tasks[0].name
        'zero-one-two'
    """

    kind = "class-incremental"

    def __init__(
        self,
        source: DataSource,
        *,
        num_tasks: int = _DEFAULT_NUM_TASKS,
        classes_per_task: list[int] | None = None,
        base_classes: int | None = None,
        class_order: ClassOrder = "natural",
        seed: int = 0,
        val_fraction: float = 0.1,
        max_val: int | None = None,
    ) -> None:
        if num_tasks < 1:
            raise ValueError(f"expected num_tasks of 1 or more, got {num_tasks}")
        if classes_per_task is not None:
            if base_classes is not None:
                raise ValueError(
                    f"expected classes_per_task or base_classes, got both ({classes_per_task} and "
                    f"{base_classes}): put the base classes first in classes_per_task"
                )
            if min(classes_per_task, default=0) < 1:
                raise ValueError(f"expected at least one class in every task, got classes_per_task={classes_per_task}")
            if num_tasks not in (_DEFAULT_NUM_TASKS, len(classes_per_task)):
                raise ValueError(
                    f"expected num_tasks to be len(classes_per_task)={len(classes_per_task)}, got "
                    f"{num_tasks}: leave num_tasks out"
                )
        if base_classes is not None and (base_classes < 1 or num_tasks < 2):
            raise ValueError(
                f"expected base_classes of 1 or more and num_tasks of 2 or more, got {base_classes} and {num_tasks}"
            )
        if isinstance(class_order, str) and class_order not in ("natural", "random", *CLASS_ORDERS):
            raise ValueError(
                f"expected class_order to be a list or one of {['natural', 'random', *CLASS_ORDERS]}, "
                f"got {class_order!r}"
            )
        self.source = source
        self.num_tasks = num_tasks if classes_per_task is None else len(classes_per_task)
        self.classes_per_task = classes_per_task
        self.base_classes = base_classes
        self.class_order = class_order
        self.seed = seed
        self.validation = ValidationCut(val_fraction, max_val, seed)

    @property
    @override
    def name(self) -> str:
        return f"{safe_name(self.source.name)}-{self.num_tasks}"

    def _order(self, num_classes: int) -> list[int]:
        if self.class_order == "natural":
            return list(range(num_classes))
        if self.class_order == "random":
            order = list(range(num_classes))
            random.Random(derived_seed(self.seed, "class order")).shuffle(order)
            return order
        named = isinstance(self.class_order, str)
        order = list(CLASS_ORDERS[self.class_order]) if isinstance(self.class_order, str) else self.class_order
        if sorted(order) != list(range(num_classes)):
            given = f"{self.class_order!r}, which has {len(order)}" if named else f"{order}"
            raise ValueError(
                f"expected class_order to hold each of the {num_classes} class ids of {self.source.name} "
                f"once, got {given}"
            )
        return order

    def _sizes(self, num_classes: int) -> list[int]:
        if self.classes_per_task is not None:
            if sum(self.classes_per_task) != num_classes:
                raise ValueError(
                    f"expected classes_per_task to sum to the {num_classes} classes of {self.source.name}, "
                    f"got {self.classes_per_task} (sum {sum(self.classes_per_task)})"
                )
            return self.classes_per_task
        base = [] if self.base_classes is None else [self.base_classes]
        num_rest, num_parts = num_classes - sum(base), self.num_tasks - len(base)
        if num_rest < num_parts:
            raise ValueError(
                f"expected at least one class for every task, got {num_classes} classes in {self.source.name!r} for "
                f"num_tasks={self.num_tasks}"
                + (f" with base_classes={self.base_classes}" if base else "")
                + f"; set num_tasks to {num_rest + len(base)} or less"
            )
        return base + even_sizes(num_rest, num_parts)

    @override
    def _build(self) -> StreamPlan:
        source = self.source
        names, train, test = source.class_names, source.train(), source.test()
        held = {"training": set(train.targets), "test": set(test.targets)}
        absent = {split: [name for index, name in enumerate(names) if index not in of] for split, of in held.items()}
        if missing := {split: found for split, found in absent.items() if found}:
            told = ", and ".join(
                f"no {split} images of {len(found)} class(es): {found[:5]}" for split, found in missing.items()
            )
            raise ValueError(
                f"expected training and test images of every class of {source.name}, got {told}; a class that is cut "
                "into both needs two images at least; remove the folders or rows of classes without"
            )
        benchmark = avalanche_benchmarks().class_incremental_benchmark(
            {"train": IndexDataset(train.targets), "test": IndexDataset(test.targets)},
            class_order=self._order(len(names)),
            # num_experiences= would drop the remainder of the division.
            num_classes_per_exp=self._sizes(len(names)),
        )
        classes = [tuple(sorted(int(c) for c in exp.classes_in_this_experience)) for exp in benchmark.train_stream]
        of_task = [tuple(names[c] for c in task_classes) for task_classes in classes]
        tasks = [Task(index, name, classes[index], of_task[index]) for index, name in enumerate(task_names(of_task))]
        splits = [
            self.validation.splits(
                source,
                train=experience_indices(train_exp),
                test=experience_indices(test_exp),
                to_global={class_id: class_id for class_id in task.classes},
            )
            for task, train_exp, test_exp in zip(tasks, benchmark.train_stream, benchmark.test_stream, strict=True)
        ]
        return StreamPlan(tuple(tasks), tuple(splits), tuple(names), tuple(source.prompt_names), (source,) * len(names))


def even_sizes(num_classes: int, num_tasks: int) -> list[int]:
    """Divide classes among tasks at the boundaries ``floor(num_classes * i / num_tasks)``.

    Example:
        >>> even_sizes(10, 3)
        [3, 3, 4]
    """
    bounds = [num_classes * i // num_tasks for i in range(num_tasks + 1)]
    return [high - low for low, high in pairwise(bounds)]
