"""Diagnostics from singular values and vectors of task matrices: effective rank, overlap of leading subspaces."""

from typing import NamedTuple

import torch
from torch import Tensor

from clmerge.merging.spectral.decomposition import tolerance

_GRAM_TOLERANCE = 1e-7  # smaller singular values, relative to the largest, are rounding in a float64 Gram matrix


class Spectrum(NamedTuple):
    """Leading singular vectors of a matrix of shape ``(m, n)``, and all its singular values.

    Attributes:
        left: Orthonormal columns, ``(m, k)``, float64.
        values: Singular values, descending, zeros left out, ``(r,)``, float64.
        right: Orthonormal columns, ``(n, k)``, float64.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def spectrum(matrix: Tensor, rank: int) -> Spectrum:
    """Decompose a matrix through its smaller Gram matrix, in float64.

    For wide matrices this takes a fraction of the time of a full decomposition. Singular values below 1e-7 of the
    largest are lost; in a float32 matrix they are rounding noise.

    Args:
        matrix: Shape ``(m, n)``, floating point, both at least 1.
        rank: Maximum number of leading vectors; fewer if the matrix has a smaller rank ``r``.

    Example:
        >>> spectrum(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), rank=1).values
        tensor([3., 2.], dtype=torch.float64)
    """
    wide = matrix.detach().double() if matrix.shape[0] <= matrix.shape[1] else matrix.detach().double().T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values = squares.flip(0).clamp(min=0.0).sqrt()
    cut = max(tolerance(matrix.dtype, matrix.shape), _GRAM_TOLERANCE)
    values = values[values > cut * values[0]]
    short = vectors.flip(1)[:, : min(rank, len(values))]
    # Vectors computed by multiplication with the matrix are orthogonal up to rounding.
    long = torch.linalg.qr(wide.T @ short).Q
    left, right = (short, long) if matrix.shape[0] <= matrix.shape[1] else (long, short)
    return Spectrum(left, values, right)


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007).

    Args:
        values: Singular values, ``(r,)``, non-negative.

    Returns:
        A number from 1 (one direction) to ``r`` (all singular values equal); NaN for a zero matrix.

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 6)
        2.0
    """
    values = values.double()
    if not values.sum() > 0:
        return float("nan")
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def subspace_overlap(left: Tensor, right: Tensor) -> float:
    """Return the mean squared cosine of the principal angles between two column spaces.

    It is ``|U^T V|_F^2 / min(k, l)``: 1 if one space contains the other, 0 if they are orthogonal. For random
    subspaces of an ``m``-dimensional space the mean is ``max(k, l) / m``.

    Args:
        left: Orthonormal columns, ``(m, k)``.
        right: Orthonormal columns, ``(m, l)``.

    Returns:
        A number in [0, 1]; NaN if a basis is empty.

    Example:
        >>> subspace_overlap(torch.eye(3)[:, :2], torch.eye(3)[:, 1:])
        0.5
    """
    smaller = min(left.shape[1], right.shape[1])
    if not smaller:
        return float("nan")
    return min(1.0, float((left.double().T @ right.double()).square().sum()) / smaller)
