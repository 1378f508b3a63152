"""Quantise task vectors to one or eight bits per entry."""

from math import prod
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots
from clmerge.merging.bits import pack_bits, unpack_bits
from clmerge.merging.sparsify.sparsifier import Sparsifier


class Quantise(Sparsifier):
    """Quantise task vectors to signs, or to eight bits, with one magnitude per tensor.

    - ``bits=1``: ``sign(tau) * mean |tau|``, the nearest such tensor; zeros count as negative (BitDelta, arXiv
      2402.10193, which then trains the magnitudes). Entries pruned before become non-zero again: prune afterwards, or
      use eight bits.
    - ``bits=8``: integer multiples, -127 to 127, of ``max |tau| / 127``.

    Any rule can merge the result. Rules that keep every task vector (TALL, PCB, ...) keep it packed if no other
    sparsifier follows: ``ceil(n / 8)`` bytes for a tensor of n entries with one bit, n with eight, and 4 for its
    magnitude. Vectors in a bank are quantised when they are read.

    Args:
        bits: 1 or 8.

    Raises:
        ValueError: If ``bits`` is neither.

    Example:
        >>> vector = {"w": torch.tensor([1.0, -3.0, 2.0])}
        >>> Quantise(bits=1)(vector)
        {'w': tensor([ 2., -2.,  2.])}
        >>> from clmerge.merging import TALL, Pipeline
        >>> Pipeline(TALL(), sparsifier=Quantise(bits=1)).state_size({"w": (80, 100)}, num_tasks=10)
        10040
    """

    name = "quantise"
    scope = "parameter"

    def __init__(self, bits: Literal[1, 8] = 8) -> None:
        if bits not in (1, 8):
            raise ValueError(f"expected 1 or 8 bits, got {bits}")
        self.bits: Literal[1, 8] = bits

    def pack(self, tau: Tensor) -> Slots:
        """Return the codes of one parameter and its magnitude.

        Args:
            tau: Any shape, float32 or float64.

        Returns:
            ``codes``: uint8 with eight entries to a byte, or int8 of the shape of ``tau``; ``magnitude``: 0-dim, dtype
            of ``tau``.
        """
        if not tau.numel():
            magnitude = tau.new_zeros(())
        elif self.bits == 1:
            # In float64, so that the order in which entries are added does not show.
            magnitude = tau.abs().mean(dtype=torch.float64).to(tau.dtype)
        else:
            magnitude = tau.abs().max() / 127
        if self.bits == 1:
            return {"codes": pack_bits(tau > 0), "magnitude": magnitude}
        whole = torch.zeros_like(tau) if not magnitude else (tau / magnitude).round_().clamp_(-127, 127)
        return {"codes": whole.to(torch.int8), "magnitude": magnitude}

    def unpack(self, packed: Slots, shape: tuple[int, ...]) -> Tensor:
        """Return the parameter from its codes and magnitude.

        Args:
            packed: The result of ``pack``.
            shape: Shape of the parameter.
        """
        codes, magnitude = packed["codes"], packed["magnitude"]
        if self.bits == 1:
            codes = unpack_bits(codes, 0, prod(shape)).view(shape).to(torch.int8).mul_(2).sub_(1)
        return codes.to(magnitude.dtype).mul_(magnitude)

    def packed_bytes(self, numel: int) -> int:
        """Return the packed bytes of a float32 parameter, including its magnitude.

        Args:
            numel: Number of entries.
        """
        return -(-numel * self.bits // 8) + 4

    def packed_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that ``pack`` returns.

        Args:
            shape: Shape of the parameter.
        """
        return {"codes": shape if self.bits == 8 else (-(-prod(shape) // 8),), "magnitude": ()}

    @override
    def sparsify(self, name: str, tau: Tensor, task: int, plan: None) -> Tensor:
        return self.unpack(self.pack(tau), tuple(tau.shape))
