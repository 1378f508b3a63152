"""Rules without a stream of constant size: the task vectors are kept, and merged when they are read."""

from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots, float_dtype
from clmerge.merging.merger import Step
from clmerge.merging.spectral import _Spectral


class _KeptSpectral(_Spectral):
    """A spectral rule that needs every task matrix against something all of them determine."""

    exact_online = False

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        return {f"task{task}": None for task in range(num_tasks)}

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        _keep(slots, step.position, tau)

    def _taus(self, slots: Slots) -> list[Tensor]:
        """Return the task vectors of one parameter, in order of arrival."""
        return [slots[f"task{task}"] for task in range(self.num_tasks)]

    def _task_matrices(self, name: str, slots: Slots) -> list[list[Tensor]]:
        """Return, for every matrix of a parameter, that of each task in float64; nothing for what is no matrix."""
        by_task = [self._matrices.pieces(name, tau) for tau in self._taus(slots)]
        return [[piece.double() for piece in pieces] for pieces in zip(*by_task, strict=True)]

    @override
    def _join(self, other: Self) -> None:
        if not self.num_tasks:
            super()._join(other)
            return
        for name, slots in self._slots.items():
            for task, tau in enumerate(other._taus(other._slots[name])):
                _keep(slots, self.num_tasks + task, tau.to(slots["task0"].device))
        self.num_tasks += other.num_tasks
        self.base = self.base or other.base


def _keep(slots: Slots, position: int, tau: Tensor) -> None:
    slots[f"task{position}"] = tau.to(float_dtype(slots)).clone(memory_format=torch.contiguous_format)
