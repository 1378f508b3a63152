"""Error messages of commands: one line with one cause and the key it concerns."""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator

from clmerge.names import visible

DEBUG_VARIABLE = "CLMERGE_DEBUG"  # if set, the traceback of every error is shown
_KEY = re.compile(r'Parser key "([^"]*)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_VALUE = re.compile(r"Given value: (.*)")
_TYPE = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
_OUTLINE = re.compile(r"Parser key|Problem with given class_path|Does not validate against|Subclass types expect")
_LONGEST = 300  # characters of a cause or a value


def complain(name: str, error: BaseException, hint: str = "") -> int:
    """Print why a command failed, on stderr, and return the exit code 1.

    Args:
        name: Name of the command.
        error: The error that ended it.
        hint: Text after the cause.
    """
    if os.environ.get(DEBUG_VARIABLE):
        print(traceback_of(error), file=sys.stderr, end="")
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    message = str(error)
    if isinstance(error, OSError) and str(error.strerror).startswith("expected"):
        message = str(error.strerror)  # clmerge's own sentence, without the number of the error
    text = visible(f"{condensed(message)}{notes}{hint}", keep="\n")
    print(f"clmerge {name}: {text}", file=sys.stderr)
    return 1


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error as text for a terminal."""
    return visible("".join(traceback.format_exception(error)), keep="\n")


def condensed(message: str) -> str:
    """Return the cause, with its key, from a jsonargparse message, which may be an outline of many lines.

    Example:
        >>> outline = ['Parser key "threads":', "  Expected a <class 'int'>. Got value: x"]
        >>> condensed(chr(10).join(outline))
        'threads: Expected int. Got value: x'
        >>> condensed("plain")
        'plain'
    """
    if not _OUTLINE.search(message):
        return "\n".join(_shortened(line, 4 * _LONGEST) for line in message.splitlines())
    keys, value, causes = [], "", []
    for line in _relevant([line for line in message.splitlines() if line.strip()]):
        if found := _KEY.match(line):
            keys.append(found[1])
            causes += [_shortened(found[2])] * bool(found[2])
        elif found := _CLASS.match(line):
            keys.append(found[1].rpartition(".")[2])
        elif found := _VALUE.match(line):
            value = found[1]
        else:
            causes.append(_shortened(_TYPE.sub(r"\1", line).replace("Expected a ", "Expected ")))
    causes = causes or ["no value that fits"]
    where = "".join(f"{key}: " for key in keys)
    got = f"; got {_shortened(value)}" if value and "Got value" not in causes[0] and "NestedArg(" not in value else ""
    return f"{where}{causes[0]}{got}"


def class_options(message: str) -> list[str] | None:
    """Return the arguments of the innermost class in a jsonargparse message; None if it names no class."""
    found = _CLASS.findall(message)
    if not found:
        return None
    module, _, name = found[-1].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return [*inspect.signature(kind).parameters] if inspect.isclass(kind) else None


def _relevant(lines: list[str]) -> Iterator[str]:
    """Yield the lines that state the cause, outermost first; of alternatives, only the lines of the best one."""
    position = 0
    while position < len(lines):
        line = lines[position].strip()
        position += 1
        if line.startswith("Does not validate against any of the Union subtypes"):
            end = next((i for i in range(position, len(lines)) if _VALUE.match(lines[i].strip())), len(lines))
            yield from _relevant(_best([*lines[position:end]]))
        elif line.startswith("Subclass types expect one of"):
            return
        elif not line.startswith(("Subtypes:", "Errors:", "Given value type:")):
            yield line


def _best(lines: list[str]) -> list[str]:
    """Return the lines of the longest alternative, without its bullet; one about None only if there is no other."""
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("- ")]
    if not starts:
        return lines
    indent = min(len(lines[i]) - len(lines[i].lstrip()) for i in starts)
    starts = [i for i in starts if len(lines[i]) - len(lines[i].lstrip()) == indent]
    options = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    best = max(options, key=lambda option: ("NoneType" not in option[0], len(option)))
    return [best[0].lstrip().removeprefix("- "), *best[1:]]


def _shortened(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest + 3 else f"{text[:longest]}..."
