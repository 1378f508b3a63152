"""Base of the rules that weigh every entry by how much a task knows about it."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, device_of, float_dtype, slot_blocks
from clmerge.merging.at_once import concatenated
from clmerge.merging.merger import Merger
from clmerge.merging.required import diagonal_of
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.merging.vectors import Pack
from clmerge.weights.task_vector import State


class Informed(Merger):
    """Fold in a task vector together with one non-negative number for every entry: the task's information about it.

    Args:
        statistic: Name of the statistic with the information: ``"fisher"``, or ``"adam"`` for Adam's second moments
            (``clmerge.statistics.adam``), which take no data.
    """

    requires = frozenset({"fisher"})
    scope: Scope = "parameter"  # _plan only looks whether the statistics fit

    def __init__(self, statistic: str = "fisher") -> None:
        super().__init__()
        self.statistic = statistic
        self.requires = frozenset({statistic})

    @override
    def _plan(self, vector: State, step: Step) -> tuple[State, Any]:
        """Return the information of every entry, and what else the folding needs."""
        return diagonal_of(step, vector, self.statistic), None

    @override
    def _fold_pack(self, pack: Pack, slots: Slots, tau: Tensor, step: Step, plan: tuple[State, Any]) -> None:
        information, rest = plan
        dtype = float_dtype(slots)
        whole = concatenated([information[name].detach().to(device_of(slots)) for name in pack.names])
        for block, (piece, known) in slot_blocks(slots, tau, whole):
            self._fold_informed(block, piece.to(dtype), known.to(dtype), step, rest)

    def _fold_informed(self, slots: Slots, tau: Tensor, information: Tensor, step: Step, plan: Any) -> None:
        """Fold one flat piece of a parameter and its information into the same piece of its accumulators, in place."""
        raise TypeError(f"{type(self).__name__} defines neither _fold_pack nor _fold_informed")
