"""Communication between the processes of a distributed run outside of a fit."""

from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up ``values`` over all processes of a distributed run, in the same order on each of them.

    The values are summed on the CPU, because evaluation between two fits runs there, also where NCCL does not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts: list[Tensor] = [torch.empty(0)] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values.cpu())
    return torch.stack(parts).sum(dim=0).to(values.device)


def joined_over_processes(values: Tensor) -> Tensor:
    """Return the rows of all processes of a distributed run on the CPU, in the order of the ranks, on each of them.

    Args:
        values: ``(N, ...)``; N may differ between processes.
    """
    values = values.cpu()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts: list[Tensor] = [values] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values)
    return torch.cat(parts)


def of_rank_zero(value: Value) -> Value:
    """Return the value of rank zero on every rank, because results may differ bitwise between ranks.

    Args:
        value: A value that can be pickled; equal in shape and kind on every rank.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
