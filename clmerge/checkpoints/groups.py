"""Assign tensors to groups with their own rules, by the first pattern that matches a name."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

from clmerge.merging import Merger


@dataclass(frozen=True)
class Group:
    """Tensors that are merged by one rule, as if there were no others.

    Attributes:
        match: Glob patterns, one of which must match a tensor's name; ``*`` also matches dots.
        merger: The rule; null keeps the base's tensors.
    """

    match: list[str] = field(default_factory=list)
    merger: Merger | None = None


@dataclass
class Part:
    """The tensors of one group, or of none.

    Attributes:
        merger: The rule; None keeps the base's tensors.
        names: The tensors.
        match: The patterns of the group; empty for tensors in no group.
    """

    merger: Merger | None
    names: list[str]
    match: list[str]

    @property
    def rule(self) -> str:
        """The rule and its patterns."""
        if not self.match:
            return repr(self.merger)
        shown = ", ".join(self.match[:2]) + (f" and {len(self.match) - 2} more" if len(self.match) > 2 else "")
        return f"{self.merger!r} for {shown}"

    def __str__(self) -> str:
        return f"{self.rule}: {len(self.names)} tensor{'s' * (len(self.names) != 1)}" if self.match else self.rule


def assign(names: Iterable[str], groups: Sequence[Group], merger: Merger | None) -> list[Part]:
    """Return the groups with their tensors, and last the tensors in no group.

    Args:
        names: The tensors.
        groups: Patterns and rules; of several that match a name, the first is used.
        merger: The rule for tensors in no group.

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
