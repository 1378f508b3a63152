"""Print why a command failed, in one line."""

import os
import sys
import traceback

from clmerge.cli.outlines import plain
from clmerge.names import visible

DEBUG_VARIABLE = "CLMERGE_DEBUG"  # if set, the traceback of every error is shown


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
    text = visible(f"{plain(message)}{notes}{hint}", keep="\n")
    print(f"clmerge {name}: {text}", file=sys.stderr)
    return 1


def traceback_of(error: BaseException) -> str:
    """Return the traceback of an error as text for a terminal."""
    return visible("".join(traceback.format_exception(error)), keep="\n")
