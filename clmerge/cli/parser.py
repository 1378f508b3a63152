"""A jsonargparse parser whose errors name the nearest valid option, and whose help can be printed from a file."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

from argparse import RawDescriptionHelpFormatter

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from typing_extensions import override


class CommandFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Leave examples under the options as they are written."""


class CommandParser(ArgumentParser):
    """An argument parser of one command."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and the nearest valid words, without the usage, and exit with 2."""
        text = message if ex is None else str(ex)
        hint = suggestion(text, option_names(self), self.choices())
        self.exit(2, f"{self.prog}: {text.strip()}\n{hint}Options: {self.prog} --help\n")
        raise AssertionError("exit returned")

    def choices(self) -> list[str]:
        """Class names that may be given as values; the nearest one is offered for a misspelt class."""
        return []


def option_names(parser: ArgumentParser) -> list[str]:
    """Return the dotted names of all options of a parser."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]


def suggestion(message: str, options: Sequence[str], classes: Iterable[str]) -> str:
    """Return a line that names the nearest option or class to the words quoted in an error message, or nothing.

    Example:
        >>> suggestion("Unrecognized arguments: --learner.start_polcy=base", ["learner.start_policy"], [])
        'Did you mean --learner.start_policy?\\n'
    """
    words = re.findall(r"--([\w.]+)", message) + re.findall(r"[\"'`]([\w.]+)[\"'`]", message)
    for word in words:
        if word in options:
            continue
        if near := difflib.get_close_matches(word, options, n=1, cutoff=0.75):
            return f"Did you mean --{near[0]}?\n"
        if near := difflib.get_close_matches(word.lower(), [c.lower() for c in classes], n=1, cutoff=0.6):
            return f"Did you mean {next(c for c in classes if c.lower() == near[0])}?\n"
    return ""
