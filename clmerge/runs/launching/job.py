"""A job: a command that can be repeated, and the file that says that it is done."""

import os
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from clmerge.results.run_manifest import read_manifest

PARENT_VARIABLE = "CLMERGE_PARENT"  # the process with which a job ends, see clmerge.cli.parent
# What tells a process its place among others; a job is alone.
_PLACES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "ROLE_RANK"}
_PLACES |= {"JSM_NAMESPACE_RANK", "MASTER_ADDR", "MASTER_PORT", "CLMERGE_RUN_DIR", "PYTORCH_KERNEL_CACHE_PATH"}
_PREFIXES = ("SLURM_", "TORCHELASTIC_", "RAY_JOB", "OMPI_", "PMI_")
_KILLED = 128  # exit codes of a shell for a signal are above, those of subprocess below 0


@dataclass(frozen=True)
class Job:
    """A command that does the same whenever it is repeated, and goes on where it was killed.

    Attributes:
        name: What it is called in messages.
        command: The command and its arguments.
        log: File to which the output of the command is appended.
        commit: File that appears, by rename, when the job is done.
        folder: Folder in which the command starts.
        variables: Environment variables of the command, beside those of the process that starts it.
    """

    name: str
    command: tuple[str, ...]
    log: str
    commit: str
    folder: str
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def done(self) -> bool:
        """Whether the job has committed."""
        return Path(self.commit).is_file()

    def failure(self, code: int) -> str:
        """Describe how the job ended, with the last lines of its output.

        Args:
            code: Its exit code.
        """
        log = Path(self.log)
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:] if log.is_file() else []
        ended = f"signal {_signal(code)}" if was_killed(code) else f"exit code {code}"
        return f"expected {self.name} to be done by a job, got {ended}; its output is in {self.log}: {' / '.join(tail)}"


class RunJob(Job):
    """A job that is a whole run, which is done when its manifest says so."""

    @property
    @override
    def done(self) -> bool:
        return super().done and read_manifest(Path(self.commit)).finished


class Processes:
    """The processes that run jobs at present; ``stop`` ends them, and starts no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def run(self, job: Job, variables: Mapping[str, str]) -> int:
        """Run the command of a job; return its exit code, below 0 for a signal.

        Args:
            job: The job.
            variables: More environment variables.
        """
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        with Path(job.log).open("ab") as log:
            with self._lock:
                if self.stopped:
                    return -1
                process = subprocess.Popen(
                    job.command,
                    env={**job_environment(os.environ), **dict(job.variables), **variables},
                    cwd=job.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def repeat(self, job: Job, retries: int, variables: Mapping[str, str] | None = None) -> int:
        """Run a job until it is done or fails by itself, again after a signal; return the last exit code.

        Args:
            job: The job.
            retries: How often it is started again.
            variables: More environment variables.
        """
        code = 0
        for _ in range(retries + 1):
            if job.done:
                return 0
            code = self.run(job, variables or {})
            if not was_killed(code) or self.stopped:
                break
        return code

    def stop(self) -> None:
        """Ask the running processes to end; they keep what they have on disk."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


def was_killed(code: int) -> bool:
    """Return whether an exit code says that a signal ended the process, rather than an error of its own."""
    return code < 0 or code > _KILLED


def job_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job: without what tells this process its place among others.

    Args:
        variables: Environment of this process.

    Example:
        >>> job_environment({"SLURM_PROCID": "3", "RANK": "1", "HOME": "/root"}).keys() - {"CLMERGE_PARENT"}
        {'HOME'}
    """
    kept = {k: v for k, v in variables.items() if k not in _PLACES and not k.startswith(_PREFIXES)}
    return kept | {PARENT_VARIABLE: str(os.getpid())}


def _signal(code: int) -> int:
    return -code if code < 0 else code - _KILLED
