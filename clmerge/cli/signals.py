"""Stop a command on Ctrl-C, SIGTERM or SIGHUP: unwind the stack and print one line.

In a SLURM job SIGUSR1 counts, too: ``sbatch --signal`` sends it before the time limit.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clmerge.names import tell

_NUMBERS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


class Stopped(BaseException):
    """Exception raised when a signal asks the process to end; temporary files are removed as the stack unwinds.

    It is not a ``KeyboardInterrupt``, because Lightning catches that and ends the process with exit code 1. A command
    that has a message for the user sets ``hint`` and raises the exception again.

    Args:
        number: The signal.

    Attributes:
        hint: What remains on disk, or how to continue.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.hint = ""


def run_until_stopped(name: str, run: Callable[[], int]) -> int:
    """Run a command; return its exit code, or 128 + the number of the signal that stopped it.

    Args:
        name: Name of the command in the message.
        run: The command.
    """
    stop = Stopped(signal.SIGINT)
    received: list[Stopped] = []
    try:
        with _raised(received):
            code = run()
        # If the exception is lost, for example in a destructor, the command may run to its end.
        if not received:
            return code
        stop = received[0]
    except Stopped as stopped:
        stop = stopped
    except SystemExit as end:
        # After a signal Lightning may also exit by itself, with code 0.
        if end.code or not received:
            raise
        stop = received[0]
    except Exception:
        # Raised inside a library's C code, the exception may be turned into an error of that library.
        if not received:
            raise
        stop = received[0]
    except KeyboardInterrupt:  # from code that had another handler installed
        pass
    word = "interrupted" if stop.number == signal.SIGINT else f"stopped by {signal.Signals(stop.number).name}"
    tell(f"clmerge {name}: {word}{stop.hint and f'; {stop.hint}'}")
    return 128 + stop.number


@contextmanager
def _raised(received: list[Stopped]) -> Iterator[None]:
    """Let signals raise ``Stopped`` and append it to ``received``; ignored signals (nohup) stay ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(Stopped(number))
        raise received[-1]

    before = {}
    try:
        for number in (*_NUMBERS, *((signal.SIGUSR1,) if "SLURM_JOB_ID" in os.environ else ())):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread, which alone may set handlers
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
