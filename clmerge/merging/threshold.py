"""Select the k-th largest magnitude of one or many tensors, exactly and without a sort."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clmerge.merging.blocks import blocks
from clmerge.weights.task_vector import accumulator_dtype

_DIGIT_BITS = 16
_BLOCK = 1 << 18  # every block has its own counts to fill and to add
_SMALL = 1 << 14  # up to here a direct selection is quicker than histograms


def kth_largest_magnitude(tensors: Sequence[Tensor], k: int) -> float:
    """Return the k-th largest absolute value over all tensors together.

    The bits of a non-negative float, read as an integer, have the order of the float. So the value is found
    sixteen bits at a time, from the top, by counting how often each digit occurs: two passes for float32,
    whatever the values are, and no copy of the tensors.

    Args:
        tensors: Tensors of any shape, floating-point and finite.
        k: Rank from the top, from 1 to the number of entries.

    Raises:
        ValueError: If there is no such rank.

    Example:
        >>> kth_largest_magnitude([torch.tensor([1.0, -5.0]), torch.tensor([[3.0]])], k=2)
        3.0
    """
    total = sum(tensor.numel() for tensor in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"expected a rank between 1 and the {total} entries, got {k}")
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    dtype = accumulator_dtype(*flat)
    if total <= _SMALL:
        magnitudes = torch.cat([tensor.to(dtype) for tensor in flat]).abs_()
        return float(magnitudes.kthvalue(total - k + 1).values)

    integer = torch.int32 if dtype == torch.float32 else torch.int64
    found, low = 0, 8 * dtype.itemsize
    while low:
        low -= _DIGIT_BITS
        counts = _digit_counts(flat, dtype, integer, found, low).to("cpu")
        at_least = counts.flip(0).cumsum(0).flip(0)  # how many candidates have this digit or a larger one
        digit = int((at_least >= k).sum()) - 1
        k -= int(at_least[digit] - counts[digit])
        found = found << _DIGIT_BITS | digit
    return float(torch.tensor(found, dtype=integer).view(dtype))


def _digit_counts(
    flat: list[Tensor], dtype: torch.dtype, integer: torch.dtype, found: int, low: int
) -> Tensor:
    """Count the digits that start at bit ``low`` among the magnitudes whose higher bits are ``found``."""
    counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64, device=flat[0].device)
    top = low + _DIGIT_BITS == 8 * dtype.itemsize
    for tensor in flat:
        for (piece,) in blocks(tensor, cpu_block=_BLOCK):
            bits = piece.to(dtype).view(integer) & torch.iinfo(integer).max  # without the sign
            if not top:
                bits = _with_prefix(bits, found, low + _DIGIT_BITS)
            digits = bits.bitwise_right_shift_(low).bitwise_and_((1 << _DIGIT_BITS) - 1)
            count = torch.bincount(digits)  # as long as the largest digit asks for
            counts[: len(count)] += count
    return counts


def _with_prefix(bits: Tensor, prefix: int, shift: int) -> Tensor:
    """Select the integers whose bits from ``shift`` on are ``prefix``; few are expected."""
    if bits.numel() % 8 == 0:
        # Eight flags are tested at once as one 64-bit integer: most groups of eight hold no match, and a
        # selection entry by entry costs as much as everything else together.
        high = bits >> shift
        flags = torch.eq(high, prefix, out=high).to(torch.uint8)
        bits = bits.view(-1, 8).index_select(0, flags.view(torch.int64).nonzero().squeeze(1)).view(-1)
    return bits.masked_select(bits >> shift == prefix)
