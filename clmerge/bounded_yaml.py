"""Read untrusted YAML, with limits on alias expansion, nesting depth and the length of numbers."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER: Any = yaml.resolver.Resolver()
_MOST_REPEATED = 10_000
_OF_A_NODE = 100  # characters of text that count as one node
_DEEPEST = 100
_LONG_NUMBER = re.compile(r"[-+_]*[0-9][0-9a-fA-Fx_:.]{1000,}")  # parsing one takes time quadratic in its length
# Errors of the constructors of YAML's own tags: YAMLError and others, for example KeyError for "!!bool x".
_FAULTS = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)


def load_yaml(text: str, source: str) -> Any:
    """Return the content of one YAML document.

    Args:
        text: The document.
        source: Name of the document in error messages.

    Raises:
        ValueError: If it is no YAML, or ``check_yaml`` refuses it.

    Example:
        >>> load_yaml("a: [1, x]", "a.yaml")
        {'a': [1, 'x']}
    """
    try:
        check_yaml(text)
        return yaml.load(text, Loader=_Loader)
    except _FAULTS as error:
        raise ValueError(f"expected a document in YAML, got {source}: {yaml_cause(error)}") from error


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Args:
        path: The file, in UTF-8.

    Raises:
        ValueError: As ``load_yaml``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a document in YAML, got {path}: it is no text in UTF-8") from error
    return load_yaml(text, str(path))


def check_yaml(text: str) -> None:
    """Refuse repeated keys, and what takes long to read: aliases to 10,000 nodes, nesting 100 deep, 1,000 digits.

    A few lines of nested aliases, or many aliases to one long text, can expand to more than fits in memory. Of a key
    that a mapping has twice the parser would take the last value in silence.

    Args:
        text: The document.

    Raises:
        ValueError: If the document exceeds one of these limits, or has a key twice in one mapping.
        yaml.YAMLError: If it is no YAML.
    """
    sizes: dict[str, int] = {}  # of anchors that are complete
    open_nodes: list[tuple[str | None, int]] = []
    count = repeated = 0
    for event in _of_distinct_keys(yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, 1)
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise ValueError(f"the alias *{event.anchor} stands inside of what it means")
            count, repeated = count + size, repeated + size
            if repeated > _MOST_REPEATED:
                raise ValueError(f"its aliases repeat more than {_MOST_REPEATED:,} nodes; write them out")
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
            if len(open_nodes) > _DEEPEST:
                raise ValueError(f"it is nested more than {_DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            if _LONG_NUMBER.fullmatch(event.value):
                raise ValueError("it has a number of more than 1,000 digits")
            size = 1 + len(event.value) // _OF_A_NODE
            count += size
            if event.anchor is not None:
                sizes[event.anchor] = size


def _of_distinct_keys(events: Iterable[Any]) -> Iterator[Any]:
    """Yield the events of a document; refuse a key that a mapping has twice: the parser would take the last."""
    open_nodes: list[tuple[set[tuple[str, str]] | None, int]] = []  # the keys of a mapping, and its nodes so far
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            open_nodes.pop()
        elif isinstance(event, yaml.NodeEvent) and open_nodes:
            keys, count = open_nodes[-1]
            open_nodes[-1] = keys, count + 1
            if keys is not None and count % 2 == 0 and isinstance(event, yaml.ScalarEvent):
                key = event.tag or _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit), event.value
                if key in keys and event.value != "<<":
                    line = event.start_mark.line + 1
                    raise ValueError(
                        f"it has the key {event.value[:40]!r} twice in one mapping, at line {line}; keep one"
                    )
                keys.add(key)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((set() if isinstance(event, yaml.MappingStartEvent) else None, 0))
        yield event


def yaml_cause(error: Exception) -> str:
    """Return what is wrong with a document, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        said = " ".join(filter(None, (error.context, error.problem)))
        return f"{said} at line {mark.line + 1}, column {mark.column + 1}"
    if isinstance(error, yaml.YAMLError | ValueError):
        return " ".join(str(error).split())[:200]
    return f"a value that does not fit its tag ({type(error).__name__})"
