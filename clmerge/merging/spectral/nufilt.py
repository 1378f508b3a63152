"""NuFilt: filter a new task matrix through the null space of the merged one, and give back what the filter took."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_share
from clmerge.merging.orientation import outputs_first
from clmerge.merging.spectral.decomposition import Spectral, live_svd
from clmerge.merging.step import Step


class NuFilt(Spectral):
    """Merge continually by null-space filtering (NuFilt, arXiv 2509.21413), in closed form.

    The right singular vectors of a task matrix stand for the inputs of its task. With ``M`` the merged matrix so far,
    ``V_p`` its leading right singular vectors, ``V_t`` those of the new task matrix ``tau`` and ``P = I - V_p V_p^T``,
    the paper adds ``tau (P + B A)`` and trains the small factors B and A so that ``M' V_t = tau V_t`` and ``M' V_p = M
    V_p``. Both hold at once for

    ``M' = M + tau P + R (P V_t)^+`` with ``R = (tau V_p V_p^T - M) V_t``,

    where the paper's loss is zero: nothing is trained, and nothing is drawn. Directions of ``V_t`` that lie within
    ``V_p`` cannot have both; ``ridge`` makes the earlier tasks win there. Other parameters are averaged.

    State: 4 bytes per parameter. An update costs two decompositions per matrix, in float64. The order of the tasks
    matters.

    The released code treats the attention and the first layer of each MLP and leaves everything else at theta_0, and
    takes away 128 arbitrary directions of the first task, whose predecessor is zero; here the first task is kept whole.

    Args:
        kept: Share of the inputs whose directions are protected. The default is the released code's 128 of the 768
            inputs of a ViT-B, at any width. At least one direction.
        new: Share of the inputs whose directions of the new task are restored; by default 8 of 768. At least one.
        ridge: Added to the squared cosines between the new directions and what the filter leaves, above 0.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``kept`` or ``new`` is not a share, or ``ridge`` is not positive.

    Example:
        >>> merger = NuFilt()
        >>> merger.update({"w": torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 3.0]])})
        >>> merger.compute()["w"]  # the first input answers as after the first task
        tensor([[2., 0., 0.],
                [0., 0., 3.]])
    """

    name = "nufilt"
    summary = "filter a new task through the null space of the merged model, restore its leading directions"
    source = "2509.21413"
    order_free = False
    slots = ("sum",)  # of a matrix the merged one; of other parameters the sum

    def __init__(
        self,
        kept: float = 1 / 6,
        new: float = 1 / 96,
        *,
        ridge: float = 1e-4,
        scale: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(scale, include=include, exclude=exclude, split_qkv=split_qkv)
        self.kept = checked_share("kept", kept)
        self.new = checked_share("new", new)
        if not ridge > 0:
            raise ValueError(f"expected ridge above 0, got {ridge}: new directions may lie within the protected ones")
        self.ridge = ridge

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: Any) -> None:
        totals = self._matrices.pieces(name, slots["sum"])
        if totals and step.position:
            for total, piece in zip(totals, self._matrices.pieces(name, tau), strict=True):
                merged = outputs_first(name, total)
                merged.add_(self._added(merged, outputs_first(name, piece).double()))
        else:
            slots["sum"].add_(tau)

    def _added(self, total: Tensor, tau: Tensor) -> Tensor:
        """Return what a task matrix, (out, in) in float64, adds to the merged one."""
        merged, inputs = total.double(), tau.shape[1]
        past = _leading(merged, total.dtype, self.kept * inputs)
        mine = _leading(tau, total.dtype, self.new * inputs)
        within = (tau @ past) @ past.t()
        missing = (within - merged) @ mine
        outside = mine - past @ (past.t() @ mine)
        cosines = outside.t() @ outside
        cosines.diagonal().add_(self.ridge)
        added: Tensor = tau - within + missing @ torch.linalg.solve(cosines, outside.t())
        return added

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        share = 1 if self._matrices.pieces(name, slots["sum"]) else self.num_tasks
        return slots["sum"] * (self.scale / share)


def _leading(matrix: Tensor, dtype: torch.dtype, count: float) -> Tensor:
    """Return the leading right singular vectors in columns, as far as the rank goes."""
    return live_svd(matrix, dtype)[2][: max(1, round(count))].t()
