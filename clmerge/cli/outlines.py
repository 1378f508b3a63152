"""Turn the messages of jsonargparse, which are outlines of many lines, into one sentence."""

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

_KEY = re.compile(r'Parser key "([^"]*)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_CALLABLE = re.compile(r"Type .*? expects a function or a callable class: ")
_UNION = "Does not validate against any of the Union subtypes"
_OUTLINE = re.compile(rf"Parser key|Problem with given class_path|{_UNION}|Subclass types expect")
_ENDS = re.compile(r"\.{1,2} Got value: (?:Namespace|NestedArg|\[Namespace)\(.*")  # what the parser made of the value
_GOT = re.compile(r"\.? Got value: ?(.*)")
_LONGEST = 300  # characters of a cause or a value
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}


@dataclass
class _Found:
    keys: list[str] = field(default_factory=list)
    kind: str = ""
    causes: list[str] = field(default_factory=list)
    value: str = ""


def plain(message: str) -> str:
    """Return an error message of jsonargparse as one sentence; other messages as they are, long lines cut.

    Example:
        >>> plain(chr(10).join(['Parser key "threads":', "  Expected a <class 'int'>. Got value: x"]))
        "expected a whole number for threads, got 'x'"
        >>> plain("unrecognized arguments: --speed=3")
        'expected known options, got --speed=3'
        >>> plain("any other")
        'any other'
    """
    if found := re.match(r"unrecognized arguments: (.*)", message):
        return f"expected known options, got {_cut(found[1])}"
    if found := re.match(r"argument (--[\w.-]+)\S*: (expected one argument|expected at least one argument)", message):
        return f"expected a value after {found[1]}, got none"
    if found := re.match(r"(--[\w.-]+): Expected a dot import path string: (.*)", message):
        return f"expected the name of a class for {found[1]}, got {_cut(found[2])!r}"
    if not _OUTLINE.search(message):
        return "\n".join(_cut(line, 4 * _LONGEST) for line in message.splitlines())
    outline = _read([line for line in message.splitlines() if line.strip()])
    return _sentence(outline)


def class_options(message: str) -> list[str] | None:
    """Return the arguments of the innermost class in a jsonargparse message; None if it names no class."""
    found = _CLASS.findall(message)
    if not found:
        return None
    module, _, name = found[-1].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return [*inspect.signature(kind).parameters] if inspect.isclass(kind) else None


def _read(lines: list[str]) -> _Found:
    """Read an outline: keys outermost first, the innermost class, and the causes."""
    found, position = _Found(), 0
    while position < len(lines):
        line = _CALLABLE.sub("", lines[position].strip().removeprefix("- "))
        position += 1
        if match := _KEY.match(line):
            found.keys += [match[1]] * (match[1] not in found.keys)
            line = match[2]
        if match := _CLASS.match(line):
            found.kind = match[1].rpartition(".")[2]
        elif line.startswith(_UNION):
            position = _read_union(lines, position, found)
        elif line.startswith("Subclass types expect one of"):
            break
        elif line.startswith("Given value:"):
            found.value = found.value or line.removeprefix("Given value:").strip()
        elif line and not line.startswith(("Given value type:", "Subtypes:", "Errors:")):
            found.causes.append(_ENDS.sub("", line))
    return found


def _read_union(lines: list[str], start: int, found: _Found) -> int:
    """Read the alternatives of a union from ``lines[start:]``; return where the outline goes on."""
    header = next((i for i in range(start, len(lines)) if lines[i].strip() == "Errors:"), start - 1)
    indent = _indent(lines[header])
    end = next((i for i in range(header + 1, len(lines)) if _indent(lines[i]) <= indent), len(lines))
    block = lines[header + 1 : end]
    depth = min((_indent(line) for line in block), default=0)
    starts = [i for i, line in enumerate(block) if _indent(line) == depth and line.strip().startswith("- ")]
    read = [_read(block[a:b]) for a, b in zip(starts, [*starts[1:], len(block)], strict=True)]
    read = [one for one in read if not all("<class 'NoneType'>" in cause for cause in one.causes)] or read
    deep = [one for one in read if one.kind or one.keys]
    for one in deep[:1] or read:
        found.keys += [key for key in one.keys if key not in found.keys]
        found.kind = one.kind or found.kind
        found.value = found.value or one.value
        found.causes += [cause for cause in one.causes if cause not in found.causes]
    return end


def _sentence(found: _Found) -> str:
    key = ".".join(found.keys)
    where, value = f" for {key}" if key else "", found.value
    if own := [cause for cause in found.causes if cause.startswith("expected ")]:
        return _cut(own[0], 4 * _LONGEST)
    types: list[str] = []
    others: list[str] = []
    for cause in found.causes:
        if match := re.search(r"Option '([^']+)' is not accepted", cause):
            return f"expected a setting of {found.kind or 'a class'}{where}, got {match[1]!r}"
        if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", cause):
            return f"expected an option of {match[1]}, got '{match[1]}.{match[2]}'"
        if match := re.search(r"arguments are required: (.*)|Key \"([^\"]+)\" is required", cause):
            what = match[1] or match[2]
            return f"expected a value of {what} for {found.kind or 'it'}{key and f' ({key})'}, got none"
        if "instantiatable class" in cause:
            return f"expected the name of a class{where} before its settings, got none"
        if match := re.search(r"dot import path string: (.*)", cause):
            types, value = [*types, "the name of a class"], match[1]
        elif match := re.match(r"Expected a typing\.Literal\[(.*?)\]", cause):
            types += match[1].split(", ")
        elif match := re.match(r"Expected an? (?:<class ')?(?:\w+\.)*(\w+)(?:'>|\.|$)", cause):
            types.append(_WORDS.get(match[1], match[1]))
        elif match := re.search(r"Not a valid subclass of (\w+)", cause):
            types.append(f"a {match[1]}")
        elif match := re.match(r"Unable to load config '(.*)'", cause):
            types, value = ["settings, or a file with settings"], match[1]
        elif match := re.match(r"File does not exist: '?(.*?)'?$", cause):
            types, value = ["a file"], match[1]
        else:
            others.append(cause)
            continue
        if match := _GOT.search(cause):
            value = match[1]
    if others and all("Not a valid subclass" in cause for cause in found.causes if cause not in others):
        types = []  # the class is of the kind that is expected, and refuses its settings
    if types:
        return f"expected {_joined(dict.fromkeys(types))}{where}, got {_shown(value)}"
    cause = _cut(others[0]) if others else "no value that fits"
    inside = f"{found.kind}: " if found.kind else ""
    got = f"; got {_cut(value)}" if value and not value.startswith(("Namespace(", "NestedArg(", "[Namespace(")) else ""
    return f"{key and f'{key}: '}{inside}{cause}{got}"


def _joined(words: Iterable[str]) -> str:
    *rest, last = words
    return ", ".join(rest) + (" or " if rest else "") + last


def _shown(value: str) -> str:
    """Return a value as text, or from the inside of the parser's own objects."""
    if nested := re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", value):
        return _cut(nested[1])
    return _cut(repr(value) if not value.startswith(("[", "{", "Namespace(")) else value)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest + 3 else f"{text[:longest]}..."
