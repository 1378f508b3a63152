"""Boolean masks packed as one bit per entry, eight to a byte."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def compared(tensor: Tensor, comparison: Callable[[Any, float], Any], bound: float) -> Tensor:
    """Compare every entry with a number.

    Args:
        tensor: Any shape, without a gradient.
        comparison: A comparison of ``operator``.
        bound: The number.

    Returns:
        bool of the same shape and device.

    Example:
        >>> from operator import gt
        >>> compared(torch.tensor([1.0, 3.0]), gt, 2.0)
        tensor([False,  True])
    """
    # On a CPU NumPy compares eight times as fast as PyTorch does.
    return torch.from_numpy(comparison(tensor.numpy(), bound)) if tensor.is_cpu else comparison(tensor, bound)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask, eight entries to a byte, the first in the lowest bit.

    Args:
        mask: bool, any shape.

    Returns:
        uint8 of shape ``(ceil(numel / 8),)``; unused bits of the last byte are 0.

    Example:
        >>> pack_bits(torch.tensor([True, False, True] + 6 * [False]))
        tensor([5, 0], dtype=torch.uint8)
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    packed = flat[:, 0].clone()
    for place in range(1, 8):
        packed.bitwise_or_(flat[:, place] << place)
    return packed


def unpack_bits(packed: Tensor, start: int, count: int) -> Tensor:
    """Read a range of packed bits.

    Args:
        packed: uint8, as returned by ``pack_bits`` or ``BitWriter``.
        start: Index of the first bit.
        count: Number of bits.

    Returns:
        bool of shape ``(count,)``.

    Example:
        >>> unpack_bits(torch.tensor([5, 1], dtype=torch.uint8), start=7, count=2)
        tensor([False,  True])
    """
    pieces = packed[start // 8 : -(-(start + count) // 8)]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (pieces.unsqueeze(1) >> places).bitwise_and_(1).view(-1)
    return bits[start % 8 : start % 8 + count].to(torch.bool)


class BitWriter:
    """Pack masks one after the other without gaps, in pieces of any length.

    Example:
        >>> writer = BitWriter()
        >>> writer.write(torch.tensor([True, False]))
        >>> writer.write(torch.tensor([True] * 7))
        >>> writer.packed()
        tensor([253,   1], dtype=torch.uint8)
    """

    def __init__(self) -> None:
        self._bytes: list[Tensor] = []
        self._rest = torch.empty(0, dtype=torch.bool)

    def write(self, mask: Tensor) -> None:
        """Append a mask.

        Args:
            mask: bool, any shape; all masks are moved to the device of the first.
        """
        device = self._bytes[0].device if self._bytes else mask.device
        waiting = torch.cat([self._rest.to(device), mask.reshape(-1).to(device)])
        whole = waiting.numel() // 8 * 8
        self._bytes.append(pack_bits(waiting[:whole]))
        self._rest = waiting[whole:]

    def packed(self) -> Tensor:
        """Return all masks written so far as uint8; the last byte is padded with zeros."""
        return torch.cat([*self._bytes, pack_bits(self._rest)])
