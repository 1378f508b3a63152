"""LoRM: closed-form merging of low-rank updates, by the outputs of the adapted layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.orientation import IN_OUT
from clmerge.merging.precision.regmean import RegMean
from clmerge.merging.spectral.adapters import check_rank


class LoRM(RegMean):
    """Merge LoRA updates so that every layer answers as its experts do (LoRM, arXiv 2410.17961).

    Across tasks the paper's ``sum(B_t A_t G_t) sum(G_t)^-1`` is ``RegMean`` on the products ``B_t A_t``, and so is this
    class without ``rank``. With ``rank`` the merged update fits one adapter again. The paper solves for one factor
    while the other is fixed, ``B = sum(tau_t G_t) A^T (A G A^T)^-1`` and ``A`` in turn, round after round with training
    in between. Both steps descend the same objective, ``sum(|(B A - tau_t) X_t|^2)``, whose minimum of a given rank has
    a closed form: ``B A = U U^T W`` with ``W`` the solution of ``RegMean`` and ``U`` the leading eigenvectors of
    ``W sum(G_t) W^T``. Either step leaves it as it is. State and exactness are those of ``RegMean``.

    The rounds of federated clients within a task, in which A and B are trained in turn, are training and not a rule;
    a task's branches are merged by this class as tasks are.

    Args:
        rank: Rank of every merged matrix; a packed ``in_proj_weight`` counts as three. Default: that of the sum.
        reduce: Factor of the off-diagonal entries of the Gram matrices, in [0, 1]; the authors use 0.5.
        scale: Scaling coefficient; 1 is the paper's rule.

    Raises:
        ValueError: If ``rank`` is below 1, or ``reduce`` or ``ridge`` out of range.

    Example:
        >>> merger = LoRM(rank=1)
        >>> one, other = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> merger.update({"w": one}, statistics={"gram": {"w": torch.diag(torch.tensor([1.0, 0.0]))}})
        >>> merger.update({"w": other}, statistics={"gram": {"w": torch.diag(torch.tensor([0.0, 1.0]))}})
        >>> merger.compute()["w"].round(decimals=3).abs()
        tensor([[3., 0.],
                [0., 0.]])
    """

    name = "lorm"
    summary = "RegMean of low-rank updates, at the rank of one adapter"
    source = "2410.17961"

    def __init__(
        self,
        rank: int | None = None,
        *,
        reduce: float = 0.5,
        ridge: float = 1e-8,
        transposed: Sequence[str] = IN_OUT,
        scale: float = 1.0,
    ) -> None:
        super().__init__(reduce, ridge=ridge, transposed=transposed, scale=scale)
        if rank is not None:
            check_rank(rank)
        self.rank = rank

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        merged = super()._read(name, slots, overview)
        if self.rank is None or name not in self._grams or not merged.numel():
            return merged
        matrix = self._oriented(name, merged).double()
        gram = self._grams[name]["gram"]
        gram = gram + self.ridge * float(gram.diagonal().mean()) * torch.eye(len(gram)).to(gram)
        pieces = matrix.chunk(3) if name.endswith("in_proj_weight") else (matrix,)
        low = torch.cat([_of_rank(piece, gram, self.rank) for piece in pieces])
        return self._oriented(name, low).to(merged.dtype).contiguous()


def _of_rank(matrix: Tensor, gram: Tensor, rank: int) -> Tensor:
    """Return the matrix of a rank whose outputs are nearest, for inputs with this Gram matrix."""
    leading = torch.linalg.eigh(matrix @ gram @ matrix.t()).eigenvectors[:, -rank:]
    nearest: Tensor = leading @ (leading.t() @ matrix)
    return nearest
