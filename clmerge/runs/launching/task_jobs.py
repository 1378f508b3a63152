"""The tasks of one stream as jobs: which streams allow it, and waiting for one task after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from clmerge.names import tell
from clmerge.results.run_folder import RunFolder
from clmerge.runs.launching.job import Job
from clmerge.runs.launching.launcher import Launcher
from clmerge.runs.learner_parts import LearnerParts
from clmerge.weights.parametrization import merged_parameters, running_statistics, unmerged_parameters


class TaskJobs:
    """Trains the tasks of a run by jobs, and gives the file of each when it is asked for it.

    Args:
        run: The run folder.
        launcher: Runs the jobs.
        job: Makes the job that trains a task.
    """

    def __init__(self, run: RunFolder, launcher: Launcher, job: Callable[[int], Job]) -> None:
        self.run = run
        self.launcher = launcher
        self.job = job
        self._running: Iterator[tuple[Job, int]] | None = None
        self._jobs: dict[int, Job] = {}
        self._left: list[Job] = []

    def start(self, tasks: Sequence[int]) -> None:
        """Name the tasks that the run still has to train; those that jobs have trained already are not trained again."""
        self._jobs = {task: self.job(task) for task in tasks}

    def wait(self, task: int) -> Path:
        """Return the file of a trained task, once there is one.

        Args:
            task: One of the tasks given to ``start``.

        Raises:
            RuntimeError: If the job of a task failed; the message ends with the last lines of its output.
        """
        mine = self._jobs[task]
        while not mine.done:
            if self._running is None:
                self._left = [job for job in self._jobs.values() if not job.done]
                tell(f"training {len(self._left)} of {len(self._jobs)} tasks by {type(self.launcher).__name__}")
                self._running = self.launcher.run([*self._left])
            job, code = next(self._running, (mine, 0))
            if code or (job is mine and not mine.done):  # the file of another one may be merged and removed already
                raise RuntimeError(job.failure(code))
            self._left.remove(job)
            tell(f"trained {job.name}: {len(self._left)} tasks are left")
        return Path(mine.commit)

    def close(self) -> None:
        """Stop the jobs that run; what they have trained is kept."""
        if self._running is not None:
            closing(self._running).__exit__()  # type: ignore[type-var]


def check_apart(learner: LearnerParts) -> None:
    """Refuse to train a stream's tasks apart from each other where a task depends on the one before.

    Raises:
        ValueError: Naming the setting.
    """
    module = learner.module
    merged = merged_parameters(module, module.trained_names) if learner.mergers else {}
    others = unmerged_parameters(module, merged)
    wrong = {
        f"learner.start_policy=base, got {learner.merge.start_policy!r}": learner.merge.start_policy != "base",
        f"data.replay=0, got {learner.data.replay}": bool(learner.data.replay),
        "no regularizers, which keep what they know of earlier tasks, got some": bool(module.regularizers),
        "a head that knows all classes, got one that learns them": not module.head.open_vocabulary,
        "a model without running statistics, got some": bool(running_statistics(module)),
        "no learner.trajectory, whose bytes only a fit knows, got one": learner.trajectory is not None,
        "weights to merge, got a frozen backbone": not learner.mergers,
        "that all trained weights are merged, got others": any(one.requires_grad for one in others.values()),
    }
    for expected, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"expected {expected}: a launcher trains the tasks apart from each other, so that none may depend on "
                "the one before; leave --launcher out"
            )
