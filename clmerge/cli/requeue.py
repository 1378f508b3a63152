"""Requeue the SLURM job of a run that SIGUSR1 stopped, which ``sbatch --signal`` sends before the time limit."""

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clmerge.cli.signals import Stopped


def requeue_hint(stop: "Stopped", hint: str, *, repeatable: bool, writes: bool) -> str:
    """Requeue the job if it can repeat its command; return what to add to the message of the stopped command.

    Args:
        stop: The signal.
        hint: What the message would be otherwise.
        repeatable: Whether the same command resumes the run (``--auto_resume``).
        writes: Whether this is the first process of the run, which requeues for all.
    """
    if stop.number != signal.SIGUSR1 or not writes:
        return hint
    if not repeatable:
        return f"{hint}; with --run_dir and --auto_resume the job would have been requeued"
    job = _job()
    if job is None or (scontrol := shutil.which("scontrol")) is None:
        return f"{hint}; expected scontrol to requeue the job, got none: submit it again"
    done = subprocess.run([scontrol, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        return f"{hint}; scontrol did not requeue job {job} ({reason}): submit it again"
    return f"job {job} is requeued and will resume the run"


def _job() -> str | None:
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")
