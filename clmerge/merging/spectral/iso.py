"""Isotropic merging: give every direction of the summed task matrices the same strength."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.linear.sum import Sum
from clmerge.merging.spectral.decomposition import Spectral, live_svd


class IsoC(Spectral, Sum):
    """Sum the task matrices and flatten the spectrum of the sum (Iso-C, arXiv 2502.04959), as an exact stream.

    With ``U S V^T`` the singular value decomposition of ``sum(tau_t)``, a matrix becomes ``scale * mean(S) * U V^T``.
    Other parameters are averaged, as in the official code, which sums matrices but takes the mean of the rest. State: 4
    bytes per parameter. Reading costs one decomposition per matrix, in float64.

    Directions in which the sum is zero to rounding stay zero; the official code fills them with arbitrary ones. The
    mean is over all ``min(m, n)`` singular values in both.

    Args:
        scale: Scaling coefficient; the authors search 0.1 to 3.

    Example:
        >>> merger = IsoC()
        >>> merger.update({"w": torch.tensor([[3.0, 0.0], [0.0, 0.0]])})
        >>> merger.update({"w": torch.tensor([[0.0, 0.0], [0.0, 1.0]])})
        >>> merger.compute()
        {'w': tensor([[2., 0.],
                [0., 2.]])}
    """

    name = "iso_c"
    summary = "sum the matrices, then flatten the spectrum"
    source = "2502.04959"

    @override
    def _read(self, name: str, slots: Slots, overview: Any) -> Tensor:
        pieces = self._matrices.pieces(name, slots["sum"])
        if not pieces:
            return slots["sum"] * (self.scale / self.num_tasks)
        return torch.cat([self._flattened(piece) for piece in pieces])

    def _flattened(self, total: Tensor) -> Tensor:
        u, s, vh = live_svd(total.double(), total.dtype)
        return (u * (self.scale * s.sum() / min(total.shape)) @ vh).to(total.dtype)
