"""Select the k-th largest magnitude of one or many tensors, exactly and without a sort."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clmerge.merging.at_once import Joined, concatenated, device_packs
from clmerge.merging.blocks import blocks, entries_at_once
from clmerge.merging.gathered import gathered
from clmerge.weights.task_vector import State, accumulator_dtype

_SMALL = 1 << 16  # up to here a direct selection is quickest
_BLOCK = 1 << 18  # every block has counts of its own to fill and to add
_DIGIT_BITS = 16
_GROUPED_BITS = 11  # of many parameters at once: three passes for float32, and two thousand counts for each


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
        magnitudes = [piece.to(dtype).abs() for piece in Joined(flat)]
        return _selected(magnitudes[0] if len(magnitudes) == 1 else torch.cat(magnitudes), k)
    step, pieces = sample_step(total), Joined(flat)
    return kth_of_pieces(pieces, [piece[::step].clone() for piece in pieces], dtype, total, k)


def kth_largest_of_each(vector: State, rank: Callable[[int], int]) -> dict[str, Threshold]:
    """Find a large absolute value of every parameter, with one copy to the host for all that a device takes at once.

    Args:
        vector: Parameters by name, floating-point and finite.
        rank: Returns the rank from the top, given the number of entries. If it is not smaller than that, everything is
            kept: the threshold is 0.

    Example:
        >>> kth_largest_of_each({"w": torch.tensor([1.0, -5.0, 3.0]), "b": torch.ones(1)}, lambda numel: 2)
        {'w': Threshold(value=3.0, surplus=0), 'b': Threshold(value=0.0, surplus=0)}
    """
    found, waiting = dict[str, Threshold](), dict[str, Tensor]()
    for name in vector:
        tau = vector[name].detach()
        found[name] = Threshold(value=0.0, surplus=0)
        if rank(tau.numel()) < tau.numel():
            if entries_at_once(tau.device):
                waiting[name] = tau
            else:
                found[name] = kth_largest_magnitude([tau], rank(tau.numel()))
    packs = device_packs(waiting)
    pairs = [
        _digits_of_each(concatenated([waiting[name] for name in pack.names]), pack.sizes, [*map(rank, pack.sizes)])
        for pack in packs
    ]
    numbers = gathered([pair.reshape(-1) for pair in pairs]).view(-1, 2).tolist()
    names = [name for pack in packs for name in pack.names]
    return found | {n: Threshold(value, int(surplus)) for n, (value, surplus) in zip(names, numbers, strict=True)}


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
    num_above: int | Tensor = 0  # stays on a GPU until it is complete
    num_candidates = 0
    for tensor in flat:
        for (piece,) in blocks(tensor):
            above, inside_bracket = _split(piece.to(dtype).abs(), low, high)
            start, num_candidates = num_candidates, num_candidates + inside_bracket.numel()
            if num_candidates > candidates.numel():
                return None
            candidates[start:num_candidates] = inside_bracket
            num_above += above
    rank = k - int(num_above)
    if not 1 <= rank <= num_candidates:
        return None
    return _selected(candidates[:num_candidates], rank)


def _split(magnitudes: Tensor, low: float, high: float) -> tuple[int | Tensor, Tensor]:
    """Count the entries above ``high``, and collect those from ``low`` to ``high``, of which few are expected."""
    if magnitudes.device.type == "cpu":
        # NumPy compares, counts and selects flags of one byte three times as fast as PyTorch does.
        array = magnitudes.numpy()
        above, inside = array > high, array >= low
        inside ^= above
        return int(np.count_nonzero(above)), torch.from_numpy(np.compress(inside, array))
    flags = torch.empty_like(magnitudes)
    num_above = torch.gt(magnitudes, high, out=flags).sum(dtype=torch.int64)
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


def _digits_of_each(flat: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Select as ``_by_digits`` does, for parameters that lie one after the other, without asking the device.

    Returns:
        Value and surplus of each parameter, float64 of shape ``(len(sizes), 2)``, on the device.
    """
    dtype = accumulator_dtype(flat)
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    device, count = flat.device, len(sizes)
    owner = torch.arange(count, device=device)
    owner = owner.repeat_interleave(torch.tensor(sizes).to(device), output_size=flat.numel())
    wanted = torch.tensor(ranks).to(device).unsqueeze(1)
    found = torch.zeros(count, dtype=torch.int64, device=device)
    surplus = torch.zeros_like(wanted)
    low = 8 * dtype.itemsize - 1  # without the sign
    while low:
        top, low = low, max(low - _GROUPED_BITS, 0)
        width = 1 << (top - low)
        counts = torch.zeros(count * width + 1, dtype=torch.int64, device=device)  # the last one is of no candidates
        for piece, its_owner in blocks(flat, owner):
            bits = (piece.to(dtype).view(integer) & torch.iinfo(integer).max).to(torch.int64)
            places = (bits >> low & (width - 1)).add_(its_owner, alpha=width)
            places.masked_fill_(bits >> top != found[its_owner], count * width)
            counts.scatter_add_(0, places, counts.new_ones(()).expand_as(places))
        of_digit = counts[:-1].view(count, width)
        at_least = of_digit.flip(1).cumsum(1).flip(1)  # how many candidates have this digit or a larger one
        digit = (at_least >= wanted).sum(1, keepdim=True) - 1
        surplus = at_least.gather(1, digit) - wanted
        wanted = of_digit.gather(1, digit) - surplus
        found = found << (top - low) | digit.squeeze(1)
    values = found.to(integer).view(dtype).to(torch.float64)
    return torch.stack([values, surplus.squeeze(1).to(torch.float64)], dim=1)


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
