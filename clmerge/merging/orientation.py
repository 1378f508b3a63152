"""Which matrices are stored as (in, out): rules that work on the outputs of a layer need to know."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor

IN_OUT = ("proj", "*.proj", "text_projection", "*.text_projection")
"""CLIP's projections, used as ``x @ proj``: their shape is (in, out), not (out, in)."""


def outputs_first(name: str, tensor: Tensor, transposed: Sequence[str] = IN_OUT) -> Tensor:
    """Return a transposed view of a matrix that is stored as (in, out); any other tensor is returned unchanged.

    Args:
        name: Name of the parameter.
        tensor: The parameter, or anything of its shape.
        transposed: Patterns of matrices of shape (in, out).

    Example:
        >>> import torch
        >>> [tuple(outputs_first(name, torch.ones(3, 2)).shape) for name in ("visual.proj", "fc.weight")]
        [(2, 3), (3, 2)]
    """
    turned = tensor.ndim == 2 and any(fnmatchcase(name, pattern) for pattern in transposed)
    return tensor.t() if turned else tensor


def output_rows(name: str, tensor: Tensor, transposed: Sequence[str] = IN_OUT) -> Tensor:
    """Return a parameter as a contiguous matrix with one row per output of its layer; vectors are one row.

    Args:
        name: Name of the parameter.
        tensor: The parameter, or a tensor of its shape. With three or more dimensions, the first one is the outputs.
        transposed: Patterns of matrices of shape (in, out).

    Returns:
        Shape (rows, columns). ``from_output_rows`` is the inverse.

    Example:
        >>> import torch
        >>> [tuple(output_rows("conv", torch.ones(shape)).shape) for shape in ((4, 3, 2, 2), (5,), ())]
        [(4, 12), (1, 5), (1, 1)]
    """
    matrix = outputs_first(name, tensor, transposed)
    shape = (len(matrix), -1) if matrix.ndim > 1 and matrix.numel() else (1, matrix.numel())
    return matrix.contiguous().view(shape)


def from_output_rows(name: str, rows: Tensor, shape: tuple[int, ...], transposed: Sequence[str] = IN_OUT) -> Tensor:
    """Return a matrix of ``output_rows`` in the parameter's own shape; the inverse of ``output_rows``.

    Args:
        name: Name of the parameter.
        rows: Shape (rows, columns).
        shape: Shape of the parameter.
        transposed: Patterns of matrices of shape (in, out).
    """
    turned = outputs_first(name, rows.new_empty(shape, device="meta"), transposed).shape
    return outputs_first(name, rows.reshape(turned), transposed)
