"""TIES: trim every task vector, elect a sign per entry, merge the entries that agree with it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import SlotDtypes, Slots, float_dtype, slot_blocks
from clmerge.merging.at_once import packed_slots
from clmerge.merging.checks import checked_choice, of_task
from clmerge.merging.gathered import gathered
from clmerge.merging.merger import Merger
from clmerge.merging.scope import Scope, Tally
from clmerge.merging.sparsify.sparsifier import Sparsifier, TrimModel, TrimTensor, keep_from, keep_largest_each
from clmerge.merging.step import Step
from clmerge.merging.vectors import Pack
from clmerge.weights.task_vector import State, TaskVector

Trim = Literal["model", "tensor"]
MergeKind = Literal["mean", "sum", "max"]

_COUNTS = (torch.int8, torch.int16, torch.int32)


def sum_of_signs(totals: Iterable[Tensor]) -> int:
    """Return the number of positive minus the number of negative entries.

    Args:
        totals: Sums over the tasks, in pieces of at most 2^24 entries.

    Example:
        >>> sum_of_signs([torch.tensor([0.5, 9.0]), torch.tensor([-0.1, 0.0])])
        1
    """
    # float32 counts up to 2^24 exactly.
    return int(gathered([total.sign().sum().reshape(1) for total in totals]).sum())


def count_signs(positive: Tensor, negative: Tensor, tau: Tensor) -> None:
    """Add 1 to ``positive`` where ``tau`` is above zero, and to ``negative`` where it is below, in place.

    Args:
        positive: Counts, any integer dtype, flat.
        negative: Counts of the same dtype and shape.
        tau: Entries of the same shape.

    Example:
        >>> counts = torch.zeros(2, 3, dtype=torch.int8)
        >>> count_signs(counts[0], counts[1], torch.tensor([-5.0, 0.0, 2.0]))
        >>> counts.tolist()
        [[0, 0, 1], [1, 0, 0]]
    """
    if tau.device.type == "cpu":
        # NumPy compares and adds flags of one byte four times as fast as PyTorch converts and clamps signs.
        entries = tau.numpy()
        for count, flags in ((positive.numpy(), entries > 0), (negative.numpy(), entries < 0)):
            np.add(count, flags.view(np.int8), out=count)
        return
    signs = tau.sign().to(positive.dtype)
    positive.add_(signs.clamp(min=0))
    negative.sub_(signs.clamp_(max=0))


class TIES(Merger):
    """Trim, elect signs, merge what agrees (Yadav et al., arXiv 2306.01708), as an exact stream.

    1. Trim: keep the ``density`` share of largest magnitude of every task vector.
    2. Elect: the sign of an entry is the sign of its sum over the tasks.
    3. Merge: mean, sum or largest magnitude of the non-zero entries that have the elected sign; times
    ``scale``.

    Task vectors are not kept: sums and counts of the positive and of the negative entries suffice. State: 10 bytes per
    parameter for the mean of up to 127 tasks, 12 for that of up to 32767 and for the largest, 8 for the sum; 16 for the
    mean of more tasks, or with weights.

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
    scope: Scope = "thresholds"  # and of the whole model the sign of entries whose sum is zero

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
        if weights is not None and min(weights, default=-1) < 0:
            raise ValueError(f"expected weights of 0 or more, got {list(weights)}")
        self._sparsifier: Sparsifier = TrimModel(density) if trim == "model" else TrimTensor(density)
        self.density = density
        self.trim: Trim = checked_choice("trim", trim, Trim)
        self.merge: MergeKind = checked_choice("merge", merge, MergeKind)
        self.scale = scale
        self.weights = None if weights is None else list(weights)
        if trim == "tensor" and self.scope == "thresholds":  # a rule derived from this one may see more
            self.scope = "parameter"

    @override
    def threshold_rank(self, total: int) -> int:
        return self._sparsifier.threshold_rank(total)

    @override
    def with_thresholds(self, thresholds: Mapping[int, float]) -> Self:
        known = deepcopy(self)
        known._sparsifier, known.scope = self._sparsifier.with_thresholds(thresholds), "entry"
        return known

    @override
    def _slot_dtypes(self, num_tasks: int) -> SlotDtypes:
        if self.merge == "max":
            return {"pos_max": None, "neg_max": None, "total": None}
        sums: SlotDtypes = {"pos_sum": None, "neg_sum": None}
        if self.merge == "sum":
            return sums
        if self.weights is not None:
            return sums | {"pos_count": None, "neg_count": None}
        count = next(dtype for dtype in _COUNTS if num_tasks <= torch.iinfo(dtype).max)
        return sums | {"pos_count": count, "neg_count": count}

    @override
    def _plan(self, vector: State, step: Step) -> Any:
        return self._sparsifier.plan(vector, step.task)

    @override
    def _fold_pack(self, pack: Pack, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        if self.trim == "tensor":
            bounds = [plan[name] for name in pack.names]
            plan = bounds[0].value
            if len(bounds) > 1 or bounds[0].surplus:
                # More entries equal a threshold than may be kept, or there are several of them.
                tau, plan = keep_largest_each(tau.to(float_dtype(slots)), pack.sizes, bounds), 0.0
        super()._fold_pack(pack, slots, tau, step, plan)

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: float) -> None:
        tau = keep_from(tau, plan)
        weight = 1 if self.weights is None else of_task("weights", self.weights, step.task)
        if weight != 1:
            tau = tau * weight
        if self.merge == "max":
            torch.maximum(slots["pos_max"], tau, out=slots["pos_max"])
            torch.minimum(slots["neg_max"], tau, out=slots["neg_max"])
            slots["total"].add_(tau)
            return
        slots["pos_sum"].add_(tau.clamp(min=0))
        slots["neg_sum"].add_(tau.clamp(max=0))
        if self.merge == "sum":
            return
        if self.weights is None:
            count_signs(slots["pos_count"], slots["neg_count"], tau)
        else:
            signs = tau.sign_()
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
        if self.trim == "tensor":
            return 1
        return self.decide(sum_of_signs(self._total(block) for block in self._blocks()))

    @override
    def tally(self) -> Tally:
        votes, is_open = 0, False
        for block in self._blocks():
            total = self._total(block)
            votes += sum_of_signs([total])
            is_open = is_open or self._is_open(block, total)
        return Tally(votes, is_open)

    @override
    def decide(self, votes: int) -> int:
        """Return the sign of entries whose sum is zero: 1, -1, or for the largest magnitude 0 if it is a draw."""
        return 1 if votes > 0 else 0 if self.merge == "max" and not votes else -1

    @override
    def compute_decided(self, decision: int) -> TaskVector:
        with torch.inference_mode(False), torch.no_grad():
            return self._computed(decision)

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

    def _blocks(self) -> Iterator[Slots]:
        return (block for _, slots in packed_slots(self._slots) for block, _ in slot_blocks(slots))

    def _is_open(self, slots: Slots, total: Tensor) -> bool:
        """Return whether an entry depends on the sign chosen for zero sums: its positive and negative parts differ."""
        kind = "max" if self.merge == "max" else "sum"
        # Numbers instead of booleans: on a CPU comparisons that return booleans, and any(), take five times as long.
        zero = torch.eq(total, 0, out=torch.empty_like(total))
        differ = torch.ne(slots[f"pos_{kind}"], slots[f"neg_{kind}"], out=torch.empty_like(total))
        return bool(zero.dot(differ))
