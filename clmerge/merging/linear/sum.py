"""Base of the rules that need only the sum of the task vectors."""

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.removal import Removable, largest_entry
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class Sum(Removable):
    """Base of the rules that need only ``sum(w_t * tau_t)`` of every parameter, which is in the slot ``"sum"``.

    A rule defines how the sum is read, and perhaps the weight of a task, 1 by default. Tasks can be taken out again.

    Args:
        scale: Scaling coefficient; 1 is the plain rule.
    """

    scope: Scope = "entry"
    slots = ("sum",)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def _weight(self, step: Step) -> float:
        """Return the weight of a task."""
        return 1.0

    @override
    def _plan(self, vector: State, step: Step) -> float:
        return step.sign * self._weight(step)

    @override
    def _mass(self, vector: State, step: Step, plan: float) -> float:
        return abs(plan) * largest_entry(vector, step)

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: float) -> None:
        slots["sum"].add_(tau, alpha=plan)
