"""SLERP: spherical interpolation between the merged vector and the newest task vector."""

import math
from typing import Any

from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, slot_blocks
from clmerge.merging.checks import checked_share
from clmerge.merging.merger import Merger
from clmerge.merging.norms import inner_product, squared_norm
from clmerge.merging.step import Step

_PARALLEL = 0.9995  # cosines beyond it are interpolated linearly, as in mergekit: the sine of the angle vanishes


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """Compute the weights of spherical linear interpolation.

    Args:
        cosine: Cosine of the angle between the two ends.
        t: Position on the arc; 0 is the first end, 1 the second.

    Returns:
        The weights of the first and the second end; those of linear interpolation if the ends are nearly parallel or
        opposite.

    Example:
        >>> [round(weight, 4) for weight in slerp_weights(0.0, 0.5)]
        [0.7071, 0.7071]
    """
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


class SLERP(Merger):
    """Interpolate spherically towards every new task vector, per parameter tensor (as in mergekit, arXiv 2403.13257).

    With the angle ``w`` between the merged vector m and the task vector, ``m = sin((1 - t) w) / sin(w) * m +
    sin(t w) / sin(w) * tau``. As in mergekit the weights are computed from the directions and applied to the vectors
    without normalising them, so norms are interpolated; ends that are nearly parallel or opposite, or zero, are
    interpolated linearly. The rule is made for two models. More are merged one after the other, in order of arrival.

    mergekit interpolates the model weights. Weights of models fine-tuned from one theta0 are nearly parallel, so that
    is linear interpolation, as in ``WeightAverage`` and ``WiSEFT``. Here the ends are the task vectors, whose angles
    are large. State: 4 bytes per parameter.

    Args:
        t: Share of the newest task vector, in [0, 1]. Default: ``1 / n`` for the n-th: the midpoint of two vectors,
            and equal shares of parallel ones.
        scale: Scaling coefficient; 1 is the plain rule. For k orthogonal task vectors of norm 1 the result has norm 1,
            where their mean has ``1 / sqrt(k)``.

    Raises:
        ValueError: If ``t`` is outside [0, 1].

    Example:
        >>> import torch
        >>> merger = SLERP()
        >>> merger.update({"w": torch.tensor([1.0, 0.0])})
        >>> merger.update({"w": torch.tensor([0.0, 1.0])})
        >>> merger.compute()
        {'w': tensor([0.7071, 0.7071])}
    """

    name = "slerp"
    summary = "spherical interpolation with the newest task vector, for each parameter"
    source = "2403.13257"
    order_free = False
    slots = ("merged",)

    def __init__(self, t: float | None = None, *, scale: float = 1.0) -> None:
        super().__init__()
        self.t = None if t is None else checked_share("t", t)
        self.scale = scale

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        old, new = self._weights(slots["merged"], tau, step.position)
        dtype = slots["merged"].dtype
        for block, (piece,) in slot_blocks(slots, tau):
            block["merged"].mul_(old).add_(piece.to(dtype), alpha=new)

    def _weights(self, merged: Tensor, tau: Tensor, position: int) -> tuple[float, float]:
        if not position:
            return 0.0, 1.0
        t = 1 / (position + 1) if self.t is None else self.t
        norms = math.sqrt(squared_norm(merged)) * math.sqrt(squared_norm(tau))
        # Without a direction there is no angle; the cosine 1 stands for linear interpolation.
        return slerp_weights(inner_product(merged, tau) / norms if norms else 1.0, t)

    @override
    def _read_block(self, slots: Slots, overview: Any) -> Tensor:
        return slots["merged"] * self.scale
