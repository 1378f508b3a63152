import os
import signal
import subprocess
import sys
import threading

import pytest

from clmerge.cli import COMMANDS
from clmerge.cli.signals import Stopped, run_until_stopped


@pytest.fixture(autouse=True)
def default_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGINT, "clmerge fit: interrupted; go on\n"),
        (signal.SIGTERM, "clmerge fit: stopped by SIGTERM; go on\n"),
        (signal.SIGHUP, "clmerge fit: stopped by SIGHUP; go on\n"),
    ],
)
def test_a_signal_unwinds_the_stack_and_is_the_exit_code(number, message, capsys):
    before = signal.getsignal(number)
    unwound = []

    def run():
        try:
            signal.raise_signal(number)
        except Stopped as stop:
            stop.hint = "go on"
            raise
        finally:
            unwound.append(True)

    assert run_until_stopped("fit", run) == 128 + number
    assert capsys.readouterr().err == message
    assert unwound
    assert signal.getsignal(number) is before


def as_error():
    try:
        signal.raise_signal(signal.SIGTERM)
    except Stopped:
        raise ValueError("could not determine the shape") from None


def as_exit_code():
    try:
        as_error()
    except ValueError:
        return 1


class Closing:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("code", [0, 1])
def test_a_signal_that_is_lost_in_a_destructor_is_the_exit_code(code, capsys):
    def run():
        Closing()
        return code

    assert run_until_stopped("compare", run) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("clmerge compare: stopped by SIGTERM\n")


@pytest.mark.parametrize("run", [as_error, as_exit_code])
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_is_still_what_ended_the_command(run, capsys):
    assert run_until_stopped("merge", run) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "clmerge merge: stopped by SIGTERM\n"


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_until_stopped("fit", lambda: signal.raise_signal(signal.SIGHUP) or 0) == 0


def test_a_keyboard_interrupt_of_another_handler_counts(capsys):
    def run():
        raise KeyboardInterrupt

    assert run_until_stopped("report", run) == 130
    assert capsys.readouterr().err == "clmerge report: interrupted\n"


def test_another_thread_keeps_the_handlers():
    found = []
    thread = threading.Thread(target=lambda: found.append(run_until_stopped("fit", lambda: 3)))
    thread.start()
    thread.join()
    assert found == [3]


ARGUMENT = {
    "fit": "--seed=1",
    "merge": "--threads=1",
    "sweep": "--seeds=0",
    "predict": "nothing image.png",
    "sign": "nothing --key=private.pem",
}  # the others take names of runs
IMPORTED = {"completion": "argparse", "inspect": "torch", "list": "argparse", "sign": "model_signing"}
AT_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), int(sys.argv[2]))
sys.meta_path.insert(0, Finder())
from clmerge.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("command", "module", "number"),
    [
        *((command, IMPORTED.get(command, "jsonargparse"), signal.SIGINT) for command in COMMANDS),
        ("merge", "torch.nn.modules", signal.SIGTERM),
    ],
)
def test_at_start_up(command, module, number):
    found = subprocess.run(
        [sys.executable, "-c", AT_IMPORT, module, str(int(number)), command, *ARGUMENT.get(command, "nothing").split()],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert found.returncode == 128 + number, found.stderr
    word = "interrupted" if number == signal.SIGINT else "stopped by SIGTERM"
    assert found.stderr == f"clmerge {command}: {word}\n"
