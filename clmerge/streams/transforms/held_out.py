"""Take tasks out of a stream, to test on what was never trained."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from clmerge.streams.plan import StreamPlan
from clmerge.streams.transforms.transform import StreamTransform, check_tasks


class HeldOut(StreamTransform):
    """Take tasks out of the stream: nothing is trained, validated or merged on them, and probes test on them.

    The classes of a task that is out stay classes of the stream: a text head keeps their rows, and in a task-agnostic
    evaluation they compete. The other tasks move up. Held-out domains of a domain-incremental stream make
    leave-one-domain-out (DomainBed, arXiv 2007.01434), held-out classes make novel classes.

    Args:
        tasks: Indices of the tasks.

    Raises:
        ValueError: If none is named, or one twice.
    """

    def __init__(self, tasks: list[int]) -> None:
        if not tasks or len(set(tasks)) < len(tasks):
            raise ValueError(f"expected one task or more for HeldOut, each once, got {tasks}")
        self.tasks = tasks

    @override
    def apply(self, plan: StreamPlan) -> StreamPlan:
        check_tasks(self.tasks, len(plan.tasks), "tasks of HeldOut")
        kept = [task for task in range(len(plan.tasks)) if task not in self.tasks]
        if not kept:
            raise ValueError(f"expected HeldOut to leave a task to train, got all {len(plan.tasks)} of the stream")
        held = [*plan.held_out, *((plan.tasks[task], plan.splits[task]) for task in self.tasks)]
        return replace(
            plan,
            tasks=tuple(replace(plan.tasks[task], index=index) for index, task in enumerate(kept)),
            splits=tuple(plan.splits[task] for task in kept),
            held_out=tuple((replace(task, index=index), splits) for index, (task, splits) in enumerate(held)),
        )
