"""Parse and combine the parameter values of mergers that a search tries."""

import copy
import difflib
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from clmerge.merging import Merger

Values = dict[str, Any]
"""One value for some of a merger's parameters."""


def parse_values(text: str) -> list[Any]:
    """Read values: ``first:last:step``, both ends included, or a list with commas; a value in brackets is a list.

    Raises:
        ValueError: If the text is neither, or a bracket is not closed.

    Example:
        >>> parse_values("0.1:0.5:0.2"), parse_values("sum,mean"), parse_values("1:3:1"), parse_values("[1,2],[3,4]")
        ([0.1, 0.3, 0.5], ['sum', 'mean'], [1, 2, 3], [[1, 2], [3, 4]])
    """
    parts = text.split(":")
    if len(parts) == 1 or "[" in text:
        return [_value(part) for part in _split(text)]
    try:
        first, last, step = (Decimal(part) for part in parts)
    except (InvalidOperation, ValueError):
        raise ValueError(f"expected values as first:last:step or a,b,c, got {text!r}") from None
    if step <= 0 or last < first:
        raise ValueError(f"expected first <= last and a step above 0 in {text!r}")
    whole = all("." not in part for part in parts)
    count = int((last - first) / step) + 1
    return [int(first + i * step) if whole else float(first + i * step) for i in range(count)]


def grids(
    mergers: Mapping[str, Merger], scale: str | None, assignments: Sequence[str]
) -> dict[str, dict[str, list[Any]]]:
    """Return the values to try, by merger and parameter.

    Args:
        mergers: Mergers by name.
        scale: Values of ``scale`` for every merger that has one.
        assignments: ``NAME.PARAMETER=VALUES``, where NAME is a merger's name or class.

    Returns:
        Merger -> parameter -> values; only mergers with values to try.

    Raises:
        ValueError: For an unknown merger or parameter (the nearest one is given), or malformed values.

    Example:
        >>> from clmerge.merging import TIES
        >>> grids({"ties": TIES()}, "0.5,1.0", ["TIES.density=0.1:0.3:0.1"])
        {'ties': {'scale': [0.5, 1.0], 'density': [0.1, 0.2, 0.3]}}
    """
    found: dict[str, dict[str, list[Any]]] = {name: {} for name in mergers}
    if scale is not None:
        values = parse_values(scale)
        for name, merger in mergers.items():
            if "scale" in _parameters(merger) and "scale" not in merger.ignored_by_views:
                found[name]["scale"] = _checked(mergers[name], "scale", values)
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        merger_name, dot, parameter = target.partition(".")
        if not (equals and dot and text):
            raise ValueError(f"expected NAME.PARAMETER=VALUES, for example TIES.density=0.1,0.2, got {assignment!r}")
        chosen = [name for name, merger in mergers.items() if merger_name in (name, type(merger).__name__)]
        if not chosen:
            known = [word for name, merger in mergers.items() for word in (type(merger).__name__, name)]
            raise ValueError(f"expected one of the mergers compared, got {merger_name!r}{_near(merger_name, known)}")
        for name in chosen:
            parameters = _parameters(mergers[name])
            if parameter not in parameters:
                raise ValueError(
                    f"expected a parameter of {type(mergers[name]).__name__} ({', '.join(parameters) or 'none'}), "
                    f"got {parameter!r}{_near(parameter, parameters)}"
                )
            if parameter in mergers[name].ignored_by_views:
                raise ValueError(
                    f"expected a parameter that the result depends on, got {merger_name}.{parameter}: {name} is "
                    f"evaluated with a view for every task, in which {parameter} does not occur"
                )
            found[name][parameter] = _checked(mergers[name], parameter, parse_values(text))
    return {name: parameters for name, parameters in found.items() if parameters}


def with_values(merger: Merger, values: Mapping[str, Any]) -> Merger:
    """Return a new merger with the settings of another, except some values.

    Example:
        >>> from clmerge.merging import TIES
        >>> merger = with_values(TIES(density=0.5), {"scale": 2.0})
        >>> merger.density, merger.scale
        (0.5, 2.0)
    """
    settings = {name: copy.deepcopy(getattr(merger, name)) for name in _parameters(merger)}
    return type(merger)(**{**settings, **values})


def points(grid: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Return all points of a grid, the last parameter fastest.

    Example:
        >>> points({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            break
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise ValueError(f"expected lists in brackets, such as [1,2],[3,4], got {text!r}")
    return parts


def _value(text: str) -> Any:
    """Read a number, true, false, null or a list; anything else is a word."""
    try:
        return json.loads(text)
    except ValueError:
        if not text.startswith("["):
            return text
    return [_value(part) for part in _split(text[1:-1])]  # words, which JSON wants in quotes


def _checked(merger: Merger, parameter: str, values: list[Any]) -> list[Any]:
    """Return the values; refuse values that are not numbers if the default is one."""
    argument = inspect.signature(type(merger)).parameters[parameter]
    if isinstance(argument.default, int | float) and not isinstance(argument.default, bool):
        kinds = int | float | list if "Sequence" in str(argument.annotation) else int | float
        for value in values:
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"expected numbers as {parameter} of {type(merger).__name__}, got {value!r}")
    return values


def _parameters(merger: Merger) -> list[str]:
    return list(inspect.signature(type(merger)).parameters)


def _near(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
