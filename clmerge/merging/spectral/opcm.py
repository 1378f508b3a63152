"""OPCM: add the component of a new task matrix orthogonal to the merged one, at constant norm."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.checks import checked_choice, checked_share
from clmerge.merging.norms import squared_norm, vector_norm
from clmerge.merging.spectral.decomposition import Spectral, live_svd
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State

ZeroDiagonal = Literal["paper", "released"]


class OPCM(Spectral):
    """Merge continually by orthogonal projection (OPCM, arXiv 2501.09522).

    With ``M = U S V^T`` the merged matrix so far, ``C = U^T tau V`` are the coordinates of a new task matrix. Its
    leading ``r x r`` block and its diagonal are set to zero, and ``M <- (lambda' M + U C V^T) / lambda``: the added
    matrix is orthogonal to ``M``. ``r`` is the number of leading singular values that stay within the share ``alpha``
    of their sum, without the one that crosses it. Parameters that are not matrices are added unchanged. ``lambda`` is
    one number for the model, chosen so that the norm of the merged vector is the mean norm of the task vectors; it
    grows like the square root of the number of tasks.

    The products ``lambda M`` are plain sums of the added matrices, so only the sum and the mean norm are kept.
    State: 4 bytes per parameter. An update costs one decomposition per matrix, in float64. The order of the tasks
    matters.

    The released code iterates over leaf modules, so a class embedding keeps its first task's value and the fused
    weights of ``nn.MultiheadAttention`` are skipped; here every parameter is merged. Directions in which ``M`` is
    zero to rounding have no coordinates to set to zero and are added unchanged.

    Args:
        alpha: Share of the spectrum of the merged matrix that is protected, in [0, 1]. With 1 no block is protected,
            because no singular value crosses the share.
        zero_diagonal: ``"paper"``: the diagonal of C is set to zero. ``"released"``: it is kept, because the statement
            of the authors' code that should zero it writes to a copy; which one their tables use is not known.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``alpha`` or ``zero_diagonal`` is out of range.

    Example:
        >>> merger = OPCM()
        >>> merger.update({"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[9.0, 0.0], [1.0, 0.0]])})
        >>> merger.compute()["w"][:, 1]
        tensor([0., 0.])
    """

    name = "opcm"
    summary = "add what is orthogonal to the merged model, at constant length"
    source = "2501.09522"
    order_free = False
    slots = ("sum",)

    def __init__(
        self,
        alpha: float = 0.5,
        *,
        zero_diagonal: ZeroDiagonal = "paper",
        scale: float = 1.0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__(scale, include=include, exclude=exclude, split_qkv=split_qkv)
        self.alpha = checked_share("alpha", alpha)
        self.zero_diagonal: ZeroDiagonal = checked_choice("zero_diagonal", zero_diagonal, ZeroDiagonal)
        self.scope = "model"  # one length for all parameters
        self._length = 0.0  # summed over the task vectors
        self._keep("_length")

    @override
    def _plan(self, vector: State, step: Step) -> float:
        super()._plan(vector, step)
        return vector_norm(vector)

    @override
    def _fold(self, name: str, slots: Slots, tau: Tensor, step: Step, plan: float) -> None:
        totals = self._matrices.pieces(name, slots["sum"])
        if totals and step.position:
            for total, piece in zip(totals, self._matrices.pieces(name, tau), strict=True):
                total.add_(self._orthogonal(total, piece.to(torch.float64)))
        else:
            slots["sum"].add_(tau)

    def _orthogonal(self, total: Tensor, tau: Tensor) -> Tensor:
        """Return the part of a task matrix that is added to the sum so far."""
        u, s, vh = live_svd(total.double(), total.dtype)
        coordinates = u.t() @ tau @ vh.t()
        crossed = (s.cumsum(0) > self.alpha * s.sum()).nonzero()
        rank = int(crossed[0]) if self.alpha < 1 and len(crossed) else 0
        # What is taken away: subtracting it spares the full bases of the spaces that U and V do not span.
        removed = torch.zeros_like(coordinates)
        removed[:rank, :rank] = coordinates[:rank, :rank]
        if self.zero_diagonal == "paper":
            removed.diagonal().copy_(coordinates.diagonal())
        return tau - u @ removed @ vh

    @override
    def _after_update(self, step: Step, plan: float) -> None:
        self._length += plan

    @override
    def _overview(self) -> float:
        """Return the factor of the sums: the scale divided by lambda."""
        length = math.sqrt(sum(squared_norm(slots["sum"]) for slots in self._slots.values()))
        return self.scale * self._length / self.num_tasks / length if length else 0.0

    @override
    def _read(self, name: str, slots: Slots, overview: float) -> Tensor:
        return slots["sum"] * overview
