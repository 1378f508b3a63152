"""Turn untrusted names, from folders, files and other programs, into text that is safe to print and into file names."""

import difflib
import hashlib
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

_JOINERS = "\u200c\u200d"  # kept, because some scripts and emoji need them
_LABEL = 24  # characters of a task's name that is shown as it is
_OF_CLASS = 20  # characters of a class's name in the name of a task
_LONGEST = 120  # bytes of a file name; leaves room for extensions within the 255 bytes of file systems
_UNSAFE = re.compile(r'[<>:"/\\|?*]')


def visible(text: str, *, keep: str = "") -> str:
    r"""Return text with control characters and invisible characters written as escapes.

    These are control characters and line ends, marks that change the direction of writing, other invisible formatting
    and halves of surrogate pairs.

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


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """Return the end of an error message that names the word nearest to an unknown one; empty if none is near.

    Args:
        word: The unknown word.
        words: The known ones.

    Example:
        >>> did_you_mean("magmx", ["ties", "magmax"])
        "; did you mean 'magmax'?"
    """
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def tell(line: str, *, file: TextIO | None = None) -> None:
    """Print one line with :func:`visible`, because names in it may be untrusted.

    Args:
        line: The line.
        file: Destination; default stderr.
    """
    print(visible(line), file=sys.stderr if file is None else file, flush=True)


def duration(seconds: float) -> str:
    """Return a duration for readers.

    Example:
        >>> duration(5), duration(300), duration(9000)
        ('5 s', '5 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def without_secret(text: str, secret: str) -> str:
    """Replace a secret that is quoted in a text by the beginning of its SHA-256, which tells secrets apart.

    Args:
        text: The ``repr`` of an object with the secret.
        secret: The secret.

    Example:
        >>> without_secret("Probe(key='mine')", "mine")
        "Probe(key='sha256:3fd30542fe3f')"
    """
    return text.replace(repr(secret), f"'sha256:{hashlib.sha256(secret.encode()).hexdigest()[:12]}'")


def shown(name: str) -> str:
    """Return a name for display: :func:`visible`, and in quotes if it is empty or blank.

    Example:
        >>> shown("cat"), shown("")
        ('cat', '""')
    """
    return visible(name) if name.strip() else f'"{visible(name)}"'


def shorten(name: str, length: int) -> str:
    """Return a name for display, cut to ``length`` characters if it is longer.

    Example:
        >>> shorten("a long name", 8)
        'a long..'
    """
    name = shown(name)
    return name if len(name) <= length else name[: length - 2].rstrip() + ".."


def safe_name(text: str) -> str:
    """Return the text with all characters except letters and digits of any script and ``.`` replaced by ``_``.

    Accented letters are composed, because file systems differ in their normalisation.

    Example:
        >>> safe_name("T-shirt/top")
        'T_shirt_top'
    """
    composed = unicodedata.normalize("NFC", text)
    kept = "".join(char if char == "." or unicodedata.category(char)[0] in "LMN" else "\0" for char in composed)
    return re.sub("\0+", "_", kept).strip("_.") or "_"


def task_label(index: int, name: str, classes: Sequence[str], *, numbered: bool = True) -> str:
    """Return the name of a task for readers: as it is if it is short, else its first classes and their number.

    Args:
        index: Position of the task, from 0.
        name: Its name, which identifies it.
        classes: Names of its classes.
        numbered: Whether a name that was shortened begins with the number of the task, which tells it from others.

    Example:
        >>> classes = ["100 km/h speed limit", "120 km/h speed limit", *"abcdef"]
        >>> task_label(2, "100_km_h_speed_limit-120_km_h_speed_limit-and-6", classes)
        '3: 100 km/h speed limit ... (8 classes)'
        >>> task_label(0, "zero-one", ["zero", "one"]), task_label(0, "street_scenes_by_night_in_rain", ["ant"])
        ('zero-one', '1: street_scenes_by_night..')
    """
    if len(name) <= _LABEL:
        return shown(name)
    if not classes or not name.startswith(safe_name(classes[0])[:_OF_CLASS]):  # it is not made of the classes
        text = shorten(name, _LABEL)
    else:
        fitting = [count for count in range(1, len(classes) + 1) if len(", ".join(classes[:count])) <= _LABEL]
        count = max(fitting, default=1)
        first = shorten(", ".join(classes[:count]), _LABEL)
        rest = "" if count == len(classes) else f"{'' if first.endswith('..') else ' ...'} ({len(classes)} classes)"
        text = first + rest
    return f"{index + 1}: {text}" if numbered else text


def file_name(name: str) -> str:
    """Return a name as one part of a path: unchanged if it is safe on every system, else cleaned, with a digest.

    Different names yield different parts; no part leads out of its folder, is hidden or is too long.

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
