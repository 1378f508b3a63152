"""Take a task out of mergers, as if it had never come: merged anew from a bank, or by subtraction."""

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy

from clmerge.merging import Merger, Statistics
from clmerge.weights.task_vector import State


def all_without(
    mergers: Mapping[str, Merger],
    task: int,
    *,
    known: Collection[int],
    read: Callable[[int], State],
    base: str | None,
    statistics: Statistics,
) -> dict[str, Merger]:
    """Return copies of mergers without a task; refuse if one of them cannot be without it.

    Args:
        mergers: Mergers by name; they are not changed.
        task: Index of the task.
        known: Tasks whose vectors can be read.
        read: Returns the vector of one of them.
        base: Fingerprint of the base model.
        statistics: What was given to ``update`` beside the task's vector.

    Raises:
        ValueError: If a merger cannot; the message has the names of all of these, and the reasons.
    """
    copies, reasons = {}, []
    for name, merger in mergers.items():
        try:
            others = [other for other in merger.tasks if other != task]
            if task not in merger.tasks:
                raise ValueError(f"expected one of the merged tasks {list(merger.tasks)}, got {task}")
            copies[name] = deepcopy(merger)
            if {*others} <= {*known} and not (merger.requires or merger.requires_score or merger.requires_gradient):
                _merge_anew(copies[name], others, read, base)
            elif merger.removable and task not in known:
                raise ValueError(f"expected the vector of task {task}, got none; pass vector=, or keep a bank")
            else:
                vector = read(task) if merger.removable else {}  # a rule that is not says so itself
                copies[name].downdate(vector, task=task, base=base, statistics=statistics)
        except (TypeError, ValueError) as error:
            reasons.append(f"{name!r}: {error}")
    if reasons:
        raise ValueError(
            f"expected mergers that task {task} can be taken out of, got {len(reasons)} of {len(mergers)} that it "
            f"cannot; none was changed. {'. '.join(reasons)}"
        )
    return copies


def _merge_anew(merger: Merger, tasks: Collection[int], read: Callable[[int], State], base: str | None) -> None:
    merged = merger.identities
    merger.reset()
    for task in tasks:
        merger.update(read(task), task=task, base=base)
        if merger.identities[task] != merged[task]:
            raise ValueError(f"expected the vector that was merged as task {task}, got another in the bank")
