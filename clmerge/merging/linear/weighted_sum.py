"""Base of weighted averages: a sum with positive weights per task and parameter, stored without overflow."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
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


class _Total(NamedTuple):
    """Sum of the weights of one parameter, ``value * e^offset``, and bounds on the rounding of the weighted sum.

    Attributes:
        tasks: Number of tasks with a weight above 0.
        mass: Bound on the entries of the weighted sum.
        error: Bound on their rounding error.
    """

    offset: float = -math.inf
    value: float = 0.0
    tasks: float = 0
    mass: float = 0.0
    error: float = 0.0

    def share(self, log_weight: float, largest: float) -> Share:
        if log_weight == -math.inf:
            return Share(counts=False, offset=self.offset, rescale=1.0, weight=0.0, mass=0.0)
        offset = max(self.offset, _OFFSET_STEP * round(log_weight / _OFFSET_STEP))
        rescale = math.exp(self.offset - offset)
        if not self.tasks:  # after the removal of all tasks, the remainder is rounding error
            rescale = 1.0 if self.offset == -math.inf else 0.0
        weight = math.exp(log_weight - offset)
        return Share(counts=True, offset=offset, rescale=rescale, weight=weight, mass=weight * largest)

    def after(self, share: Share, sign: int, unit: float) -> "_Total":
        """Return the total after a task is folded in (sign 1) or removed (-1)."""
        held = self.mass * share.rescale
        return _Total(
            offset=share.offset,
            value=self.value * share.rescale + sign * share.weight,
            tasks=self.tasks + sign * share.counts,
            mass=max(held + sign * share.mass, 0.0),
            error=self.error * share.rescale + 3 * unit * max(held, held + sign * share.mass),
        )

    def plus(self, other: "_Total", unit: float) -> "_Total":
        """Return the total of both tasks' weights, which are at one offset."""
        return _Total(
            offset=self.offset,
            value=self.value + other.value,
            tasks=self.tasks + other.tasks,
            mass=self.mass + other.mass,
            error=self.error + other.error + unit * (self.mass + other.mass),
        )


class WeightedSum(Removable):
    """Base of weighted averages: ``scale * sum(w_t * tau_t) / sum(w_t)`` with a positive weight per task and parameter.

    A rule computes the logarithms of the weights. They are summed as in a streaming softmax, relative to an offset
    that grows with the largest weight. Tasks can be taken out again.

    Args:
        scale: Scaling coefficient; 1 is the plain average.
    """

    scope: Scope = "parameter"
    slots = ("sum",)

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self._totals: dict[str, list[float]] = {}  # by parameter, the numbers of a _Total
        self._keep("_totals", join=self._joined_totals)

    def _total(self, name: str) -> _Total:
        return _Total(*self._totals.get(name, ()))

    @abstractmethod
    def _log_weights(self, vector: State, step: Step) -> dict[str, float]:
        """Return the logarithm of the task's weight for every parameter; -inf is weight 0."""

    @override
    def _plan(self, vector: State, step: Step) -> dict[str, Share]:
        logs = self._log_weights(vector, step)
        return {
            name: self._total(name).share(log, step.largest[name] if name in step.largest else magnitude(vector[name]))
            for name, log in logs.items()
        }

    @override
    def _mass(self, vector: State, step: Step, plan: dict[str, Share]) -> float:
        return max((share.mass for share in plan.values()), default=0.0)

    @override
    def _uncertain(self, before: dict[str, Slots], extras: dict[str, Any], plan: dict[str, Share]) -> float:
        error = largest = lost = 0.0
        for name, slots in self._slots.items():
            before_it = self._total(name)
            total = before_it.after(plan[name], -1, self._unit())
            if total.tasks:
                error = max(error, share_of(total.error, total.value))
                largest = max(largest, share_of(magnitude(slots["sum"]), total.value))
                lost = max(lost, share_of(4 * _UNIT64 * before_it.value, total.value))
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
            self._totals[name] = [*self._total(name).after(share, step.sign, unit)]

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        total = self._total(name)
        return slots["sum"] * (self.scale / total.value if total.tasks else 0.0)

    @override
    def _join(self, other: Self) -> None:
        if self.num_tasks:
            offsets = {name: max(self._total(name).offset, other._total(name).offset) for name in self._totals}
            if not other._is_at(offsets):
                other = deepcopy(other)
            for stream in (self, other):
                stream._rescale(offsets)
        super()._join(other)

    def _is_at(self, offsets: Mapping[str, float]) -> bool:
        return all(self._total(name).offset == offset for name, offset in offsets.items())

    def _rescale(self, offsets: Mapping[str, float]) -> None:
        """Hold the weights relative to other offsets, none of them smaller."""
        for name, offset in offsets.items():
            total = self._total(name)
            if total.offset < offset:
                factor = math.exp(total.offset - offset)
                self._slots[name]["sum"].mul_(factor)
                scaled = {"value": total.value * factor, "mass": total.mass * factor, "error": total.error * factor}
                self._totals[name] = [*total._replace(offset=offset, **scaled)]

    def _joined_totals(self, ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, list[float]]:
        """Return the totals of the sum of two accumulators, at the same offsets."""
        unit, joined = self._unit(), {}
        for name in ours:
            total, other = _Total(*ours[name]), _Total(*theirs[name])
            joined[name] = [*total.plus(other, unit)]
        return joined
