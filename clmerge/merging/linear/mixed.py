"""Base of the rules that weigh whole task vectors, by weights that are chosen anew with every task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.step import Step
from clmerge.merging.stored import Stored
from clmerge.weights.task_vector import State, TaskVector, accumulator_dtype


class Mixed(Stored):
    """Keep every task vector, and merge them as ``sum(w_t tau_t)`` with one weight per task.

    A rule defines ``_plan``, which returns the weights of all tasks, the one that arrives last. State: 4 bytes per
    parameter and task, or none with a bank.

    Attributes:
        weights: The weights by task, in order of arrival.
    """

    order_free = False
    removable = False

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[float] = []

    def _mixture(self, weights: Sequence[float], latest: State) -> TaskVector:
        """Return the weighted sum of the kept vectors and, if there is one weight more, of the latest.

        Args:
            weights: One weight per vector.
            latest: The vector that is merged now, sparsified as it will be kept.
        """
        found = {}
        for name in latest:
            tau = latest[name].detach()
            total = torch.zeros(tau.shape, dtype=accumulator_dtype(tau), device=tau.device)
            for position, weight in enumerate(weights):
                if weight:
                    part = self._tau(position, name) if position < self.num_tasks else tau
                    total.add_(part.to(total), alpha=weight)
            found[name] = total
        return found

    @override
    def _after_update(self, step: Step, plan: list[float]) -> None:
        self.weights = plan

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        taus = self._taus(slots)
        merged = torch.zeros_like(taus[0])
        for tau, weight in zip(taus, self.weights, strict=True):
            if weight:
                merged.add_(tau, alpha=weight)
        return merged

    @override
    def _extras(self) -> dict[str, Any]:
        return {**super()._extras(), "weights": list(self.weights)}

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        super()._load_extras(extras)
        self.weights = list(extras.get("weights", ()))
