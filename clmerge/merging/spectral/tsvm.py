"""TSV-M: keep the leading singular vectors of every task, whiten them across tasks, recombine."""

from torch import Tensor
from typing_extensions import override

from clmerge.merging.spectral.decomposition import polar, tolerance
from clmerge.merging.spectral.triplets import Triplets


class TSVM(Triplets):
    """Merge task singular vectors (TSV-M, arXiv 2412.00081), as an exact stream.

    Of every task matrix of shape ``(m, n)`` the leading ``floor(min(m, n) / T)`` singular triplets are kept. Side by
    side they are ``U``, ``S`` and ``V``; the matrix becomes ``scale * polar(U) S polar(V)^T``, where ``polar`` is the
    nearest orthogonal matrix. Other parameters are averaged.

    The share of a task shrinks as tasks are added, and fewer leading triplets are a prefix of more: each update drops
    the last triplets of every task, so their total never exceeds ``min(m, n)`` and ``compute()`` equals the batch rule
    after every task. With more tasks than ``min(m, n)`` the merged matrix is zero, as in the official code. State: 8
    bytes per parameter. An update costs one decomposition per matrix, in float64.

    If the kept vectors of several tasks are linearly dependent (a task merged twice), the polar factor of the
    official code has arbitrary directions; here they are left out.

    Args:
        scale: Scaling coefficient; about 1 is best in the paper.

    Example:
        >>> import torch
        >>> merger = TSVM()
        >>> merger.update({"w": torch.tensor([[3.0, 0.0], [0.0, 0.5]])})
        >>> merger.update({"w": torch.tensor([[0.1, 0.0], [0.0, 2.0]])})
        >>> merger.compute()
        {'w': tensor([[3., 0.],
                [0., 2.]])}
    """

    name = "tsvm"
    summary = "leading singular vectors of every task, whitened and recombined"
    source = "2412.00081"

    @override
    def _recombined(self, left: Tensor, right: Tensor) -> Tensor:
        dtype = right.dtype
        u, vectors = left.double(), right.double()
        s = vectors.norm(dim=1)
        live = s > tolerance(dtype, right.shape) * s.max()
        u, s, vh = u[:, live], s[live], vectors[live] / s[live].unsqueeze(1)
        whitened: Tensor = polar(u, dtype) * (self.scale * s)
        return whitened @ polar(vh, dtype)
