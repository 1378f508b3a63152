"""Names of tasks and classes, all different."""

from __future__ import annotations

from collections.abc import Sequence

from clmerge.names import safe_name

_LONGEST_NAME = 40


def task_names(class_names: Sequence[Sequence[str]]) -> list[str]:
    """Name tasks after their classes: all of them if that is short, else the first two and the number of others.

    Args:
        class_names: per task, the names of its classes.

    Example:
        >>> task_names([["zero", "one"], ["apple", "aquarium fish", "baby", "bear", "beaver"]])
        ['zero-one', 'apple-aquarium_fish-and-3']
    """
    names: list[str] = []
    for task_classes in class_names:
        parts = [safe_name(name) for name in task_classes]
        name = "-".join(parts)
        if len(parts) > 3 or len(name) > _LONGEST_NAME:
            name = "-".join(part[: _LONGEST_NAME // 2] for part in parts[:2])
            name += f"-and-{len(parts) - 2}" if len(parts) > 2 else ""
        names.append(name)
    return unique_names(names)


def unique_names(names: Sequence[str]) -> list[str]:
    """Number repeated names from the second occurrence on.

    Example:
        >>> unique_names(["a", "b", "a"])
        ['a', 'b', 'a-2']
    """
    taken: set[str] = set()
    result: list[str] = []
    for name in names:
        candidate, count = name, 1
        # Ignore case: names that differ only in case are one file on some file systems.
        while candidate.casefold() in taken:
            count += 1
            candidate = f"{name}-{count}"
        taken.add(candidate.casefold())
        result.append(candidate)
    return result
