"""EMR: one unified vector of elected signs and largest magnitudes, with a mask and a factor per task."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import gt, lt
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, device_of, float_dtype, slot_blocks
from clmerge.merging.bits import BitWriter, compared, pack_bits, unpack_bits
from clmerge.merging.checks import Shapes, checked_choice, num_entries
from clmerge.merging.gathered import gathered
from clmerge.merging.kept_beside import duplicate
from clmerge.merging.merger import Merger
from clmerge.merging.step import Step
from clmerge.merging.vectors import Pack
from clmerge.weights.task_vector import State, TaskVector

Rescaler = Literal["l1", "tensor_mean"]
Undecided = Literal["zero", "negative"]


class _Record(TypedDict):
    """State kept per task: two bits per entry (above zero, below zero) and the size of the task vector."""

    task: int
    positive: Tensor
    negative: Tensor
    l1: float
    tensor_means: float


@dataclass
class _Scratch:
    """Values collected for one task while its parameters are folded in.

    Attributes:
        positive: Bits of the entries above zero, in the order in which parameters are folded in.
        negative: Bits of those below zero.
        numbers: Number of entries by parameter, in that order.
        norms: Sums of magnitudes of a parameter's pieces, of shape ``(1,)`` on its device.
    """

    positive: BitWriter = field(default_factory=BitWriter)
    negative: BitWriter = field(default_factory=BitWriter)
    numbers: dict[str, int] = field(default_factory=dict)
    norms: dict[str, list[Tensor]] = field(default_factory=dict)

    def sizes(self) -> dict[str, float]:
        """Return the sum of magnitudes by parameter, with one question to the device."""
        numbers = iter(gathered([one for pieces in self.norms.values() for one in pieces]).tolist())
        return {name: sum((next(numbers) for _ in pieces), 0.0) for name, pieces in self.norms.items()}

    def bits(self, packed: Tensor, names: Iterable[str]) -> Tensor:
        """Return bits in the order of the given parameters."""
        if list(names) == list(self.numbers):
            return packed
        every = unpack_bits(packed, 0, sum(self.numbers.values()))
        parts = dict(zip(self.numbers, every.split_with_sizes([*self.numbers.values()]), strict=True))
        return pack_bits(torch.cat([parts[name] for name in names]))


class EMR(Merger):
    """Elect, mask and rescale (Huang et al., arXiv 2405.17461), as an exact stream.

    1. Elect: ``tau_uni`` has in every entry the sign of the sum over the tasks, and the largest magnitude among the
    entries that have this sign.
    2. Mask: ``M_t`` keeps the entries of ``tau_uni`` whose sign is that of ``tau_t``.
    3. Rescale: ``lambda_t = sum |tau_t| / sum |M_t tau_uni|`` restores the size of task t.

    Inputs of task t use ``task_view(t)``, theta0 + ``lambda_t M_t tau_uni``. ``compute()`` is ``scale * tau_uni``, for
    inputs of unknown task; the paper does not use it alone.

    Task vectors are not kept, only two bits per entry (above zero, below zero), so that masks stay exact when later
    tasks change an elected sign. State: 12 bytes per parameter, and 1/4 byte per parameter and task.

    Args:
        scale: Scaling coefficient of ``compute()``; task views have ``lambda_t`` instead.
        rescale: ``"l1"``: ``lambda_t`` as above, sums over the whole model (the paper). ``"tensor_mean"``: sums of the
            tensors' means, so that every tensor counts the same whatever its size (the released code).
        undecided: Entries whose sum is exactly zero: ``"zero"`` leaves them out, their sign is 0 (the paper);
            ``"negative"`` takes the largest of the negative ones (the released code).

    Example:
        >>> merger = EMR()
        >>> merger.update({"w": torch.tensor([1.0, 4.0, -1.0])})
        >>> merger.update({"w": torch.tensor([2.0, -1.0, -3.0])})
        >>> merger.compute(), merger.task_view(1)
        ({'w': tensor([ 2.,  4., -3.])}, {'w': tensor([ 2.4000,  0.0000, -3.6000])})
    """

    name = "emr"
    summary = "elected signs with largest magnitudes; a 1-bit mask and a factor per task"
    source = "2405.17461"
    task_views = True
    ignored_by_views = ("scale",)
    scope = "entry"  # that of compute(); the factors of task views are the whole model's
    slots = ("total", "pos_max", "neg_max")

    def __init__(self, scale: float = 1.0, *, rescale: Rescaler = "l1", undecided: Undecided = "zero") -> None:
        super().__init__()
        self.scale = scale
        self.rescale: Rescaler = checked_choice("rescale", rescale, Rescaler)
        self.undecided: Undecided = checked_choice("undecided", undecided, Undecided)
        # Numbered instead of listed, so that tensors are found in the state like all others.
        self._records: dict[str, _Record] = {}
        self._keep("_records", join=self._joined)

    @override
    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        return super().state_size(shapes, num_tasks) + num_tasks * 2 * -(-num_entries(shapes) // 8)

    @override
    def _plan(self, vector: State, step: Step) -> _Scratch:
        return _Scratch()

    @override
    def _fold_pack(self, pack: Pack, slots: Slots, tau: Tensor, step: Step, plan: _Scratch) -> None:
        dtype = float_dtype(slots)
        plan.numbers |= dict(zip(pack.names, pack.sizes, strict=True))
        plan.norms |= {name: [] for name in pack.names}
        for block, (piece,) in slot_blocks(slots, tau):
            piece = piece.to(dtype)
            self._join_block(block, {"total": piece, "pos_max": piece, "neg_max": piece})
            if step.is_piece:  # of a vector that is not known as a whole, so nobody asks for the task's view
                continue
            plan.positive.write(compared(piece, gt, 0))
            plan.negative.write(compared(piece, lt, 0))
            # Several parameters are one piece; of a single one there may be several.
            magnitudes = piece.abs()
            parts = magnitudes.split_with_sizes(pack.sizes) if len(pack.names) > 1 else (magnitudes,)
            for name, part in zip(pack.names, parts, strict=True):
                plan.norms[name].append(part.sum(dtype=torch.float64).reshape(1))

    @override
    def _join_block(self, slots: Slots, other: Slots) -> None:
        slots["total"].add_(other["total"])
        torch.maximum(slots["pos_max"], other["pos_max"], out=slots["pos_max"])
        torch.minimum(slots["neg_max"], other["neg_max"], out=slots["neg_max"])

    @override
    def _after_update(self, step: Step, plan: _Scratch) -> None:
        if step.is_piece:
            return
        positive, negative = (plan.bits(bits.packed(), self._slots) for bits in (plan.positive, plan.negative))
        sizes, l1, tensor_means = plan.sizes(), 0.0, 0.0
        for name in self._slots:
            l1 += sizes[name]
            tensor_means += sizes[name] / max(plan.numbers[name], 1)
        record = _Record(task=step.task, positive=positive, negative=negative, l1=l1, tensor_means=tensor_means)
        self._records |= {str(len(self._records)): record}

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return self._unified(slots).mul_(self.scale)

    def _unified(self, slots: Slots) -> Tensor:
        elected = torch.gt(slots["total"], 0, out=torch.empty_like(slots["total"]))
        unified = slots["neg_max"].lerp(slots["pos_max"], elected)
        return unified if self.undecided == "negative" else unified.mul_(slots["total"] != 0)

    @override
    def task_view(self, task: int) -> TaskVector:
        """Return ``lambda_t * M_t * tau_uni``, the vector to add to theta0 for one task.

        Args:
            task: Index of the task, as given to ``update``.

        Raises:
            ValueError: If no such task is merged.
        """
        record = next((record for record in self._records.values() if record["task"] == task), None)
        if record is None:
            raise ValueError(f"expected one of the merged tasks {list(self.tasks)}, got {task}")
        with torch.inference_mode(False), torch.no_grad():
            masked, kept, start = {}, 0.0, 0
            for name, slots in self._slots.items():
                masked[name] = torch.empty(self._shapes[name], dtype=float_dtype(slots), device=device_of(slots))
                size = 0.0
                for block, (out,) in slot_blocks(slots, masked[name]):
                    unified = self._unified(block)
                    count = unified.numel()
                    positive = unpack_bits(record["positive"], start, count).to(unified.device)
                    negative = unpack_bits(record["negative"], start, count).to(unified.device)
                    out.copy_(unified.clamp(min=0).mul_(positive).add_(unified.clamp(max=0).mul_(negative)))
                    size += float(out.abs().sum(dtype=torch.float64))
                    start += count
                kept += size / (max(masked[name].numel(), 1) if self.rescale == "tensor_mean" else 1)
            wanted = record["tensor_means" if self.rescale == "tensor_mean" else "l1"]
            return {name: tensor.mul_(wanted / kept if kept else 0.0) for name, tensor in masked.items()}

    def _joined(self, ours: dict[str, _Record], theirs: dict[str, _Record]) -> dict[str, _Record]:
        """Return the records of two streams, numbered on."""
        both = [*ours.values(), *theirs.values()]
        return {str(index): duplicate(record, self._device) for index, record in enumerate(both)}
