"""What a launcher spreads of a run: its tasks, or the branches of one task after the other."""

from typing import Literal, TypeAlias

from clmerge.runs.launching.task_jobs import check_apart, dependence
from clmerge.runs.learner_parts import LearnerParts

Spread: TypeAlias = Literal["tasks", "branches"]


def spread_of(learner: LearnerParts) -> Spread:
    """Return what is spread: tasks where there are several that do not depend on each other, else branches.

    Raises:
        ValueError: If there is neither; naming the setting by which the tasks depend on each other.
    """
    branched = learner.branches > 1 and bool(learner.mergers)
    if branched and (len(learner.tasks) == 1 or dependence(learner)):
        return "branches"
    check_apart(learner)
    return "tasks"
