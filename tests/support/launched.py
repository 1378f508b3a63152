"""Runs of ``clmerge fit --launcher`` whose processes are killed: starting, finding and comparing them."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.records import record, without_times

LONGEST = 3000  # seconds of a run on a machine that has much else to do
LOCAL = ["--launcher=local", "--launcher.jobs=2"]


@contextmanager
def commands(config) -> Iterator:
    """Yield a function that starts a command; a test that fails leaves none of them behind."""
    started = []

    def begin(run, *words):
        command = ["-W", "ignore", "-m", "clmerge", "fit", "--config", str(config), "--run_dir", str(run)]
        started.append(
            subprocess.Popen(
                [sys.executable, *command, "--auto_resume", *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    try:
        yield begin
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def wait_for(condition, seconds=600):
    """Return what a condition is once it is true."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def jobs_of(run):
    """Process ids of the jobs that run at present, by their task, or their task and branch."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdecimal() else []
        except OSError:  # it has ended
            continue
        if "clmerge.cli.train_task" in words and str(run) in words:
            found[tuple(int(word) for word in words[words.index(str(run)) + 1 :] if word)] = int(entry.name)
    return found


def parent(pid):
    """Return the process that started a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def assert_same_bits(run, alone, files):
    """Compare the results of two runs, some of their files bit for bit, and that no job left anything."""
    assert without_times(record(run))["models"] == without_times(record(alone))["models"]
    for name in files:
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert not [*run.glob("jobs/*")]
