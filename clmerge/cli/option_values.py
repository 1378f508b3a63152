"""Whether a value fits the type of an option, and the type in words."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from clmerge.cli.option_table import Type

# What the parser may read as a number or as true or false; what is refused here must be refused there, too.
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "y", "n", "1", "0"}
_NULLS = {"null", "none", "~", ""}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def alternatives(kind: Type) -> Iterator[Type]:
    """Yield the types that a union joins, or the type itself."""
    if isinstance(kind, Mapping) and "union" in kind:
        yield from kind["union"]
    else:
        yield kind


def part_of(kind: Type, name: str) -> Any:
    """Return what an alternative of a type has under ``name`` (``kind``, ``list`` ...); None if none has it."""
    return next((one[name] for one in alternatives(kind) if isinstance(one, Mapping) and name in one), None)


def kinds_of(kind: Type) -> list[str]:
    """Return the base classes among the alternatives of a type."""
    return [*dict.fromkeys(one["kind"] for one in alternatives(kind) if isinstance(one, Mapping) and "kind" in one)]


def item_of(kind: Type) -> Type:
    """Return the type of a list's items, beside the alternatives to a list; a type that is no list is its own item."""
    inner: Type | None = part_of(kind, "list")
    if inner is None:
        return kind
    others = [one for one in alternatives(kind) if not (isinstance(one, Mapping) and "list" in one)]
    return {"union": [*alternatives(inner), *others]} if others else inner


def is_null(value: object) -> bool:
    """Return whether a value means that there is none."""
    return value is None or (isinstance(value, str) and value.lower() in _NULLS)


def may_be(kind: Type, value: object) -> bool:
    """Return whether a number, text or flag may be of one of a type's alternatives; classes and lists aside.

    Example:
        >>> may_be("float", "1e-5"), may_be("float", "abc"), may_be({"union": ["int", {"choices": ["all"]}]}, "al")
        (True, False, False)
    """
    return any(_may_be(one, value) for one in alternatives(kind))


def _may_be(kind: Type, value: object) -> bool:
    text = str(value).strip()
    if text.startswith(("&", "!", "*", "'", '"')):  # YAML's own, which the parser resolves
        return True
    if isinstance(kind, Mapping):
        return text in kind.get("choices", ())
    if kind == "int":
        # 1e3 and 3.0: the parser says whether they will do
        return not isinstance(value, str) or _is_number(text)
    if kind == "float":
        return not isinstance(value, str) or _is_number(text)
    if kind == "bool":
        return not isinstance(value, str) or text.lower() in _BOOLEANS
    return kind != "null"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        # YAML's own: .inf, 0x1f, 1_000, 0o17, 1:30
        return re.fullmatch(r"[-+]?(\.inf|\.nan|0[xob][0-9a-f_]+|[0-9][0-9_:.]*)", text.lower()) is not None
    return True


def in_words(kind: Type) -> str:
    """Return a type in words.

    Example:
        >>> in_words({"union": ["int", {"choices": ["all"]}, "null"]}), in_words({"list": {"kind": "DataSource"}})
        ("a whole number or 'all'", 'a list of data sources')
    """
    words: list[str] = []
    for one in alternatives(kind):
        if isinstance(one, str):
            words += [_WORDS[one]] if one in _WORDS else []
        elif "choices" in one:
            words += [repr(choice) for choice in one["choices"]]
        elif "kind" in one:
            words.append(spoken(one["kind"]))
        elif "words" in one:
            words.append(f"a list of {_plural(in_words(one['words']))}")
        elif "list" in one:
            words.append(f"a list of {_plural(in_words(one['list']))}")
    words = list(dict.fromkeys(words))
    return ", ".join(words[:-1]) + (" or " if words[:-1] else "") + words[-1] if words else "a value"


def spoken(kind: str) -> str:
    """Return the name of a base class as words of a sentence.

    Example:
        >>> spoken("DataSource")
        'a data source'
    """
    noun = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower()
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(words: str) -> str:
    if " or " in words or not words.startswith(("a ", "an ")):
        return "texts" if words == "text" else "values"
    return f"{words.partition(' ')[2]}s"
