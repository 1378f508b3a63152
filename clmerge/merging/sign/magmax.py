"""MagMax: keep, for every entry, the change of largest magnitude over the tasks."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.merger import Merger
from clmerge.merging.step import Step


def fold_max_magnitude(winner: Tensor, tau: Tensor) -> None:
    """Replace the entries of ``winner`` that ``tau`` exceeds in magnitude, in place; of +x and -x, +x stays.

    Args:
        winner: Running winners, any shape.
        tau: The next task vector, same shape and dtype. Magnitudes must stay below half of the dtype's largest number.

    Example:
        >>> winner = torch.tensor([1.0, -3.0, 2.0])
        >>> fold_max_magnitude(winner, torch.tensor([-2.0, 1.0, -2.0]))
        >>> winner
        tensor([-2., -3.,  2.])
    """
    larger = torch.maximum(winner, tau)
    torch.minimum(winner, tau, out=winner)
    # The sum of two numbers has the sign of the one of larger magnitude, and is 0 only for +x and -x.
    take_larger = larger + winner
    torch.ge(take_larger, 0, out=take_larger)
    # With weights of 0 and 1 lerp selects exactly; on a CPU torch.where takes ten times as long.
    torch.lerp(winner, larger, take_larger, out=winner)


class MagMax(Merger):
    """Keep, entry by entry, the change of largest magnitude (Marczak et al., arXiv 2407.06322).

    Made for sequential fine-tuning (start policy ``previous``); on independently fine-tuned experts the same
    rule is the paper's "MaxAbs" baseline. State: 4 bytes per parameter.

    Of two changes of equal magnitude and opposite sign the positive one wins, so that the order of tasks never matters.
    In the released code the later task wins; the difference shows on checkpoints in half precision, whose coarse grid
    makes equal magnitudes common.

    Args:
        scale: Scaling coefficient; 0.5 is the paper's, also after the first task.

    Example:
        >>> merger = MagMax(scale=1.0)
        >>> merger.update({"w": torch.tensor([1.0, -3.0])})
        >>> merger.update({"w": torch.tensor([-2.0, 1.0])})
        >>> merger.compute()
        {'w': tensor([-2., -3.])}
    """

    name = "magmax"
    summary = "the change of largest magnitude, entry by entry"
    source = "2407.06322"
    scope = "entry"
    slots = ("winner",)

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale

    @override
    def _fold_block(self, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        fold_max_magnitude(slots["winner"], tau)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["winner"] * self.scale

    @override
    def _join_block(self, slots: Slots, other: Slots) -> None:
        fold_max_magnitude(slots["winner"], other["winner"])
