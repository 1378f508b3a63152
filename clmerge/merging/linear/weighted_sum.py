"""Base of weighted averages: a sum with positive weights per task and parameter, stored without overflow."""

import math
from abc import abstractmethod
from copy import deepcopy
from dataclasses import astuple, dataclass, replace
from typing import Any, Self

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots
from clmerge.merging.removal import Removable, magnitude, share_of
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

# Weights are held relative to e^offset, so that a softmax of large numbers does not overflow. Offsets are multiples
# of this step, hence 0 for weights of ordinary size, and accumulators are hardly ever rescaled.
_OFFSET_STEP = 40.0

_UNIT64 = 2.0**-53


@dataclass(frozen=True)
class Share:
    """The effect of one update on the sum of one parameter: ``sum = sum * rescale + weight * tau``.

    Attributes:
        counts: Whether the weight is above 0.
        offset: Offset of the sum's weights after the update.
        rescale: Factor of the sum so far.
        weight: The task's weight, relative to the offset.
        mass: Largest magnitude of the added term.
    """

    counts: bool
    offset: float
    rescale: float
    weight: float
    mass: float


@dataclass(frozen=True)
class _Total:
    """Sum of the ``count`` weights above 0 of one parameter, ``value * e^offset``, and bounds on the sum's rounding.

    Attributes:
        mass: Bound on the entries of the weighted sum.
        error: Bound on their rounding error.
    """

    offset: float = -math.inf
    value: float = 0.0
    count: int = 0
    mass: float = 0.0
    error: float = 0.0

    def share(self, log_weight: float, largest: float) -> Share:
        if log_weight == -math.inf:
            return Share(counts=False, offset=self.offset, rescale=1.0, weight=0.0, mass=0.0)
        offset = max(self.offset, _OFFSET_STEP * round(log_weight / _OFFSET_STEP))
        rescale = math.exp(self.offset - offset)
        if not self.count:  # after the removal of all tasks, the remainder is rounding error
            rescale = 1.0 if self.offset == -math.inf else 0.0
        weight = math.exp(log_weight - offset)
        return Share(counts=True, offset=offset, rescale=rescale, weight=weight, mass=weight * largest)

    def after(self, share: Share, sign: int, unit: float) -> "_Total":
        """Return the total after a task is folded in (sign 1) or removed (-1)."""
        held = self.mass * share.rescale
        return _Total(
            offset=share.offset,
            value=self.value * share.rescale + sign * share.weight,
            count=self.count + sign * share.counts,
            mass=max(held + sign * share.mass, 0.0),
            error=self.error * share.rescale + 3 * unit * max(held, held + sign * share.mass),
        )


class WeightedSum(Removable):
    """Keep ``sum(w_t * tau_t)`` and ``sum(w_t)`` of positive weights; the result is their quotient.

    A subclass computes the logarithms of the weights. Weights are summed as in a streaming softmax, relative to an
    offset that grows with the largest weight.
    """

    scope: Scope = "parameter"

    def __init__(self, scale: float = 1.0) -> None:
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
        return {
            name: self._totals.get(name, _Total()).share(
                log, step.largest[name] if name in step.largest else magnitude(vector[name])
            )
            for name, log in logs.items()
        }

    @override
    def _mass(self, vector: State, step: Step, plan: dict[str, Share]) -> float:
        return max((share.mass for share in plan.values()), default=0.0)

    @override
    def _uncertain(self, before: dict[str, Slots], extras: dict[str, Any], plan: dict[str, Share]) -> float:
        error = largest = lost = 0.0
        for name, slots in self._slots.items():
            total = self._totals[name].after(plan[name], -1, self._unit())
            if total.count:
                error = max(error, share_of(total.error, total.value))
                largest = max(largest, share_of(magnitude(slots["sum"]), total.value))
                lost = max(lost, share_of(4 * _UNIT64 * self._totals[name].value, total.value))
        return share_of(error, largest) + lost

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
        unit = self._unit()
        for name, share in plan.items():
            self._totals[name] = self._totals.get(name, _Total()).after(share, step.sign, unit)

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
        """Return a copy of ``other``, after rescaling both streams to the same offsets."""
        copy = deepcopy(other)
        for name, mine in self._totals.items():
            offset = max(mine.offset, copy._totals[name].offset)
            for stream in (self, copy):
                total = stream._totals[name]
                if total.offset < offset:
                    factor = math.exp(total.offset - offset)
                    stream._slots[name]["sum"].mul_(factor)
                    stream._totals[name] = replace(
                        total,
                        offset=offset,
                        value=total.value * factor,
                        mass=total.mass * factor,
                        error=total.error * factor,
                    )
        return copy

    @override
    def _extras(self) -> dict[str, Any]:
        return super()._extras() | {"totals": {name: list(astuple(total)) for name, total in self._totals.items()}}

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        super()._load_extras(extras)
        self._totals = {name: _Total(*numbers) for name, numbers in extras.get("totals", {}).items()}

    @override
    def _join_extras(self, other: Self) -> None:
        super()._join_extras(other)
        unit = self._unit()
        for name, total in self._totals.items():
            theirs = other._totals[name]
            self._totals[name] = replace(
                total,
                value=total.value + theirs.value,
                count=total.count + theirs.count,
                mass=total.mass + theirs.mass,
                error=total.error + theirs.error + unit * (total.mass + theirs.mass),
            )
