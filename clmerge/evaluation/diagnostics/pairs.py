"""Relations between the task vectors of different tasks: norms, cosines, sign conflicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clmerge.merging.blocks import blocks

_ENTRIES = 1 << 20  # entries of all tasks together in one block: 8 MB in float64 for any number of tasks


@dataclass(frozen=True)
class PairSums:
    """Sums over entries for every pair of ``T`` tasks; the sums of several parameters can be added.

    Attributes:
        products: Inner products, ``(T, T)``, float64.
        opposed: Number of entries with opposite signs, ``(T, T)``, float64.
        shared: Number of entries that are non-zero in both, ``(T, T)``, float64.
        numel: Number of entries.
    """

    products: Tensor
    opposed: Tensor
    shared: Tensor
    numel: int

    def __add__(self, other: "PairSums") -> "PairSums":
        return PairSums(
            self.products + other.products,
            self.opposed + other.opposed,
            self.shared + other.shared,
            self.numel + other.numel,
        )

    def norms(self) -> Tensor:
        """Return the L2 norm of every task, ``(T,)``."""
        return self.products.diagonal().sqrt()

    def cosines(self) -> Tensor:
        """Return the cosine of every pair, ``(T, T)``; NaN if one of the two vectors is zero."""
        squares = self.products.diagonal()
        scale = (squares.unsqueeze(0) * squares.unsqueeze(1)).sqrt()  # exactly 1 for a vector and itself
        # Rounding must not take the cosine of equal vectors past 1.
        return torch.where(scale > 0, (self.products / scale).clamp(-1.0, 1.0), torch.nan)

    def sign_conflicts(self) -> Tensor:
        """Return the share of entries with opposite signs among those that are non-zero in both, ``(T, T)``.

        NaN if there are none.
        """
        return self.opposed / self.shared  # 0 / 0 is NaN


def pair_sums(taus: Sequence[Tensor]) -> PairSums:
    """Compare one parameter of several task vectors, in float64 and in blocks of bounded size.

    Args:
        taus: One tensor per task, floating point, of one shape and on one device; they may be views of files.

    Returns:
        Sums on the CPU.

    Example:
        >>> sums = pair_sums([torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, -4.0, 1.0])])
        >>> sums.norms()[0].item(), round(sums.cosines()[0, 1].item(), 4), sums.sign_conflicts()[0, 1].item()
        (5.0, -0.2746, 0.5)
    """
    count = len(taus)
    products, agreed, shared = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))
    block = max(1, _ENTRIES // max(1, count))
    for pieces in blocks(*(tau.detach().reshape(-1) for tau in taus), cpu_block=block):
        stacked = torch.stack([piece.double() for piece in pieces])
        signs = stacked.sign()
        nonzero = signs.abs()
        products += (stacked @ stacked.T).cpu()
        agreed += (signs @ signs.T).cpu()  # number of equal signs minus number of opposite signs
        shared += (nonzero @ nonzero.T).cpu()
    return PairSums(products, (shared - agreed) / 2, shared, taus[0].numel() if taus else 0)
