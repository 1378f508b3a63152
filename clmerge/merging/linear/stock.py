"""Model Stock: scale the average by a ratio computed from the angles between the task vectors."""

import math
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, slot_blocks
from clmerge.merging.norms import squared_norm
from clmerge.merging.removal import Removable
from clmerge.merging.step import Step

_NO_DIRECTION = 1e-30  # norms below it are zero: their reciprocal is not a float32


def stock_ratio(unit_sum_squared: float, count: int) -> float:
    """Compute Model Stock's interpolation ratio from the sum of unit vectors.

    With ``cos`` the mean cosine over all pairs, clamped to [0, 1], the ratio is ``count * cos / (1 + (count -
    1) * cos)``.

    Args:
        unit_sum_squared: Squared norm of the sum of ``count`` unit vectors.
        count: Number of vectors; the ratio of one vector is 1.

    Returns:
        The factor of the average, in [0, 1]. Negative cosines, for which the formula has a pole, count as 0.

    Example:
        >>> stock_ratio(3.0, count=2)  # two vectors at 60 degrees
        0.6666666666666666
    """
    if count < 2:
        return 1.0
    cosine = min(max((unit_sum_squared - count) / (count * (count - 1)), 0.0), 1.0)
    return count * cosine / (1 + (count - 1) * cosine)


class ModelStock(Removable):
    """Scale the average by a ratio computed from the angles between the task vectors (arXiv 2403.19522).

    For every parameter tensor the mean of the task vectors is multiplied by ``N cos / (1 + (N - 1) cos)``
    with the mean cosine over all pairs. The mean needs no pairs: ``|sum of unit vectors|^2 = N + N (N - 1)
    cos``, so the stream is exact. State: 8 bytes per parameter.

    The rule is made for several fine-tuned models of one task; for nearly orthogonal task vectors the result is
    near theta0. No official code exists; cases that the paper leaves open: negative mean cosines count as
    0, and a task vector that is zero on a tensor (a frozen layer) has no direction and is ignored there.

    Args:
        scale: Scaling coefficient; 1 is the paper's rule.

    Example:
        >>> import torch
        >>> merger = ModelStock()
        >>> merger.update({"w": torch.tensor([1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([0.6, 0.8])})
        >>> merger.compute()
        {'w': tensor([0.6000, 0.3000])}
    """

    name = "model_stock"
    summary = "the average, shortened by the angle between the task vectors"
    source = "2403.19522"
    slots = ("sum", "unit_sum")

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self._directions: dict[str, int] = {}
        self._keep("_directions", join="sum")

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        norm = math.sqrt(squared_norm(tau))
        has_direction = norm > _NO_DIRECTION
        self._directions[name] = self._directions.get(name, 0) + step.sign * has_direction
        if has_direction:
            for block, (piece,) in slot_blocks(slots, tau):
                block["sum"].add_(piece, alpha=step.sign)
                block["unit_sum"].add_(piece, alpha=step.sign / norm)

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        count = self._directions[name]
        ratio = stock_ratio(squared_norm(slots["unit_sum"]), count)
        return slots["sum"] * (self.scale * ratio / max(count, 1))
