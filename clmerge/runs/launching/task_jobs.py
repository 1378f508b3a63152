"""The tasks of one stream as jobs: which streams allow it, and waiting for one task after the other."""

from collections.abc import Callable, Sequence

from clmerge.runs.launching.job import Job
from clmerge.runs.launching.launcher import Launcher
from clmerge.runs.launching.pending import Pending
from clmerge.runs.learner_parts import LearnerParts
from clmerge.weights.parametrization import merged_parameters, running_statistics, unmerged_parameters


class TaskJobs(Pending):
    """Trains the tasks of a run by jobs, and gives the file of each when it is asked for it.

    Args:
        launcher: Runs the jobs.
        job: Makes the job that trains a task.
    """

    def __init__(self, launcher: Launcher, job: Callable[[int], Job]) -> None:
        super().__init__(launcher)
        self.job = job

    def start(self, tasks: Sequence[int]) -> None:
        """Name the tasks that the run still has to train; what jobs have trained already is not trained again."""
        self.name({task: self.job(task) for task in tasks}, "tasks")


def check_apart(learner: LearnerParts) -> None:
    """Refuse to train a stream's tasks apart from each other where a task depends on the one before.

    Raises:
        ValueError: Naming the setting.
    """
    if expected := dependence(learner):
        raise ValueError(
            f"expected {expected}: a launcher trains the tasks apart from each other, so that none may depend on "
            "the one before, or the learner.branches of one task after the other; leave --launcher out"
        )


def dependence(learner: LearnerParts) -> str | None:
    """Return by what a task of a stream depends on the one before, as the end of a message; None if none does."""
    module = learner.module
    merged = merged_parameters(module, module.trained_names) if learner.mergers else {}
    others = unmerged_parameters(module, merged)
    branches_at = learner.branch_starts if learner.branches > 1 else "task"
    wrong = {
        f"learner.start_policy=base, got {learner.merge.start_policy!r}": learner.merge.start_policy != "base",
        f"learner.branch_starts=task, got {branches_at!r}": branches_at != "task",
        f"data.replay=0, got {learner.data.replay}": bool(learner.data.replay),
        "no regularizers, which keep what they know of earlier tasks, got some": bool(module.regularizers),
        "a head that knows all classes, got one that learns them": not module.head.open_vocabulary,
        "a model without running statistics, got some": bool(running_statistics(module)),
        "weights to merge, got a frozen backbone": not learner.mergers,
        "that all trained weights are merged, got others": any(one.requires_grad for one in others.values()),
    }
    return next((expected for expected, is_wrong in wrong.items() if is_wrong), None)
