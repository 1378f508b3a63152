"""Report the failure of a command: a message for expected errors, a traceback for unexpected ones."""

import re
import sys
import traceback
from pathlib import Path

import clmerge
from clmerge.cli.messages import complain, traceback_of
from clmerge.names import tell

_PEER_GONE = re.compile(r"Connection (closed|reset) by peer|remote process exited")  # gloo, gloo, NCCL
_PACKAGE = Path(clmerge.__file__).resolve().parent


def is_foreseen(error: BaseException, *, started: bool = True) -> bool:
    """Return whether an error is meant for the user: raised by clmerge itself, or by the system (a full disk).

    Args:
        error: The error, as it was caught.
        started: Whether the work has begun. Before that, errors of libraries also count, because they are about
            settings.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        return False
    if not started:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).resolve().is_relative_to(_PACKAGE)


def say(command: str, error: Exception) -> None:
    """Print to stderr why a command failed, then the notes of the error: where it failed and how to continue.

    Args:
        command: Name of the command.
        error: The error that ended it.
    """
    if is_foreseen(error):
        complain(command, error)
        return
    if _PEER_GONE.search(str(error)):
        text = "ended since another process of this run did, which says why unless it was killed"
    else:
        print(traceback_of(error), file=sys.stderr, end="")
        text = f"ended by {type(error).__name__}, which is not foreseen; please report it"
    tell(f"clmerge {command}: {'; '.join([text, *getattr(error, '__notes__', ())])}")
