"""Scales from numbers to positions, and round numbers for the ticks of axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Map numbers from ``low`` to ``high`` to positions from ``start`` to ``end``, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a number."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def scale_of(
    values: Sequence[float],
    positions: tuple[float, float],
    *,
    fixed: tuple[float, float] | None = None,
    log: bool = False,
    pad: float = 0.05,
    zero: bool = False,
) -> Scale:
    """Return a scale that covers all values.

    Args:
        values: The values to show; may be empty.
        positions: First and last position.
        fixed: Range to use instead of that of the values.
        log: Whether it is logarithmic; values are then positive.
        pad: Share of the range to add on both sides.
        zero: Whether to begin at zero unless values are negative.
    """
    if fixed is not None:
        return Scale(*fixed, *positions)
    low, high = min(values, default=0.0), max(values, default=1.0)
    if log:
        around = max((high / low) ** pad, 1.2 if high == low else 1.02)
        return Scale(low / around, high * around, *positions, log=True)
    if zero and low >= 0:
        return Scale(0.0, high * (1 + pad) or 1.0, *positions)
    around = (high - low) * pad if high > low else max(abs(high) * 0.05, 0.01)
    return Scale(low - around, high + around, *positions)


def ticks(scale: Scale, count: int, *, whole: bool = False) -> list[float]:
    """Return about ``count`` round numbers inside a scale.

    Args:
        scale: The scale.
        count: Largest number of ticks wanted.
        whole: Whether to return whole numbers only.

    Example:
        >>> ticks(Scale(0.0, 1.0, 0, 100), 5)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> ticks(Scale(3.0e5, 4.0e7, 0, 100, log=True), 5)
        [1000000.0, 10000000.0]
    """
    if scale.log and scale.high > 10 * scale.low:
        return _log_ticks(scale, count)
    rough = (scale.high - scale.low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _log_ticks(scale: Scale, count: int) -> list[float]:
    decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    for factors in ((1,), (1, 3)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        found = [value for value in found if scale.low <= value <= scale.high]
        if len(found) >= 2:
            break
    return found[:: max(1, math.ceil(len(found) / count))]
