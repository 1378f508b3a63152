"""Which matrices are stored the other way round: rules that speak of outputs need to know."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor

IN_OUT = ("proj", "*.proj", "text_projection", "*.text_projection")
"""CLIP's projections, which are used as ``x @ proj``: their shape is (in, out), not (out, in)."""


def outputs_first(name: str, tensor: Tensor, transposed: Sequence[str] = IN_OUT) -> Tensor:
    """Turn an (in, out) matrix to (out, in), or back: a view. Everything else is returned as it is.

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
        tensor: The parameter, or anything of its shape. Of three or more dimensions, the first is that of the outputs.
        transposed: Patterns of matrices of shape (in, out).

    Returns:
        Shape (rows, columns). ``from_output_rows`` is the way back.

    Example:
        >>> import torch
        >>> [tuple(output_rows("conv", torch.ones(shape)).shape) for shape in ((4, 3, 2, 2), (5,), ())]
        [(4, 12), (1, 5), (1, 1)]
    """
    matrix = outputs_first(name, tensor, transposed)
    shape = (len(matrix), -1) if matrix.ndim > 1 and matrix.numel() else (1, matrix.numel())
    return matrix.contiguous().view(shape)


def from_output_rows(name: str, rows: Tensor, shape: tuple[int, ...], transposed: Sequence[str] = IN_OUT) -> Tensor:
    """Return what ``output_rows`` made a matrix of in its own shape again.

    Args:
        name: Name of the parameter.
        rows: Shape (rows, columns).
        shape: The parameter's.
        transposed: Patterns of matrices of shape (in, out).
    """
    turned = outputs_first(name, rows.new_empty(shape, device="meta"), transposed).shape
    return outputs_first(name, rows.reshape(turned), transposed)
