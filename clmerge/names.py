"""Names that come from folders, files and other programs: as text that is safe to show, and as names of files."""

import hashlib
import re
import sys
import unicodedata
from typing import TextIO

_JOINERS = "\u200c\u200d"  # scripts and emoji need them
_LONGEST = 120  # bytes of a file name, with room for endings within the 255 that file systems have
_UNSAFE = re.compile(r'[<>:"/\\|?*]')


def visible(text: str, *, keep: str = "") -> str:
    r"""Return text in which everything that steers a terminal or hides is written out as an escape.

    That is control characters and line ends, marks that change the direction of writing, other invisible formatting and
    halves of surrogate pairs.

    Args:
        text: Any text.
        keep: Characters to leave as they are, for example ``"\n\t"``.

    Example:
        >>> print(visible("\x1b[31mred\n"))
        \x1b[31mred\n
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(character if character in keep or _is_plain(character) else _escape(character) for character in text)


def tell(line: str, *, file: TextIO | None = None) -> None:
    """Print one line, to stderr unless a file is named, with :func:`visible` text alone: names in it may be anybody's.

    Args:
        line: The line.
        file: Where it goes.
    """
    print(visible(line), file=sys.stderr if file is None else file, flush=True)


def shown(name: str) -> str:
    """Return a name as it is shown to people: :func:`visible`, and in quotes if there is nothing to see.

    Example:
        >>> shown("cat"), shown("")
        ('cat', '""')
    """
    return visible(name) if name.strip() else f'"{visible(name)}"'


def shorten(name: str, length: int) -> str:
    """Return a name as it is shown, cut if it is longer than ``length`` characters.

    Example:
        >>> shorten("a long name", 8)
        'a long..'
    """
    name = shown(name)
    return name if len(name) <= length else name[: length - 2].rstrip() + ".."


def file_name(name: str) -> str:
    """Return a name as one part of a path: itself if that is safe on every system, else tidied, with a digest of it.

    Different names give different parts, and no part leads out of its folder, is hidden or too long.

    Example:
        >>> file_name("ties_density0.1"), file_name("../../x")
        ('ties_density0.1', '_.._x-9cdf6a50')
    """
    plain = _UNSAFE.sub("_", "".join(c if _is_plain(c) else "_" for c in name)).strip(" ").lstrip(".").rstrip(".")
    if plain == name and name and len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    start = plain.encode()[: _LONGEST - 9].decode(errors="ignore")
    return f"{start}-{digest}"


def _is_plain(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
