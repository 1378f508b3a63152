"""Join accumulators of several workers in an order that does not depend on who was first."""

from collections.abc import Iterable

from clmerge.merging.merger import Merger


def joined(mergers: Iterable[Merger]) -> Merger:
    """Join accumulators in a fixed binary tree over their tasks.

    Sums of floating-point numbers depend on their order in the last bits. Here neighbours in the order of tasks are
    joined, then neighbouring pairs, and so on, whatever the order in which the accumulators are given.

    Args:
        mergers: Accumulators of the same rule and base that hold different tasks. They are used up.

    Returns:
        One of them, which now holds all tasks.

    Raises:
        ValueError: If there are none, or one holds no task.
        RuntimeError: If the rule is not order-free; fold the vectors in order instead. ``Merger.merge_state`` says what
            else cannot be joined.

    Example:
        >>> import torch
        >>> from clmerge.merging import WeightAverage
        >>> workers = [WeightAverage() for _ in range(3)]
        >>> for task, worker in enumerate(workers):
        ...     worker.update({"w": torch.full((1,), float(task))}, task=task)
        >>> joined(reversed(workers)).compute()
        {'w': tensor([1.])}
    """
    left = [*mergers]
    if not left or any(not merger.tasks for merger in left):
        raise ValueError(f"expected accumulators that hold tasks, got {[merger.tasks for merger in left]}")
    left.sort(key=lambda merger: min(merger.tasks))
    while len(left) > 1:
        for first, second in zip(left[::2], left[1::2], strict=False):
            first.merge_state(second)
        left = left[::2]
    return left[0]
