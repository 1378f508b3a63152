"""Rules for groups of tensors: by patterns of their names, the first that matches counts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

from clmerge.merging import Merger


@dataclass(frozen=True)
class Group:
    """Tensors that are merged by one rule, as if there were no others.

    Attributes:
        match: Glob patterns of which one must match a tensor's name; ``*`` also matches dots.
        merger: The rule; null leaves the tensors as the base has them.
    """

    match: list[str] = field(default_factory=list)
    merger: Merger | None = None


@dataclass
class Part:
    """The tensors of one group, or of none.

    Attributes:
        merger: The rule, or None for the base's.
        names: The tensors.
        match: The patterns of the group; none for the tensors that no group has.
    """

    merger: Merger | None
    names: list[str]
    match: list[str]

    def __str__(self) -> str:
        if not self.match:
            return repr(self.merger)
        shown = ", ".join(self.match[:2]) + (f" and {len(self.match) - 2} more" if len(self.match) > 2 else "")
        return f"{self.merger!r} for {shown}: {len(self.names)} tensor{'s' * (len(self.names) != 1)}"


def assign(names: Iterable[str], groups: Sequence[Group], merger: Merger | None) -> list[Part]:
    """Return the groups with their tensors, and last the tensors of no group.

    Args:
        names: The tensors.
        groups: Patterns and rules; of two that match a name the first counts.
        merger: The rule for tensors of no group.

    Example:
        >>> from clmerge.merging import MagMax
        >>> [part.names for part in assign(["a.w", "a.b", "c"], [Group(["*.w"], MagMax())], None)]
        [['a.w'], ['a.b', 'c']]
    """
    parts = [Part(group.merger, [], list(group.match)) for group in groups]
    rest = Part(merger, [], [])
    matches = [(_pattern(part.match), part) for part in parts if part.match]
    for name in names:
        fitting = (part for pattern, part in matches if pattern.match(name))
        next(fitting, rest).names.append(name)
    return [*parts, rest]


def _pattern(globs: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)))
