"""Rules without a stream of constant size: every task vector is kept."""

from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots, device_of, float_dtype
from clmerge.merging.merger import Merger, Step


class _Stored(Merger):
    """Keep every task vector in accumulators of its own, in order of arrival."""

    exact_online = False

    def __init__(self) -> None:
        super().__init__()
        self._tasks: list[int] = []

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        return {f"task{position}": None for position in range(num_tasks)}

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        self._keep(slots, step.position, tau)

    @override
    def _after_update(self, step: Step, plan: Any) -> None:
        self._tasks.append(step.task)

    @override
    def _join(self, other: Self) -> None:
        if not self.num_tasks:
            super()._join(other)
            return
        for name, slots in self._slots.items():
            for position, tau in enumerate(self._taus(other._slots[name])):
                self._keep(slots, self.num_tasks + position, tau.to(device_of(slots)))
        self._tasks = self._tasks + other._tasks
        self.num_tasks += other.num_tasks
        self.base = self.base or other.base

    @override
    def _extras(self) -> dict[str, Any]:
        return {"tasks": list(self._tasks)}

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        self._tasks = list(extras.get("tasks", []))

    def _keep(self, slots: Slots, position: int, tau: Tensor) -> None:
        slots[f"task{position}"] = tau.to(float_dtype(slots)).clone(memory_format=torch.contiguous_format)

    def _taus(self, slots: Slots) -> list[Tensor]:
        """Return the task vectors in a parameter's accumulators, or in a piece of them, in order of arrival."""
        return [slots[f"task{position}"] for position in range(len(slots))]

    def _position(self, task: int) -> int:
        """Return when a task came; the last time, if it came several times."""
        if task not in self._tasks:
            raise ValueError(f"expected one of the merged tasks {self._tasks}, got {task}")
        return len(self._tasks) - 1 - self._tasks[::-1].index(task)
