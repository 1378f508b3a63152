"""Match untrusted regular expressions in bounded time.

Python's matcher backtracks, which takes exponential time for some patterns. Here the set of all positions where a part
of the pattern may end is computed at once, so that the time grows with the size of the pattern and with a small power
of the length of the text.
"""

import re
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable
from typing import Any

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


class BoundedPattern:
    """A regular expression without lookaround, backreferences and flags.

    Args:
        pattern: The expression, in Python's syntax.

    Raises:
        ValueError: If it is not a regular expression, or uses unsupported syntax.

    Example:
        >>> BoundedPattern("(a+)+").matches("a" * 1000 + "b")
        False
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._tree = parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"no regular expression: {error}") from error
        if self._tree.state.flags & ~re.UNICODE:
            raise ValueError("a regular expression with flags")
        _check(self._tree, 0, 0)

    def matches(self, text: str) -> bool:
        """Return whether the expression matches the whole of ``text``."""
        return len(text) in _ends(self._tree, text, {0})


def _check(tree: Iterable[Any], depth: int, repeats: int) -> None:
    """Refuse syntax that ``_ends`` does not support, and deep nesting, for which it would be slow."""
    if depth > 50 or repeats > 3:
        raise ValueError("a regular expression that is nested too deeply")
    for kind, argument in tree:
        match str(kind):
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT":
                pass
            case "BRANCH":
                for part in argument[1]:
                    _check(part, depth + 1, repeats)
            case "SUBPATTERN":
                if argument[1] or argument[2]:
                    raise ValueError("a regular expression with flags")
                _check(argument[3], depth + 1, repeats)
            case "MAX_REPEAT" | "MIN_REPEAT":
                _check(argument[2], depth + 1, repeats + 1)
            case other:
                raise ValueError(f"a regular expression with {other.lower().replace('_', ' ')}, which is not read")


def _ends(tree: Iterable[Any], text: str, places: set[int]) -> set[int]:
    """Return all positions where a match of the whole tree may end if it begins at one of ``places``."""
    for kind, argument in tree:
        if not places:
            return places
        match str(kind):
            case "BRANCH":
                places = set().union(*(_ends(part, text, places) for part in argument[1]))
            case "SUBPATTERN":
                places = _ends(argument[3], text, places)
            case "MAX_REPEAT" | "MIN_REPEAT":
                places = _repeated(argument, text, places)
            case "AT":
                places = {place for place in places if _is_at(str(argument), text, place)}
            case _:
                places = {p + 1 for p in places if p < len(text) and _fits(str(kind), argument, text[p])}
    return places


def _repeated(argument: Any, text: str, places: set[int]) -> set[int]:
    least, most, body = argument
    # More rounds than characters reach no new places.
    rounds = len(text) + 1
    for _ in range(min(least, rounds)):
        before, places = places, _ends(body, text, places)
        if not places or places == before:
            break
    found, new = set(places), places
    for _ in range(min(int(most) - least, rounds)):
        new = _ends(body, text, new) - found
        if not new:
            break
        found |= new
    return found


def _is_at(where: str, text: str, place: int) -> bool:
    if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return place == 0
    if where == "AT_END":
        return place == len(text) or (place == len(text) - 1 and text[place] == "\n")
    if where == "AT_END_STRING":
        return place == len(text)
    word = _CATEGORIES["CATEGORY_WORD"]
    before, after = (0 <= at < len(text) and word(text[at]) for at in (place - 1, place))
    return (before != after) == (where == "AT_BOUNDARY")


def _fits(kind: str, argument: Any, character: str) -> bool:
    if kind == "ANY":
        return character != "\n"
    if kind != "IN":
        return (ord(character) == int(argument)) == (kind == "LITERAL")
    negated = str(argument[0][0]) == "NEGATE"
    return bool(any(_is_one_of(str(k), a, character) for k, a in argument[negated:]) != negated)


def _is_one_of(kind: str, argument: Any, character: str) -> bool:
    if kind == "LITERAL":
        return ord(character) == int(argument)
    if kind == "RANGE":
        return bool(argument[0] <= ord(character) <= argument[1])
    name = str(argument)
    return _CATEGORIES[name.replace("_NOT_", "_")](character) != ("_NOT_" in name)
