"""Parse and combine the parameter values of mergers that a search tries."""

import copy
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from clmerge.merging import Merger
from clmerge.merging.strategies.space import is_numeric
from clmerge.names import did_you_mean
from clmerge.settings import Configured

_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+|\*)\]")
_PATH = re.compile(r"[A-Za-z_]\w*(\[(\d+|\*)\])?(\.[A-Za-z_]\w*(\[(\d+|\*)\])?)*")

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

    A parameter is a path: of a part of a merger ``finisher.scale``, of an entry of a list ``weights[2]``, of all its
    entries ``weights[*]``, which become a parameter each.

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
        >>> grids({"ties": TIES(weights=[1, 1])}, None, ["TIES.weights[*]=0,1"])
        {'ties': {'weights[0]': [0, 1], 'weights[1]': [0, 1]}}
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
        for name in named(merger_name, mergers):
            if parameter in mergers[name].ignored_by_views:
                raise ValueError(
                    f"expected a parameter that the result depends on, got {merger_name}.{parameter}: {name} is "
                    f"evaluated with a view for every task, in which {parameter} does not occur"
                )
            for path in _paths(mergers[name], parameter):
                found[name][path] = _values_of(mergers[name], path, parse_values(text))
    return {name: parameters for name, parameters in found.items() if parameters}


def named(word: str, mergers: Mapping[str, Merger]) -> list[str]:
    """Return the names of the mergers that a word names, itself or by class.

    Raises:
        ValueError: If there is none; the nearest is given.
    """
    chosen = [name for name, merger in mergers.items() if word in (name, type(merger).__name__)]
    if not chosen:
        known = [each for name, merger in mergers.items() for each in (type(merger).__name__, name)]
        raise ValueError(f"expected one of the mergers compared, got {word!r}{did_you_mean(word, known)}")
    return chosen


def with_values(merger: Merger, values: Mapping[str, Any]) -> Merger:
    """Return a new merger with the settings of another, except some values, of its own or of its parts.

    Example:
        >>> from clmerge.merging import LayerScale, Pipeline, TIES
        >>> merger = with_values(TIES(density=0.5), {"scale": 2.0})
        >>> merger.density, merger.scale
        (0.5, 2.0)
        >>> merger = Pipeline(finisher=LayerScale([1.0, 1.0]))
        >>> with_values(merger, {"finisher.coefficients[1]": 0.5}).finisher.coefficients
        [1.0, 0.5]
    """
    changed = _changed(merger, {tuple(_keys(path)): value for path, value in values.items()})
    assert isinstance(changed, Merger)
    return changed


def value_at(merger: Merger, path: str) -> Any:
    """Return the value of a parameter.

    Example:
        >>> from clmerge.merging import TIES
        >>> value_at(TIES(weights=[1.0, 0.5]), "weights[1]")
        0.5
    """
    held: Any = merger
    for key in _keys(path):
        held = held[key] if isinstance(key, int) else getattr(held, key)
    return held


def points(grid: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Return all points of a grid, the last parameter fastest.

    Example:
        >>> points({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _keys(path: str) -> list[str | int]:
    """Return the steps of a path: names, and positions in lists."""
    return [int(index) if index else name for name, index in _STEP.findall(path)]


def _changed(held: Any, changes: Mapping[tuple[str | int, ...], Any]) -> Any:
    """Return a copy of a rule, a part or a list with some of what is in it replaced."""
    if () in changes:
        return changes[()]
    inside: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for (key, *rest), value in changes.items():
        inside.setdefault(key, {})[tuple(rest)] = value
    if isinstance(held, list | tuple):
        return [_changed(item, inside[i]) if i in inside else copy.deepcopy(item) for i, item in enumerate(held)]
    settings = {name: getattr(held, name) for name in _parameters(held)}
    return type(held)(
        **{
            name: _changed(value, inside[name]) if name in inside else copy.deepcopy(value)
            for name, value in settings.items()
        }
    )


def _paths(merger: Merger, parameter: str) -> list[str]:
    """Return the paths that a parameter stands for; several if it has a ``[*]``."""
    if not _PATH.fullmatch(parameter):
        raise ValueError(f"expected a parameter such as scale, finisher.scale or weights[*], got {parameter!r}")
    held: Any = merger
    before = ""
    for name, index in _STEP.findall(parameter):
        if name:
            if not isinstance(held, Configured):
                raise ValueError(f"expected a rule or a part at {before!r} of {type(merger).__name__}, got {held!r}")
            if name not in _parameters(held):
                raise ValueError(
                    f"expected a parameter of {type(held).__name__} ({', '.join(_parameters(held)) or 'none'}), "
                    f"got {name!r}{did_you_mean(name, _parameters(held))}"
                )
            held, before = getattr(held, name), f"{before}.{name}".lstrip(".")
            continue
        if not isinstance(held, list | tuple) or (index != "*" and int(index) >= len(held)):
            raise ValueError(
                f"expected a list{'' if index == '*' else ' that long'} as {before} of {type(merger).__name__} to "
                f"search its entries, got {held!r}: give one in --mergers"
            )
        if index == "*":
            rest = parameter.partition("[*]")[2]
            return [path for i in range(len(held)) for path in _paths(merger, f"{before}[{i}]{rest}")]
        held, before = held[int(index)], f"{before}[{index}]"
    return [parameter]


def _values_of(merger: Merger, path: str, values: list[Any]) -> list[Any]:
    """Return the values; refuse other kinds than the parameter's."""
    if path in _parameters(merger):
        return _checked(merger, path, values)
    if is_numeric([value_at(merger, path)]) and not is_numeric(values):
        raise ValueError(f"expected numbers as {path} of {type(merger).__name__}, got {values[0]!r}")
    return values


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


def _parameters(held: Configured) -> list[str]:
    return list(inspect.signature(type(held)).parameters)
