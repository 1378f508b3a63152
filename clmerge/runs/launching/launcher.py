"""The interface of what runs jobs."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from clmerge.runs.launching.job import Job


class Launcher(ABC):
    """Runs jobs, several at a time, and starts one again that a signal or a lost machine ended.

    Args:
        jobs: How many jobs run at a time.
        retries: How often a job is started again. A job that ends with an error of its own is not.
    """

    def __init__(self, jobs: int = 2, retries: int = 3) -> None:
        if jobs < 1 or retries < 0:
            raise ValueError(f"expected 1 job or more at a time and 0 retries or more, got {jobs} and {retries}")
        self.jobs = jobs
        self.retries = retries

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> Generator[tuple[Job, int]]:
        """Yield every job and its exit code as it ends; closing the iterator stops those that run.

        Args:
            jobs: The jobs, the most urgent first.
        """

    @contextmanager
    def session(self) -> Iterator[None]:
        """Hold what jobs run on for a block, so that several ``run`` in it start that once."""
        yield
