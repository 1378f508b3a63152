"""The sum that weighted averages share: positive weights per task and parameter, safe for exponentials."""

import math
from abc import abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots
from clmerge.merging.merger import Merger
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

# Weights are held relative to e^offset, so that a softmax of large numbers does not overflow. Offsets are multiples
# of this step, hence 0 for weights of ordinary size, and accumulators are hardly ever rescaled.
_OFFSET_STEP = 40.0

# Taking out more than all but this share of the weight would leave mostly rounding of float32.
_SMALLEST_REST = 1e-4


@dataclass(frozen=True)
class Share:
    """What one update does to the sum of one parameter: ``sum = sum * rescale + weight * tau``."""

    counts: bool
    offset: float
    rescale: float
    weight: float


@dataclass
class _Total:
    """Sum of the ``count`` weights above 0 of one parameter, ``value * e^offset``."""

    offset: float = -math.inf
    value: float = 0.0
    count: int = 0

    def share(self, log_weight: float) -> Share:
        if log_weight == -math.inf:
            return Share(counts=False, offset=self.offset, rescale=1.0, weight=0.0)
        offset = max(self.offset, _OFFSET_STEP * round(log_weight / _OFFSET_STEP))
        rescale = math.exp(self.offset - offset)
        if not self.count:  # what taking all tasks out again left behind is rounding
            rescale = 1.0 if self.offset == -math.inf else 0.0
        return Share(counts=True, offset=offset, rescale=rescale, weight=math.exp(log_weight - offset))


class WeightedSum(Merger):
    """Keep ``sum(w_t * tau_t)`` and ``sum(w_t)`` of positive weights; the result is their quotient.

    A subclass gives the logarithms of the weights. They are summed as in a streaming softmax, relative to an offset
    that grows with the largest weight.
    """

    removable = True
    scope: Scope = "parameter"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self._totals: dict[str, _Total] = {}

    @abstractmethod
    def _log_weights(self, vector: State, step: Step) -> dict[str, float]:
        """Return the logarithm of the task's weight for every parameter; -inf is weight 0."""

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        return {"sum": None}

    @override
    def _plan(self, vector: State, step: Step) -> dict[str, Share]:
        logs = self._log_weights(vector, step)
        plan = {name: self._totals.get(name, _Total()).share(log) for name, log in logs.items()}
        if step.sign < 0:
            self._check_rest(plan, step)
        return plan

    def _check_rest(self, plan: dict[str, Share], step: Step) -> None:
        """Refuse to leave nothing but the rounding of what is taken out."""
        for name, share in plan.items():
            total = self._totals[name]
            if share.counts and total.count > 1 and total.value - share.weight < _SMALLEST_REST * total.value:
                raise ValueError(
                    f"expected to leave at least {_SMALLEST_REST} of the weight of {name!r} in {self!r}, got task "
                    f"{step.task} with nearly all of it; merge the other tasks anew"
                )

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: dict[str, Share]) -> None:
        if plan[name].counts:
            super()._fold(name, slots, tau, step, plan[name])

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: Share) -> None:
        if plan.rescale != 1:
            slots["sum"].mul_(plan.rescale)
        slots["sum"].add_(tau, alpha=step.sign * plan.weight)

    @override
    def _after_update(self, step: Step, plan: dict[str, Share]) -> None:
        for name, share in plan.items():
            total = self._totals.setdefault(name, _Total())
            total.value = total.value * share.rescale + step.sign * share.weight
            total.offset = share.offset
            total.count += step.sign * share.counts

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        total = self._totals[name]
        return slots["sum"] * (self.scale / total.value if total.count else 0.0)

    @override
    def _join(self, other: Self) -> None:
        theirs = other._totals
        if self.num_tasks and any(total.offset != theirs[name].offset for name, total in self._totals.items()):
            other = self._aligned(other)
        super()._join(other)

    def _aligned(self, other: Self) -> Self:
        """Give both streams the same offsets; the other one is copied first."""
        copy = deepcopy(other)
        for name, mine in self._totals.items():
            offset = max(mine.offset, copy._totals[name].offset)
            for stream in (self, copy):
                total = stream._totals[name]
                if total.offset < offset:
                    factor = math.exp(total.offset - offset)
                    stream._slots[name]["sum"].mul_(factor)
                    stream._totals[name] = _Total(offset, total.value * factor, total.count)
        return copy

    @override
    def _extras(self) -> dict[str, Any]:
        return {"totals": {name: [total.offset, total.value, total.count] for name, total in self._totals.items()}}

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        self._totals = {name: _Total(*numbers) for name, numbers in extras.get("totals", {}).items()}

    @override
    def _join_extras(self, other: Self) -> None:
        for name, total in self._totals.items():
            total.value += other._totals[name].value
            total.count += other._totals[name].count
