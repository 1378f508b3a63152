"""Parameters as one row per unit, and the best pairing of rows."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clmerge.alignment.spec import Axis


def unit_rows(tensor: Tensor, axis: Axis, size: int) -> Tensor:
    """Return a parameter as a matrix with one row per unit, in float32 or float64.

    Args:
        tensor: The parameter.
        axis: The axis along which the units lie.
        size: Number of units.
    """
    length = size * axis.spread
    part = tensor.narrow(axis.axis, axis.part * length, length).movedim(axis.axis, 0)
    return part.reshape(size, -1).to(torch.promote_types(tensor.dtype, torch.float32))


def assignment(table: Tensor) -> Tensor:
    """Return, for every row, the column of the one-to-one pairing with the largest sum (Hungarian method).

    Args:
        table: Finite scores of shape ``(n, n)``.

    Example:
        >>> assignment(torch.tensor([[1.0, 3.0], [2.0, 1.0]]))
        tensor([1, 0])
    """
    columns = linear_sum_assignment(table.double().cpu().numpy(), maximize=True)[1]
    return torch.as_tensor(columns, dtype=torch.int64)
