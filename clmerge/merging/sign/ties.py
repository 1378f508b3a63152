"""TIES: trim every task vector, elect a sign per entry, merge the entries that agree with it."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots, float_dtype, slot_blocks
from clmerge.merging.linear.arithmetic import task_weight
from clmerge.merging.merger import Merger
from clmerge.merging.sparsify.sparsifier import Sparsifier, TrimModel, TrimTensor, keep_from
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

Trim = Literal["model", "tensor"]
MergeKind = Literal["mean", "sum", "max"]


def majority_sign(totals: Iterable[Tensor]) -> int:
    """Return the majority sign over the entries of the model: 1, -1, or 0 for a draw.

    Args:
        totals: Sums over the tasks, in pieces of at most 2^24 entries.

    Example:
        >>> majority_sign([torch.tensor([0.5, -9.0]), torch.tensor([0.1, 0.0])])
        1
    """
    signs = sum_of_signs(totals)
    return (signs > 0) - (signs < 0)


def sum_of_signs(totals: Iterable[Tensor]) -> int:
    """Return the number of positive minus the number of negative entries.

    Args:
        totals: Sums over the tasks, in pieces of at most 2^24 entries.

    Example:
        >>> sum_of_signs([torch.tensor([0.5, 9.0]), torch.tensor([-0.1, 0.0])])
        1
    """
    # float32 counts up to 2^24 exactly.
    return sum(int(total.sign().sum()) for total in totals)


class TIES(Merger):
    """Trim, elect signs, merge what agrees (Yadav et al., arXiv 2306.01708), as an exact stream.

    1. Trim: keep the ``density`` share of largest magnitude of every task vector.
    2. Elect: the sign of an entry is the sign of its sum over the tasks.
    3. Merge: mean, sum or largest magnitude of the non-zero entries that have the elected sign; times
    ``scale``.

    Task vectors are not kept: sums and counts of the positive and of the negative entries suffice. State: 12
    bytes per parameter (mean, max) or 8 (sum); 16 for the mean of more than 32767 tasks, or with weights.

    Entries whose sum is exactly zero: with ``trim="model"`` they take the majority sign over the entries of the
    model; if that is a draw, mean and sum keep the negative entries and max returns zero, as in the
    released code. With ``trim="tensor"`` they are positive, as in mergekit.

    Args:
        density: Share of the entries the trim keeps, in (0, 1].
        trim: ``"model"``: one threshold for the flattened model, ties at it kept (the paper). ``"tensor"``:
            exactly ``max(1, int(density * n))`` entries of each tensor (mergekit; PEFT but for tiny tensors).
        merge: ``"mean"`` (the paper), ``"sum"`` or ``"max"``.
        scale: Scaling coefficient; the paper searches 0.8 to 2.5 and falls back to 1.
        weights: One non-negative weight per task index, which multiplies the trimmed task vector; the mean is then
            weighted (as in mergekit). Default: 1 for every task.

    Example:
        >>> merger = TIES(density=1.0)
        >>> merger.update({"w": torch.tensor([1.0, -1.0, 2.0])})
        >>> merger.update({"w": torch.tensor([3.0, 4.0, 0.0])})
        >>> merger.compute()
        {'w': tensor([2., 4., 2.])}
    """

    name = "ties"
    summary = "trim, elect signs, merge the entries that agree"
    source = "2306.01708"
    per_task = ("weights",)

    def __init__(
        self,
        density: float = 0.2,
        *,
        trim: Trim = "model",
        merge: MergeKind = "mean",
        scale: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if trim not in ("model", "tensor"):
            raise ValueError(f"expected trim 'model' or 'tensor', got {trim!r}")
        if merge not in ("mean", "sum", "max"):
            raise ValueError(f"expected merge 'mean', 'sum' or 'max', got {merge!r}")
        if weights is not None and min(weights, default=-1) < 0:
            raise ValueError(f"expected weights of 0 or more, got {list(weights)}")
        self._sparsifier: Sparsifier = TrimModel(density) if trim == "model" else TrimTensor(density)
        self.density = density
        self.trim: Trim = trim
        self.merge: MergeKind = merge
        self.scale = scale
        self.weights = None if weights is None else list(weights)
        self.scope = (
            "model" if trim == "model" else "parameter"
        )  # the threshold, and the sign of entries whose sum is zero

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        if self.merge == "max":
            return {"pos_max": None, "neg_max": None, "total": None}
        sums: SlotDtypes = {"pos_sum": None, "neg_sum": None}
        if self.merge == "sum":
            return sums
        if self.weights is not None:
            return sums | {"pos_count": None, "neg_count": None}
        count = torch.int16 if num_tasks <= torch.iinfo(torch.int16).max else torch.int32
        return sums | {"pos_count": count, "neg_count": count}

    @override
    def _plan(self, vector: State, step: Step) -> Any:
        return self._sparsifier.plan(vector, step.task)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        threshold = plan if self.trim == "model" else plan[name].value
        if self.trim == "tensor" and plan[name].surplus:
            # More entries equal the threshold than may be kept, so it takes the whole tensor to choose.
            tau = self._sparsifier.sparsify(name, tau.to(float_dtype(slots)), step.task, plan)
        super()._fold(name, slots, tau, step, threshold)

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: float) -> None:
        tau = keep_from(tau, plan)
        weight = 1 if self.weights is None else task_weight(self.weights, step)
        if weight != 1:
            tau = tau * weight
        if self.merge == "max":
            torch.maximum(slots["pos_max"], tau, out=slots["pos_max"])
            torch.minimum(slots["neg_max"], tau, out=slots["neg_max"])
            slots["total"].add_(tau)
            return
        positive, negative = tau.clamp(min=0), tau.clamp(max=0)
        slots["pos_sum"].add_(positive)
        slots["neg_sum"].add_(negative)
        if self.merge == "mean":
            # Counts are integers; weights are added up as they are.
            signs = tau.sign_().to(torch.int16) if self.weights is None else tau.sign_()
            slots["pos_count"].add_(signs.clamp(min=0), alpha=weight)
            slots["neg_count"].sub_(signs.clamp_(max=0), alpha=weight)

    @override
    def _join_block(self, slots: Slots, other: Slots) -> None:
        if self.merge != "max":
            super()._join_block(slots, other)
            return
        torch.maximum(slots["pos_max"], other["pos_max"], out=slots["pos_max"])
        torch.minimum(slots["neg_max"], other["neg_max"], out=slots["neg_max"])
        slots["total"].add_(other["total"])

    @override
    def _overview(self) -> int:
        """Return the sign of entries whose sum is zero: 1, -1, or 0 if there is no majority."""
        if self.trim == "tensor":
            return 1
        return majority_sign(self._total(block) for slots in self._slots.values() for block, _ in slot_blocks(slots))

    @override
    def _read_block(self, slots: Slots, overview: int) -> Tensor:
        elected = torch.empty_like(slots["neg_max" if self.merge == "max" else "neg_sum"])
        (torch.ge if overview > 0 else torch.gt)(self._total(slots), 0, out=elected)
        if self.merge == "max":
            largest = slots["neg_max"].lerp(slots["pos_max"], elected).mul_(self.scale)
            # The released code multiplies the largest magnitude by the elected sign, which may be zero.
            return largest if overview else largest.masked_fill_(slots["total"] == 0, 0.0)
        merged = slots["neg_sum"].lerp(slots["pos_sum"], elected)
        if self.merge == "mean":
            counts = slots["neg_count"].to(elected.dtype).lerp(slots["pos_count"].to(elected.dtype), elected)
            merged.div_(counts.clamp_(min=1 if self.weights is None else torch.finfo(counts.dtype).tiny))
        return merged.mul_(self.scale)

    def _total(self, slots: Slots) -> Tensor:
        return slots["total"] if self.merge == "max" else slots["pos_sum"] + slots["neg_sum"]
