"""What a command says when it fails: one message for what was foreseen, a traceback for what was not."""

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
    """Tell whether an error is a message for the user: raised by clmerge itself, or by the system (a full disk).

    Args:
        error: The error, which was raised.
        started: Whether the work has begun; before, libraries speak to the user, too, about settings of theirs.
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
    """Print why a command failed, where, and how to go on, to stderr; the last two are the notes of the error.

    Args:
        command: Name of the command.
        error: What ended it.
    """
    if is_foreseen(error):
        complain(command, error)
        return
    if _PEER_GONE.search(str(error)):
        text = "ended since another process of this run did, which says above why"
    else:
        print(traceback_of(error), file=sys.stderr, end="")
        text = f"ended by {type(error).__name__}, which is not foreseen; please report it"
    tell(f"clmerge {command}: {'; '.join([text, *getattr(error, '__notes__', ())])}")
