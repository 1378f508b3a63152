"""Extraction before subtraction: subtract from an expert only what it does not share with the anti-experts."""

from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, float_dtype
from clmerge.merging.checks import checked_choice
from clmerge.merging.merger import Merger
from clmerge.merging.orientation import from_output_rows, output_rows
from clmerge.merging.step import Step

Shared = Literal["both", "expert"]

_OPPOSITE = 1e-6  # sums of two unit vectors below it are zero


class ExtSub(Merger):
    """Subtract the deficiency of anti-experts from an expert (Ext-Sub, arXiv 2308.08090), as an exact stream.

    The first task vector is the expert, the later ones are anti-experts, trained on what is to be unlearned. For every
    row of a matrix (the weights of one output), the shared direction is the sum of the two unit vectors. The component
    of an anti-expert orthogonal to it is its deficiency, and the result is ``expert - strength * sum(deficiencies)``.
    After one task the result is the expert itself. A parameter of at most one dimension is one row; with three or more
    dimensions, each index of the first is a row. CLIP's ``proj`` and ``text_projection``, of shape (in, out), have
    their outputs in columns.

    The released code divides by zero if a row of either is zero; here zero rows and opposite rows have no shared
    direction. State: 8 bytes per parameter. The order matters, because the first is the expert.

    Args:
        strength: Factor of the deficiencies.
        shared: ``"both"``: the shared direction is the sum of the two unit vectors (the paper and its code).
            ``"expert"``: it is the expert's own direction, so that nothing along the expert is subtracted.

    Raises:
        ValueError: If ``shared`` has another value.

    Example:
        >>> merger = ExtSub(shared="expert")
        >>> merger.update({"w": torch.tensor([2.0, 0.0])})
        >>> merger.update({"w": torch.tensor([1.0, 3.0])})
        >>> merger.compute()
        {'w': tensor([ 2., -3.])}
    """

    name = "ext_sub"
    summary = "subtract from the first task what the others do not share with it"
    source = "2308.08090"
    order_free = False
    slots = ("expert", "deficiency")

    def __init__(self, strength: float = 1.0, *, shared: Shared = "both") -> None:
        super().__init__()
        self.strength = strength
        self.shared: Shared = checked_choice("shared", shared, Shared)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        if not step.position:
            slots["expert"].copy_(tau)
            return
        # In float64: the squares of float32 values may overflow or underflow in float32.
        rows, expert = (output_rows(name, tensor.to(torch.float64)) for tensor in (tau, slots["expert"]))
        direction, own = _unit(expert), _unit(rows)
        if self.shared == "both":
            shares = direction.any(dim=1, keepdim=True) & own.any(dim=1, keepdim=True)
            direction = _unit((direction + own) * shares, _OPPOSITE)
        along = (rows * direction).sum(dim=1, keepdim=True)
        deficiency = from_output_rows(name, rows - along * direction, tuple(tau.shape))
        slots["deficiency"].add_(deficiency.to(float_dtype(slots)))

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["expert"] - self.strength * slots["deficiency"]


def _unit(rows: Tensor, zero: float = 0.0) -> Tensor:
    """Return rows of length 1; those no longer than ``zero`` become zero."""
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > zero, rows / norms, 0.0)
