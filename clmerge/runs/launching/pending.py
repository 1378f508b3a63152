"""Jobs that run at the same time, and waiting for one after the other."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from clmerge.names import tell
from clmerge.runs.launching.job import Job
from clmerge.runs.launching.launcher import Launcher


class Pending:
    """The jobs of a run that are still to be done; each is waited for when its result is needed.

    Args:
        launcher: Runs the jobs.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self._session = ExitStack()  # what jobs run on, which several rounds of them share
        self._run = ExitStack()
        self._running: Iterator[tuple[Job, int]] = iter(())
        self._begun = False
        self._what = ""
        self._jobs: dict[int, Job] = {}
        self._left: list[Job] = []

    def name(self, jobs: Mapping[int, Job], what: str) -> None:
        """Name the jobs to come, in place of earlier ones, all of which were waited for; they begin at the first wait.

        Args:
            jobs: The jobs by number, the most urgent first; what is done is not done again.
            what: What they train, in the plural.
        """
        self._run.close()
        self._jobs, self._what, self._begun, self._left = dict(jobs), what, False, []

    def wait(self, number: int) -> Path:
        """Return the file of a job, once it is there and the process that wrote it has ended.

        Args:
            number: One of those given to ``name``.

        Raises:
            RuntimeError: If a job failed; the message ends with the last lines of its output.
        """
        mine = self._jobs[number]
        if not self._begun and not mine.done:
            self._begun = True
            self._left = [job for job in self._jobs.values() if not job.done]
            tell(f"training {len(self._left)} of {len(self._jobs)} {self._what} by {type(self.launcher).__name__}")
            self._session.enter_context(self.launcher.session())
            self._running = self.launcher.run([*self._left])
            self._run.enter_context(closing(self._running))
        while mine in self._left:  # its folder is removed next: a process in it would be in the way
            job, code = next(self._running, (mine, 0))
            if code or not job.done:
                raise RuntimeError(job.failure(code))
            self._left.remove(job)
            tell(f"trained {job.name}: {len(self._left)} {self._what} are left")
        return Path(mine.commit)

    def close(self) -> None:
        """Stop the jobs that run; what they have trained is kept."""
        self._run.close()
        self._session.close()
        self._left = []
