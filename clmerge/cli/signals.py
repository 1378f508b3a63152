"""What stops a command from outside: Ctrl-C, SIGTERM and SIGHUP unwind the stack, and say so in one line."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clmerge.names import tell

_NUMBERS = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))


class Stopped(BaseException):
    """A signal asks the process to end; on its way up, temporary files are removed.

    No ``KeyboardInterrupt``: Lightning ends the process itself, with exit code 1, when it sees one. A command that has
    something to say sets ``hint`` and raises it again.

    Args:
        number: The signal.

    Attributes:
        hint: What is left, or how to go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.hint = ""


def run_until_stopped(name: str, run: Callable[[], int]) -> int:
    """Run a command; return its exit code, or 128 + the number of the signal that stopped it.

    Args:
        name: What the command is called in the message.
        run: The command.
    """
    stop = Stopped(signal.SIGINT)
    received: list[Stopped] = []
    try:
        with _raised(received):
            code = run()
        # Where the exception is lost, in a destructor for instance, the command may come to its end.
        if not received:
            return code
        stop = received[0]
    except Stopped as stopped:
        stop = stopped
    except SystemExit as end:
        # Then Lightning may also end by itself, and with success.
        if end.code or not received:
            raise
        stop = received[0]
    except Exception:
        # Raised within a library's C code, it may come out as an error of that library.
        if not received:
            raise
        stop = received[0]
    except KeyboardInterrupt:  # from where the handler was another one
        pass
    word = "interrupted" if stop.number == signal.SIGINT else f"stopped by {signal.Signals(stop.number).name}"
    tell(f"clmerge {name}: {word}{stop.hint and f'; {stop.hint}'}")
    return 128 + stop.number


@contextmanager
def _raised(received: list[Stopped]) -> Iterator[None]:
    """Let the signals raise ``Stopped``, and note it; those that are ignored, as under nohup, stay so."""

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(Stopped(number))
        raise received[-1]

    before = {}
    try:
        for number in _NUMBERS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    except ValueError:  # not in the main thread: whoever runs there decides
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
