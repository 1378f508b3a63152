"""Checks of parsed JSON: a check takes a value and its place, and raises a ValueError that names the place."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

from clmerge.names import visible

Check: TypeAlias = Callable[[Any, str], None]
_LARGEST = 1e15  # far above any metric, size or time of a run, and small enough for sums and charts


def refuse(where: str, expected: str, value: object) -> None:
    """Refuse a value.

    Args:
        where: Place of the value, as dotted keys.
        expected: Description of an accepted value.
        value: The value found.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"expected {where or 'the document'} to be {expected}, got {brief(value)}")


def brief(value: object, length: int = 60) -> str:
    """Return a value as text for a message, cut to ``length`` characters.

    Example:
        >>> brief([1, 2]), brief("x" * 100, 10)
        ('[1, 2]', "'xxxxxx...")
    """
    try:
        text = visible(repr(value))
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def text(value: Any, where: str) -> None:
    """Accept text."""
    if not isinstance(value, str):
        refuse(where, "text", value)


def number(value: Any, where: str) -> None:
    """Accept a finite number."""
    if not _is_number(value):
        refuse(where, "a finite number (below 1e15)", value)


def share(value: Any, where: str) -> None:
    """Accept a number from 0 to 1."""
    if not (_is_number(value) and 0 <= value <= 1):
        refuse(where, "a number from 0 to 1", value)


def amount(value: Any, where: str) -> None:
    """Accept a finite number of 0 or more."""
    if not (_is_number(value) and value >= 0):
        refuse(where, "a finite number of 0 or more (below 1e15)", value)


def count(value: Any, where: str) -> None:
    """Accept a whole number of 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST:
        refuse(where, "a whole number of 0 or more (below 1e15)", value)


def flag(value: Any, where: str) -> None:
    """Accept true and false."""
    if not isinstance(value, bool):
        refuse(where, "true or false", value)


def anything(value: Any, where: str) -> None:
    """Accept every value."""


def maybe(check: Check) -> Check:
    """Accept null and the values that ``check`` accepts."""

    def checked(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return checked


def one_of(values: Collection[Any]) -> Check:
    """Accept only the given text values."""

    def checked(value: Any, where: str) -> None:
        text(value, where)
        if value not in values:
            refuse(where, f"one of {', '.join(map(repr, values))}", value)

    return checked


def listed(check: Check, length: int | None = None, *, at_most: int | None = None, filled: bool = False) -> Check:
    """Accept a list whose values a check accepts.

    Args:
        check: Check of every value.
        length: Number of values.
        at_most: Largest number of values.
        filled: Whether at least one value is required.
    """
    size = "" if length is None else f" of {length}"
    size = f" of at most {at_most}" if at_most is not None else size

    def checked(value: Any, where: str) -> None:
        if not isinstance(value, list):
            refuse(where, f"a list{size}", value)
        if (length is not None and len(value) != length) or (at_most is not None and len(value) > at_most):
            raise ValueError(f"expected {where} to be a list{size}, got {len(value)}: {brief(value)}")
        if filled and not value:
            refuse(where, "a list of one or more", value)
        before: Any = value
        try:
            for item in value:  # millions of numbers, most of them null: names of places are made for an error alone
                if item is not before:
                    check(item, where)
                before = item
        except ValueError:
            for index, item in enumerate(value):
                check(item, f"{where}[{index}]")
            raise

    return checked


def keyed(check: Check) -> Check:
    """Accept an object with any keys whose values a check accepts."""

    def checked(value: Any, where: str) -> None:
        for key, item in _mapping(value, where).items():
            check(item, place(where, key))

    return checked


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Accept an object by checks of its keys; other keys are not checked.

    Args:
        required: Checks of the keys that must be present.
        optional: Checks of the keys that may be present.
    """

    def checked(value: Any, where: str) -> None:
        found = _mapping(value, where)
        if missing := [key for key in required if key not in found]:
            raise ValueError(f"expected {where or 'the document'} to have {' and '.join(missing)}, missing there")
        for key, check in {**required, **(optional or {})}.items():
            if key in found:
                check(found[key], place(where, key))

    return checked


def place(where: str, key: str) -> str:
    """Return the place of a key in an object; a key that is not a plain word is put in brackets.

    Example:
        >>> place("models", "ties"), place("models", "a b")
        ('models.ties', "models['a b']")
    """
    plain = key.replace("@", "").replace(".", "").replace("-", "").replace("_", "")
    if plain.isalnum() and plain.isascii() and len(key) <= 60:
        return f"{where}.{key}" if where else key
    return f"{where}[{brief(key)}]"


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        refuse(where, "an object", value)
    found: Mapping[str, Any] = value
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def same_length(lists: Mapping[str, Sequence[Any]], what: str) -> None:
    """Refuse lists that do not have the same length.

    Args:
        lists: The lists by their places.
        what: Noun for what each item of a list belongs to, for the message.

    Raises:
        ValueError: If lengths differ.
    """
    lengths = {where: len(items) for where, items in lists.items()}
    if len(set(lengths.values())) > 1:
        usual = max(lengths.values(), key=list(lengths.values()).count)
        odd = next(where for where, length in lengths.items() if length != usual)
        raise ValueError(f"expected {odd} to have {usual} items, one per {what}, got {lengths[odd]}")
