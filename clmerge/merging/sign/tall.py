"""TALL: select each task's entries of the summed task vectors. Consensus: keep entries that several tasks use."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, device_of, float_dtype, slot_blocks
from clmerge.merging.checks import of_task
from clmerge.merging.step import Step
from clmerge.merging.stored import Stored
from clmerge.weights.task_vector import State, TaskVector


def tall_mask(tau: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return the mask of a task's entries in a sum of task vectors: ``|tau| >= threshold * |total - tau|``.

    Args:
        tau: The task's vector, any shape, float64 so that the result does not depend on the order of tasks.
        total: Sum over all tasks, same shape and dtype.
        threshold: Smallest magnitude of an entry, relative to the sum of the other tasks.

    Returns:
        bool, same shape.

    Example:
        >>> tau, other = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, -3.0, 1.0])
        >>> tall_mask(tau, tau + other, threshold=0.4)
        tensor([ True, False, False])
    """
    return tau.abs() >= (total - tau).abs_().mul_(threshold)


class _Masked(Stored):
    """Base of rules that compare every task vector with the sum of all."""

    per_task = ("threshold",)

    def __init__(self, threshold: float | Sequence[float], scale: float) -> None:
        thresholds = [threshold] if isinstance(threshold, int | float) else list(threshold)
        if not thresholds or min(thresholds) < 0:
            raise ValueError(f"expected thresholds of 0 or more, got {threshold}")
        super().__init__()
        self.threshold = threshold
        self.scale = scale

    @override
    def _plan(self, vector: State, step: Step) -> None:
        self._threshold(step.task)

    def _threshold(self, task: int) -> float:
        if isinstance(self.threshold, int | float):
            return self.threshold
        return of_task("threshold", self.threshold, task)

    def _total(self, slots: Slots) -> Tensor:
        """Return the sum of the task vectors in float64."""
        first, *others = self._taus(slots)
        total = first.double()
        for tau in others:
            total = total + tau
        return total

    def _mask(self, slots: Slots, position: int, total: Tensor) -> Tensor:
        tau = slots[f"task{position}"].double()
        return tall_mask(tau, total, self._threshold(self.tasks[position]))


class TALL(_Masked):
    """Add the task vectors, and select every task's entries of the sum by a mask (Wang et al., arXiv 2405.07813).

    With ``tau_mtl = sum(tau_t)``, inputs of task t use ``task_view(t) = m_t * tau_mtl``. The mask ``m_t = |tau_t| >=
    threshold * |tau_mtl - tau_t|`` keeps the entries to which task t contributes most. The released code compares
    theta0 - theta_t with theta_mtl - theta_t, which is equivalent except for ``>`` in place of ``>=``.

    ``compute()``, for inputs of unknown task, is the plain sum times ``scale``, that is task arithmetic.

    Masks change with every further task, so all task vectors are kept. State: 4 bytes per parameter and task, or none
    with a bank.

    Args:
        threshold: Smallest magnitude of an entry, relative to the sum of the other tasks; one number, or one per task
            index. The paper chooses among 0.2, 0.3, ..., 0.6 for every task on held-out data.
        scale: Scaling coefficient of ``compute()``; task views are not scaled.

    Example:
        >>> merger = TALL(scale=1.0)
        >>> merger.update({"w": torch.tensor([1.0, 1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([2.0, -3.0, 1.0])})
        >>> merger.compute(), merger.task_view(0)
        ({'w': tensor([ 3., -2.,  1.])}, {'w': tensor([3., 0., 0.])})
    """

    name = "tall"
    summary = "sum of the task vectors; a mask per task cuts its part out again"
    source = "2405.07813"
    task_views = True
    ignored_by_views = ("scale",)
    scope = "entry"

    def __init__(self, threshold: float | Sequence[float] = 0.4, *, scale: float = 0.3) -> None:
        super().__init__(threshold, scale)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return self._total(slots).mul_(self.scale)

    @override
    def task_view(self, task: int) -> TaskVector:
        """Return ``m_t * tau_mtl``, the vector to add to theta0 for one task.

        Args:
            task: Index of the task, as given to ``update``; the last one with that index.

        Raises:
            ValueError: If no such task is merged.
        """
        position = self._position(task)
        view = {}
        with torch.inference_mode(False), torch.no_grad():
            for name, slots in self._held().items():
                view[name] = torch.empty(self._shapes[name], dtype=float_dtype(slots), device=device_of(slots))
                for block, (out,) in slot_blocks(slots, view[name]):
                    total = self._total(block)
                    out.copy_(total.masked_fill(~self._mask(block, position, total), 0))
        return view


class Consensus(_Masked):
    """Add the task vectors, without the entries that fewer than k tasks use (Wang et al., arXiv 2405.07813).

    ``scale * sum(tau_t)`` where at least k of the masks of ``TALL`` hold, 0 elsewhere: entries that a single task uses
    ("selfish") or none ("catastrophic") are left out. While there are fewer than k tasks, all of them must use an
    entry; the released code returns zeros then.

    Masks change with every further task, so all task vectors are kept. State: 4 bytes per parameter and task, or none
    with a bank.

    Args:
        k: Number of tasks that must use an entry; 2 in the paper.
        threshold: Smallest magnitude of an entry, relative to the sum of the other tasks, as in ``TALL``.
        scale: Scaling coefficient; the paper searches 0.1 to 1.

    Example:
        >>> merger = Consensus(scale=1.0)
        >>> merger.update({"w": torch.tensor([1.0, 1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([2.0, -3.0, 1.0])})
        >>> merger.compute()
        {'w': tensor([3., 0., 0.])}
    """

    name = "consensus"
    summary = "sum of the task vectors where several tasks use it"
    source = "2405.07813"
    scope = "entry"

    def __init__(self, k: int = 2, *, threshold: float | Sequence[float] = 0.4, scale: float = 0.3) -> None:
        super().__init__(threshold, scale)
        if k < 1:
            raise ValueError(f"expected k of 1 or more tasks, got {k}")
        self.k = k

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        total = self._total(slots)
        uses = torch.zeros(total.shape, dtype=torch.int32, device=total.device)
        for position in range(self.num_tasks):
            uses.add_(self._mask(slots, position, total))
        return total.masked_fill_(uses < min(self.k, self.num_tasks), 0).mul_(self.scale)
