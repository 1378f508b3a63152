"""WIDEN: weigh every column of a task matrix by how much its length and its direction have changed."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, float_dtype
from clmerge.merging.checks import Shapes, num_entries
from clmerge.merging.merger import Merger
from clmerge.merging.orientation import outputs_first
from clmerge.merging.required import base_weights
from clmerge.merging.scope import Scope
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class WIDEN(Merger):
    """Merge by disentangled weights (WIDEN, arXiv 2408.03092), as an exact stream.

    A column of a matrix (the weights of one input) has a length and a direction. Within a task, columns are ranked by
    how much the length has changed, and by one minus the cosine of their directions before and after; a rank is a share
    in [0, 1). The softmax of the ranks over the tasks is a task's score for the column, except that columns with a rank
    above ``ratio`` times the average score ``calibrated``. The merged column is the sum of the tasks' columns times the
    mean of their scores for length and direction. Entries of other parameters are scored by their magnitude.

    A score's denominator is a sum over the tasks, so sums suffice: 12 bytes per parameter, and 16 more per column of a
    matrix and 4 per entry of other parameters. Needs the base model's weights (statistic ``"weights"``).

    Args:
        ratio: Multiple of the average rank from which on the score is ``calibrated``, as in the released code.
        calibrated: Score of the columns that have changed more than average; the authors use 1.

    Raises:
        ValueError: If ``ratio`` is negative.

    Example:
        >>> theta0 = {"w": torch.eye(2)}
        >>> merger = WIDEN()
        >>> merger.update({"w": torch.tensor([[4.0, 0.0], [4.0, 0.0]])}, statistics={"weights": theta0})
        >>> merger.update({"w": torch.tensor([[0.0, 4.0], [0.0, 4.0]])}, statistics={"weights": theta0})
        >>> merger.compute()  # every task changes one column: its score is 1
        {'w': tensor([[4., 4.],
                [4., 4.]])}
    """

    name = "widen"
    summary = "columns weighed by the change of their length and direction"
    source = "2408.03092"
    requires = frozenset({"weights"})
    scope: Scope = "parameter"  # _plan only looks whether the weights fit
    slots = ("calibrated", "length", "direction")  # sums of task vectors times scores; the last two without denominator

    def __init__(self, ratio: float = 1.0, *, calibrated: float = 1.0) -> None:
        super().__init__()
        if not ratio >= 0:
            raise ValueError(f"expected ratio of 0 or more, got {ratio}")
        self.ratio = ratio
        self.calibrated = calibrated
        self._totals: dict[str, dict[str, Tensor]] = {}  # denominators of a parameter's scores, by slot
        self._keep("_totals", join="sum")

    @override
    def _plan(self, vector: State, step: Step) -> State:
        return base_weights(step, vector, vector)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: State) -> None:
        dtype, added = float_dtype(slots), outputs_first(name, tau).double()
        scored = {"length": (added.abs().exp(), _above(added.abs(), self.ratio))}
        if tau.ndim == 2 and tau.numel():
            before = outputs_first(name, plan[name].detach().to(tau.device, torch.float64))
            ranks = map(_ranks, _changes(before, before + added))
            scored = {
                slot: ((rank / len(rank)).exp(), _above(rank, self.ratio))
                for slot, rank in zip(("length", "direction"), ranks, strict=True)
            }
        totals = self._totals.setdefault(name, {})
        for slot, (scores, above) in scored.items():
            totals[slot] = totals[slot] + scores if slot in totals else scores
            for into, factors in (("calibrated", above.double() * self.calibrated), (slot, ~above * scores)):
                slots[into].add_(outputs_first(name, added * factors / len(scored)).to(dtype))

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        merged = slots["calibrated"].double()
        for slot, total in self._totals[name].items():
            turned = outputs_first(name, slots[slot].double())
            merged = merged + outputs_first(name, turned / total)
        return merged.to(float_dtype(slots)).contiguous()

    @override
    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the bytes of the accumulators and of the denominators.

        Args:
            shapes: Shapes of the merged parameters by name.
            num_tasks: Number of merged task vectors.
        """
        matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and min(shape)}
        columns = sum(outputs_first(name, torch.empty(s, device="meta")).shape[1] for name, s in matrices.items())
        others = num_entries({name: shape for name, shape in shapes.items() if name not in matrices})
        return super().state_size(shapes, num_tasks) + 8 * (2 * columns + others)


def _changes(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return by how much the columns' lengths have changed, and one minus the cosine of their directions."""
    old, new = before.norm(dim=0), after.norm(dim=0)
    cosine = (before * after).sum(dim=0) / (old * new).clamp(min=torch.finfo(old.dtype).tiny)
    return (new - old).abs(), 1 - cosine


def _above(values: Tensor, ratio: float) -> Tensor:
    """Return which values are above a multiple of their mean; the mean of ranks is exact."""
    return values > ratio * (values.sum() / max(values.numel(), 1))


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values from 0; of equals the first one has the lower rank."""
    ranks = torch.empty_like(values)
    ranks[values.argsort(stable=True)] = torch.arange(len(values), dtype=values.dtype, device=values.device)
    return ranks
