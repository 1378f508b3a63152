"""Run ``clmerge fit`` in children that kill themselves (SIGKILL) at chosen instants, and resume every one of them.

A child is forked from a process that has imported everything, so that a dozen runs cost seconds. Called as
``kill_driver.py CONFIG OUT [POINT ...]``; writes ``OUT/whole`` (never killed), ``OUT/POINT`` for the kill points, and
``OUT/codes.json`` with the exit codes of the killed and of the resumed process.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from unittest import mock

import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

import clmerge.cli.fit as fit  # noqa: E402
import clmerge.runs.learner  # noqa: E402
from clmerge.callbacks import MergeCallback  # noqa: E402
from clmerge.callbacks.progress import EpochLines  # noqa: E402
from clmerge.runs.learner import Learner  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_on(call: int, original, *, after: bool = False):
    """Wrap a function so that its ``call``-th call (from 1) kills the process, before or after doing its work."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call and not after:
            die()
        result = original(*args, **kwargs)
        if count == call:
            die()
        return result

    return wrapped


def torn(call: int, original):
    """Wrap a function that writes to a path so that its ``call``-th call leaves half a file and dies."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        result = original(*args, **kwargs)
        if count == call:
            file = args[1]._file  # open for writing
            file.truncate(file.tell() // 2)
            die()
        return result

    return wrapped


# torch.save is called once per epoch (two epochs a task) for Lightning's checkpoint and once per task for the state.
POINTS = {
    "in the first epoch": (EpochLines, "on_train_batch_start", lambda f: die_on(2, f)),
    "between the last checkpoint of the first task and its merge": (MergeCallback, "_merge", lambda f: die_on(1, f)),
    "between epochs of the first task": (EpochLines, "on_train_batch_start", lambda f: die_on(9, f)),
    "between epochs": (EpochLines, "on_train_batch_start", lambda f: die_on(15, f)),
    "inside a checkpoint write": (torch, "save", lambda f: torn(5, f)),
    "between the last checkpoint and the merge": (MergeCallback, "_merge", lambda f: die_on(2, f)),
    "between the merge and its commit": (MergeCallback, "_merge", lambda f: die_on(2, f, after=True)),
    "inside the commit of the state": (torch, "save", lambda f: torn(6, f)),
    "between the merge and the evaluation": (Learner, "_evaluate", lambda f: die_on(2, f)),
    "between the evaluation and the logging": (Learner, "_evaluate", lambda f: die_on(2, f, after=True)),
    "before the last commit": (Learner, "_finish", lambda f: die_on(1, f)),
}


def forked(work) -> int:
    """Run ``work`` in a child; return its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main() -> None:
    config, out = sys.argv[1], Path(sys.argv[2])
    clmerge.runs.learner.save_plots = lambda results, folder: []  # drawn elsewhere; seconds each
    codes = {"whole": [forked(lambda: fit.main(["--config", config, "--run_dir", str(out / "whole")]))]}
    for point in sys.argv[3:] or POINTS:
        owner, name, wrap = POINTS[point]
        folder = str(out / point)

        def killed(owner=owner, name=name, wrap=wrap, folder=folder) -> int:
            with mock.patch.object(owner, name, wrap(getattr(owner, name))):
                return fit.main(["--config", config, "--run_dir", folder])

        codes[point] = [forked(killed), forked(lambda folder=folder: fit.main(["--resume", folder]))]
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
