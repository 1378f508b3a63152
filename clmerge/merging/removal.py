"""Removing a task from sums: accurate to a stated bound, or refused."""

import math
from abc import ABC
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, copied, float_dtype
from clmerge.merging.checks import Shapes
from clmerge.merging.gathered import gathered
from clmerge.merging.kept_beside import added
from clmerge.merging.merger import Merger
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

TOLERANCE = 1e-4
"""Largest accepted error after a removal, as a share of the largest remaining entry."""


def largest_entry(vector: State, step: Step) -> float:
    """Return the largest magnitude in a task vector.

    Args:
        vector: The vector that is folded in.
        step: Its update; it may already hold the largest magnitudes.
    """
    if step.largest:
        return max(step.largest.values())
    tensors = (vector[name].detach() for name in vector)  # one at a time: they may be made on access
    limits = [torch.stack(torch.aminmax(tensor)) for tensor in tensors if tensor.numel()]
    return float(gathered(limits).abs().max()) if limits else 0.0


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude of a tensor, 0 for an empty one.

    Example:
        >>> magnitude(torch.tensor([1.0, -3.0]))
        3.0
    """
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high))


class Removable(Merger, ABC):
    """A rule whose accumulators are sums over the tasks: a task is removed by subtracting what it added.

    Subtraction exposes the rounding errors made while the task was in the sum. The rule bounds them: ``mass`` bounds
    the entries of the sum, ``error`` bounds the rounding errors added to them since the first task. A removal after
    which the bound exceeds ``TOLERANCE`` of the largest remaining entry is refused, and the state is unchanged.
    ``count`` is the number of tasks that added anything; at zero, the sum is set to zero.
    """

    removable = True
    scope: Scope = "parameter"  # pieces of task vectors, which are never taken out, are folded in as they are

    def __init__(self) -> None:
        super().__init__()
        self._rounding = {"mass": 0.0, "error": 0.0, "count": 0}
        self._keep("_rounding", join=self._joined)

    def _mass(self, vector: State, step: Step, plan: Any) -> float:
        """Return a bound on the magnitude of the entries that a task adds to the sum."""
        return largest_entry(vector, step)

    def _uncertain(self, before: dict[str, Slots], extras: dict[str, Any], plan: Any) -> float:
        """Return a bound on the rounding error of the remaining sum, as a share of its largest entry.

        Args:
            before: The accumulators before the removal; ``self._slots`` are those after it.
            extras: The additional state before the removal.
            plan: The plan of the removal.
        """
        remains = max((magnitude(slots["sum"]) for slots in self._slots.values()), default=0.0)
        return share_of(self._rounding["error"], remains)

    @override
    def _fold_in(self, vector: State, shapes: Shapes, step: Step) -> Any:
        if step.is_piece:  # of a vector that is not known as a whole, and cannot be taken out
            return super()._fold_in(vector, shapes, step)
        if step.sign > 0:
            plan = super()._fold_in(vector, shapes, step)
            self._note(self._mass(vector, step, plan))
            return plan
        before, extras = self._slots, self._extras()
        self._slots = copied(before)
        try:
            plan = super()._fold_in(vector, shapes, step)
            self._note(-self._mass(vector, step, plan))
            if self._rounding["count"]:
                self._check(self._uncertain(before, extras, plan), step)
            else:
                self._clear()
        except BaseException:
            self._slots = before
            self._load_extras(extras)
            raise
        return plan

    def _joined(self, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        """Return the bounds of the sum of two accumulators."""
        total: dict[str, Any] = added(ours, theirs)
        return total | {"error": total["error"] + self._unit() * total["mass"]}

    def _note(self, mass: float) -> None:
        """Update the bounds for one more operation; the mass is negative if a task is removed."""
        held = self._rounding["mass"]
        self._rounding = {
            "mass": max(held + mass, 0.0),
            # A product and a sum are rounded, the sum among the largest numbers there are before or after.
            "error": self._rounding["error"] + 2 * self._unit() * max(held, held + mass),
            "count": self._rounding["count"] + (mass > 0) - (mass < 0),
        }

    def _clear(self) -> None:
        for slots in self._slots.values():
            for accumulator in slots.values():
                accumulator.zero_()
        self._rounding = {"mass": 0.0, "error": 0.0, "count": 0}

    def _unit(self) -> float:
        """Return the unit roundoff: half the distance between neighbouring floats around 1."""
        return max((torch.finfo(float_dtype(slots)).eps / 2 for slots in self._slots.values()), default=0.0)

    def _check(self, uncertain: float, step: Step) -> None:
        if not uncertain <= TOLERANCE:
            raise ValueError(
                f"expected to leave what the other tasks added to {self!r}, got task {step.task} so much larger that "
                f"{uncertain:.0e} of what remains may be rounding (at most {TOLERANCE:.0e} is accepted); merge the "
                "other tasks anew instead"
            )


def share_of(error: float, remains: float) -> float:
    """Return ``error / remains``; for ``remains`` = 0, infinity, or 0 if ``error`` is 0, too.

    Example:
        >>> share_of(0.5, 2.0), share_of(0.5, 0.0), share_of(0.0, 0.0)
        (0.25, inf, 0.0)
    """
    if error == 0:
        return 0.0
    return error / remains if remains > 0 else math.inf
