"""The options and classes of the commands, from a generated file: what is known without importing torch."""

import difflib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

FILE = Path(__file__).parent / "options.json"

Type: TypeAlias = str | Mapping[str, Any]
"""A word (``int``, ``float``, ``bool``, ``str``, ``null``, ``any``, ``flag``, ``config``, ``group``), or a mapping with
one entry: ``choices``, ``kind`` (a class by name), ``list``, ``words`` (several on the command line) or ``union``."""


class OptionTable:
    """What scripts/update_generated.py found in the parsers.

    Args:
        table: The content of the file.

    Attributes:
        commands: By command: ``positionals``, and ``options`` by name without ``--``.
        kinds: By base class: import paths of its classes by name.
        classes: By import path: ``summary``, ``needs`` and ``options``, the types of its settings by name.
        methods: Summaries of the files in ``configs/methods`` by name.
        scenarios: Summaries of the files in ``configs/scenarios`` by name.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.commands: Mapping[str, Mapping[str, Any]] = table["commands"]
        self.kinds: Mapping[str, Mapping[str, str]] = table["kinds"]
        self.classes: Mapping[str, Mapping[str, Any]] = table["classes"]
        self.methods: Mapping[str, str] = table["methods"]
        self.scenarios: Mapping[str, str] = table["scenarios"]
        self._versions: Mapping[str, str] = table["versions"]
        self._same: bool | None = None

    def settings(self, path: str) -> Mapping[str, Type]:
        """Return the types of a class's settings by name."""
        found: Mapping[str, Type] = self.classes[path]["options"]
        return found

    @property
    def same_versions(self) -> bool:
        """Whether the packages whose classes are in the table have the versions that it was made with."""
        if self._same is None:
            self._same = all(_version(package) == version for package, version in self._versions.items())
        return self._same

    def is_sure(self, path: str) -> bool:
        """Return whether a class, given by its import path, has exactly the settings that the table says."""
        return path.startswith("clmerge.") or self.same_versions

    def is_complete(self, kind: str) -> bool:
        """Return whether the table has all classes of a kind."""
        return all(path.startswith("clmerge.") for path in self.kinds[kind].values()) or self.same_versions


@cache
def option_table() -> OptionTable:
    """Return the table of this version."""
    return OptionTable(json.loads(FILE.read_text(encoding="utf-8")))


def nearest(word: str, words: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the word most similar to ``word``, ignoring case; None if none is similar.

    Dotted names in the same group are told apart by their last part, and a word without dots is compared with the last
    parts of dotted names, too, since these are what people remember.

    Example:
        >>> nearest("teis", ["MagMax", "TIES"]), nearest("max_epoch", ["trainer.max_epochs", "trainer.max_steps"])
        ('TIES', 'trainer.max_epochs')
        >>> nearest("trainer.logger", ["trainer.profiler", "seed"])
    """
    best, score = None, 0.0
    for candidate in words:
        ratio = _similarity(word.lower(), candidate.lower())
        if ratio > score:
            best, score = candidate, ratio
    return best if score >= cutoff else None


def _similarity(word: str, candidate: str) -> float:
    group, _, name = word.rpartition(".")
    other, _, tail = candidate.rpartition(".")
    if group == other:
        return difflib.SequenceMatcher(None, name, tail).ratio()
    whole = difflib.SequenceMatcher(None, word, candidate).ratio()
    # The same name elsewhere comes after a similar name in place.
    return max(whole, difflib.SequenceMatcher(None, name, tail).ratio() - 0.01) if not group else whole


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
