"""Norms and inner products of parameters, summed in float64."""

import math

from torch import Tensor

from clmerge.merging.blocks import blocks
from clmerge.weights.task_vector import State


def inner_product(left: Tensor, right: Tensor) -> float:
    """Return the sum of the entrywise product of two tensors.

    Args:
        left: Any shape, floating-point.
        right: Same shape and device.

    Example:
        >>> import torch
        >>> inner_product(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))
        1.0
    """
    # Products are taken in float64: those of float32 values may not be float32 values.
    pieces = blocks(left.detach().reshape(-1), right.detach().reshape(-1))
    return sum(float((a.double() * b).sum()) for a, b in pieces)


def squared_norm(tensor: Tensor) -> float:
    """Return the squared L2 norm of a tensor.

    Args:
        tensor: Any shape, floating-point.

    Example:
        >>> import torch
        >>> squared_norm(torch.tensor([3.0, -4.0]))
        25.0
    """
    return sum(float(piece.double().square().sum()) for (piece,) in blocks(tensor.detach().reshape(-1)))


def vector_norm(vector: State) -> float:
    """Return the L2 norm of a whole task vector.

    Args:
        vector: Parameter name -> tensor.

    Example:
        >>> import torch
        >>> vector_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        5.0
    """
    return math.sqrt(sum(squared_norm(vector[name]) for name in vector))


def l1_norm(vector: State) -> float:
    """Return the sum of the magnitudes of a whole task vector.

    Args:
        vector: Parameter name -> tensor.

    Example:
        >>> import torch
        >>> l1_norm({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor(4.0)})
        8.0
    """
    flat = (vector[name].detach().reshape(-1) for name in vector)
    return sum(float(piece.double().abs_().sum()) for tensor in flat for (piece,) in blocks(tensor))
