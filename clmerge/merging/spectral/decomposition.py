"""Base of the rules that decompose matrices, and decompositions that are robust to rounding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.checks import Shapes
from clmerge.merging.matrices import Matrices
from clmerge.merging.merger import Merger
from clmerge.merging.step import Step
from clmerge.weights.task_vector import State


class Spectral(Merger):
    """Base of the rules that decompose matrices: which parameters are matrices, and into how many each.

    A rule gets the matrices of a parameter, or of what it holds of one, as views: ``self._matrices.pieces(name,
    tensor)``, an empty list for a parameter that is not treated as a matrix. Decompositions are computed in float64
    for any dtype of the accumulators: singular vectors of float32 matrices have errors that the rules amplify, and
    LAPACK's float32 routine fails more often.

    Args:
        scale: Scaling coefficient; 1 is the plain rule.
        include: Glob patterns of the parameters that are treated as matrices. Default: all of two dimensions.
        exclude: Glob patterns of those that are not, and are merged like parameters of other dimensions; see
            ``Matrices``.
        split_qkv: Treat a fused query-key-value weight as three matrices; the result differs.
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        split_qkv: bool = False,
    ) -> None:
        super().__init__()
        self.scale = scale
        self._matrices = Matrices(include, exclude, split_qkv=split_qkv)
        self.include = self._matrices.include
        self.exclude = self._matrices.exclude
        self.split_qkv = split_qkv
        # Patterns are checked against all names, so a rule that has some must see the whole model.
        self.scope = "model" if self.include is not None or self.exclude else "parameter"

    @override
    def matrices(self, shapes: Shapes) -> list[str]:
        return self._matrices.listed(shapes)

    @override
    def check_names(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().check_names(shapes)
        self._matrices.check(dict(shapes))

    @override
    def _plan(self, vector: State, step: Step) -> Any:
        if self.scope == "model" and not step.position:
            self._matrices.check({name: tuple(vector[name].shape) for name in vector})
        return super()._plan(vector, step)


def tolerance(dtype: torch.dtype, shape: Sequence[int]) -> float:
    """Return the share of the largest singular value below which the others are rounding errors.

    Args:
        dtype: The dtype of the entries the matrix was made of.
        shape: Shape of the matrix.
    """
    return torch.finfo(dtype).eps * max(*shape)


def live_svd(matrix: Tensor, dtype: torch.dtype, largest: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a matrix; drop singular values that are zero to rounding, whose singular vectors are arbitrary.

    Args:
        matrix: Shape ``(m, n)``, float64, ``m`` and ``n`` at least 1.
        dtype: The dtype its entries were computed in.
        largest: The singular value that the others are compared with. Default: the largest of the matrix.

    Returns:
        ``u`` of shape ``(m, k)``, ``s`` of shape ``(k,)``, descending, and ``vh`` of shape ``(k, n)``, float64, with
        ``k`` the rank of the matrix.

    Example:
        >>> u, s, vh = live_svd(torch.ones(2, 3, dtype=torch.float64), torch.float32)
        >>> u.shape, vh.shape
        (torch.Size([2, 1]), torch.Size([1, 3]))
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > tolerance(dtype, matrix.shape) * (float(s[0]) if largest is None else largest)).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def polar(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest matrix whose non-zero singular values are 1: the orthogonal polar factor.

    Args:
        matrix: Shape ``(m, k)``, float64; ``k`` may be 0.
        dtype: The dtype its entries were known in.

    Example:
        >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64), torch.float32)
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    if not matrix.numel():
        return matrix.clone()
    u, _, vh = live_svd(matrix, dtype)
    return u @ vh
