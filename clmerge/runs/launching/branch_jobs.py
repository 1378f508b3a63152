"""The branches of one task after the other as jobs: those of a round start alike and do not depend on each other."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from clmerge.results.run_folder import RunFolder
from clmerge.runs.launching.job import Job
from clmerge.runs.launching.launcher import Launcher
from clmerge.runs.launching.pending import Pending
from clmerge.runs.learner_parts import LearnerParts
from clmerge.weights import TaskVector, save_torch


@dataclass(frozen=True)
class RoundStart:
    """What the branches of a round start from, as the command hands it to their jobs.

    Attributes:
        task: Index of the task.
        base: Fingerprint of theta_0.
        vector: The start as a vector from theta_0.
        fingerprint: Fingerprint of ``vector``.
        rest: The start of what is trained but not merged, by the module's own names.
        module: The module's state, head and regularizers included.
    """

    task: int
    base: str
    vector: TaskVector
    fingerprint: str
    rest: dict[str, Tensor]
    module: dict[str, Tensor]

    @classmethod
    def load(cls, file: Path, *, task: int, base: str | None) -> "RoundStart":
        """Read the file of a round.

        Args:
            file: The file.
            task: The task that it must be of.
            base: Fingerprint of theta_0.

        Raises:
            ValueError: If it is of another task or base.
        """
        found = cls(**torch.load(file, map_location="cpu", weights_only=True))
        if (found.task, found.base) != (task, base):
            raise ValueError(
                f"expected a round of task {task} from the base {str(base)[:12]} in {file}, got task {found.task} from "
                f"{found.base[:12]}: all machines need the same checkpoint of the backbone"
            )
        return found


class BranchJobs(Pending):
    """Trains the branches of a run's tasks by jobs, round after round, and gives the file of each when it is asked.

    Args:
        run: The run folder.
        launcher: Runs the jobs.
        job: Makes the job that trains a branch, of a task and the number of the task's fits before it.
    """

    def __init__(self, run: RunFolder, launcher: Launcher, job: Callable[[int, int], Job]) -> None:
        super().__init__(launcher)
        self.run = run
        self.job = job

    def begin_round(self, start: RoundStart, branches: Sequence[int]) -> None:
        """Hand out the start of a round, whose jobs begin at the first wait; what jobs have trained already stays.

        Args:
            start: The start.
            branches: Numbers of the branches that are still to be merged.
        """
        if self.run.writes:
            file = self.run.round_start(start.task)
            file.parent.mkdir(exist_ok=True)
            save_torch(file, asdict(start))
        jobs = {branch: self.job(start.task, branch) for branch in branches}
        self.name(jobs, f"branches of task {start.task + 1}")


def check_branched(learner: LearnerParts) -> None:
    """Refuse jobs for the branches of tasks that have none.

    Raises:
        ValueError: If tasks have one branch, or nothing to merge.
    """
    if learner.branches == 1 or not learner.mergers:
        raise ValueError(
            f"expected weights to merge and learner.branches of 2 or more, for jobs that train branches, got "
            f"{learner.branches} and {list(learner.mergers) or 'a frozen backbone'}"
        )
