"""Select the k-th largest magnitude of one or many tensors, exactly and without a sort."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clmerge.merging.blocks import blocks
from clmerge.weights.task_vector import accumulator_dtype

_SMALL = 1 << 16  # up to here a direct selection is quickest
_BLOCK = 1 << 18  # every block has counts of its own to fill and to add
_DIGIT_BITS = 16


class Threshold(NamedTuple):
    """The magnitude from which on entries are kept.

    Attributes:
        value: The k-th largest magnitude.
        surplus: How many entries more than k have at least this magnitude, because some equal it.
    """

    value: float
    surplus: int


def kth_largest_magnitude(tensors: Sequence[Tensor], k: int) -> Threshold:
    """Find the k-th largest absolute value over all tensors together.

    A sample gives a bracket for the value; one pass counts larger entries and collects the few entries inside the
    bracket, among which the value is selected. If that fails, for example because many entries are equal, the
    value is found by digits. Either way the result is exact.

    Args:
        tensors: Tensors of any shape, floating-point and finite, on one device.
        k: Rank from the top, from 1 to the number of entries.

    Raises:
        ValueError: If there is no such rank.

    Example:
        >>> kth_largest_magnitude([torch.tensor([1.0, -5.0]), torch.tensor([[3.0]])], k=2)
        Threshold(value=3.0, surplus=0)
    """
    total = sum(tensor.numel() for tensor in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"expected a rank between 1 and the {total} entries, got {k}")
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    dtype = accumulator_dtype(*flat)
    if total <= _SMALL:
        magnitudes = [tensor.to(dtype).abs() for tensor in flat]
        return _selected(magnitudes[0] if len(magnitudes) == 1 else torch.cat(magnitudes), k)
    step = sample_step(total)
    return kth_of_pieces(flat, [tensor[::step] for tensor in flat], dtype, total, k)


def sample_step(total: int) -> int:
    """Return the distance between sampled entries for a good sample of ``total`` entries."""
    # An odd step does not sample a single column of a matrix whose rows have an even length.
    return int(total ** (1 / 3)) | 1


def kth_of_pieces(
    flat: Iterable[Tensor], sample: Sequence[Tensor], dtype: torch.dtype, total: int, k: int
) -> Threshold:
    """Find the k-th largest absolute value of pieces that need not be in memory together.

    Args:
        flat: Pieces of shape ``(numel,)`` on one device; iterated over once, or up to four times more if the sample
            misleads, so an iterator is not enough.
        sample: Every ``sample_step(total)``-th entry of every piece.
        dtype: float32 or float64, in which magnitudes are compared.
        total: Entries of all pieces together.
        k: Rank from the top, from 1 to ``total``.

    Example:
        >>> piece = torch.arange(10.0)
        >>> kth_of_pieces([piece], [piece[::3]], torch.float32, 10, k=2)
        Threshold(value=8.0, surplus=0)
    """
    return _by_sample(flat, sample, dtype, total, k) or _by_digits(flat, dtype, k)


def _selected(magnitudes: Tensor, k: int) -> Threshold:
    """Select directly from a copy of all magnitudes, in time proportional to their number; reorders the copy."""
    position = magnitudes.numel() - k
    if magnitudes.device.type == "cpu":
        # NumPy's selection takes a fifth of the time that kthvalue takes.
        array = magnitudes.numpy()
        array.partition(position)
        return Threshold(float(array[position]), int(np.count_nonzero(array[:position] == array[position])))
    value = magnitudes.kthvalue(position + 1).values
    return Threshold(float(value), int((magnitudes >= value).sum()) - k)


def _by_sample(
    flat: Iterable[Tensor], pieces: Sequence[Tensor], dtype: torch.dtype, total: int, k: int
) -> Threshold | None:
    """Select from a bracket estimated from a sample; None if the bracket is wide or misses the value."""
    sample = torch.cat(list(pieces)).to(dtype).abs_()
    share = k / total
    margin = 3 * math.sqrt(share * (1 - share) / sample.numel()) + 2 / sample.numel()
    low, high = (_quantile(sample, 1 - share + side * margin) for side in (-1, 1))
    inside = int(((sample >= low) & (sample <= high)).sum())
    if inside > 4 * margin * sample.numel():  # many equal entries: the candidates would fill the memory
        return None

    # One buffer for all candidates, of about 2 * margin * total. Kept block by block they would lie between the blocks'
    # temporaries and keep malloc from using that memory again: a merge would hold up to half a MiB per block in holes.
    candidates = sample.new_empty(min(int(8 * margin * total), total))
    num_above = num_candidates = 0
    for tensor in flat:
        for (piece,) in blocks(tensor):
            above, inside_bracket = _split(piece.to(dtype).abs(), low, high)
            start, num_candidates = num_candidates, num_candidates + inside_bracket.numel()
            if num_candidates > candidates.numel():
                return None
            candidates[start:num_candidates] = inside_bracket
            num_above += above
    rank = k - num_above
    if not 1 <= rank <= num_candidates:
        return None
    return _selected(candidates[:num_candidates], rank)


def _split(magnitudes: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """Count the entries above ``high``, and collect those from ``low`` to ``high``, of which few are expected."""
    if magnitudes.device.type == "cpu":
        # NumPy compares, counts and selects flags of one byte three times as fast as PyTorch does.
        array = magnitudes.numpy()
        above, inside = array > high, array >= low
        inside ^= above
        return int(np.count_nonzero(above)), torch.from_numpy(np.compress(inside, array))
    flags = torch.empty_like(magnitudes)
    num_above = int(torch.gt(magnitudes, high, out=flags).sum())
    torch.eq(magnitudes.clamp(low, high), magnitudes, out=flags)
    return num_above, _flagged(magnitudes, flags)


def _quantile(sample: Tensor, share: float) -> float:
    return _selected(sample, sample.numel() - min(max(int(share * sample.numel()), 0), sample.numel() - 1)).value


def _by_digits(flat: Iterable[Tensor], dtype: torch.dtype, k: int) -> Threshold:
    """Select sixteen bits at a time, from the top, by counting how often each digit occurs.

    The bits of a non-negative float, read as an integer, have the order of the float. Two passes for float32,
    four for float64, whatever the values are.
    """
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    found, low, surplus = 0, 8 * dtype.itemsize, 0
    while low:
        low -= _DIGIT_BITS
        counts = _digit_counts(flat, dtype, integer, found, low).to("cpu")
        at_least = counts.flip(0).cumsum(0).flip(0)  # how many candidates have this digit or a larger one
        digit = int((at_least >= k).sum()) - 1
        surplus = int(at_least[digit]) - k
        k -= int(at_least[digit] - counts[digit])
        found = found << _DIGIT_BITS | digit
    return Threshold(float(torch.tensor(found, dtype=integer).view(dtype)), surplus)


def _digit_counts(flat: Iterable[Tensor], dtype: torch.dtype, integer: torch.dtype, found: int, low: int) -> Tensor:
    """Count the digits that start at bit ``low`` among the magnitudes whose higher bits are ``found``."""
    counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
    top = low + _DIGIT_BITS == 8 * dtype.itemsize
    for tensor in flat:
        for (piece,) in blocks(tensor, cpu_block=_BLOCK):
            bits = piece.to(dtype).view(integer) & torch.iinfo(integer).max  # without the sign
            if not top:
                bits = bits.masked_select(bits >> (low + _DIGIT_BITS) == found)
            digits = bits.bitwise_right_shift_(low).bitwise_and_((1 << _DIGIT_BITS) - 1)
            count = torch.bincount(digits)  # as long as the largest digit asks for
            counts = counts.to(count.device)
            counts[: len(count)] += count
    return counts


def _flagged(entries: Tensor, flags: Tensor) -> Tensor:
    """Return the entries whose flag is 1; few are expected."""
    flags = flags.to(torch.uint8)
    if entries.numel() % 8 == 0:
        # Eight flags are tested at once as one 64-bit integer: most groups of eight have none, and a
        # selection entry by entry would cost as much as everything else together.
        groups = flags.view(torch.int64).nonzero().squeeze(1)
        entries = entries.view(-1, 8).index_select(0, groups).view(-1)
        flags = flags.view(-1, 8).index_select(0, groups).view(-1)
    return entries.masked_select(flags.view(torch.bool))
