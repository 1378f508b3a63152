"""Cheap digests of tensors, to detect changes in place without keeping a copy."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers; for a sharded tensor, of this process's shard.

    Args:
        tensor: Any dtype, shape and device.

    Example:
        >>> digest(torch.ones(2)) == digest(torch.ones(2)), digest(torch.ones(2)) == digest(torch.zeros(2))
        (True, False)
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = local.detach().reshape(-1)
    return int(flat.view(_INTEGERS.get(flat.element_size(), torch.int64)).sum(dtype=torch.int64))


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the digest of every tensor by name."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def changed(tensors: Mapping[str, Tensor], before: Mapping[str, int]) -> list[str]:
    """Return the names of the tensors whose digest has changed.

    Args:
        tensors: Tensors by name.
        before: Earlier digests; tensors without one are ignored.
    """
    return [name for name, value in before.items() if digest(tensors[name]) != value]
