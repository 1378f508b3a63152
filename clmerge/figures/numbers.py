"""Format numbers for readers: percent, points, megabytes, seconds."""

import math
from typing import Literal, TypeAlias

MISSING = "-"

Unit: TypeAlias = Literal["share", "bytes", "seconds", "number"]
"""A share is shown in percent."""


def show(value: float, unit: Unit = "share", *, std: float = math.nan, digits: int = 1) -> str:
    """Return a number with its unit, and with its standard deviation if that is known.

    Args:
        value: The number; NaN is shown as a dash.
        unit: Its unit; a share is shown in percent.
        std: Its standard deviation, NaN if unknown.
        digits: Decimals of percentages.

    Example:
        >>> show(0.93846), show(2_801_664, "bytes"), show(0.042, "seconds"), show(0.30000000000000004, "number")
        ('93.8 %', '2.8 MB', '42 ms', '0.3')
        >>> show(0.91, std=0.014)
        '91.0 ± 1.4 %'
    """
    if math.isnan(value):
        return MISSING
    if unit == "share":
        around = "" if math.isnan(std) else f" ± {percent(std, digits)}"
        return f"{percent(value, digits)}{around} %"
    around = "" if math.isnan(std) else f" ± {show(std, unit)}"
    if unit == "bytes":
        return _bytes(value) + around
    if unit == "seconds":
        return (f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms") + around
    return f"{value:.4g}{around}"


def percent(value: float, digits: int = 1) -> str:
    """Return a share in percent, without the percent sign; never minus zero.

    Example:
        >>> percent(-0.0001), percent(0.5)
        ('0.0', '50.0')
    """
    if math.isnan(value):
        return MISSING
    text = f"{100 * value:.{digits}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text


def named(name: str, unit: Unit) -> str:
    """Return the name of an axis or a scale with its unit.

    Example:
        >>> named("accuracy, task-aware", "share"), named("bytes kept", "bytes")
        ('accuracy in %, task-aware', 'bytes kept')
    """
    what, comma, which = name.partition(",")
    return f"{what} in %{comma}{which}" if unit == "share" else name


def points(value: float, *, signed: bool = False) -> str:
    """Return a difference of shares in percentage points.

    Example:
        >>> points(0.017, signed=True), points(-0.01)
        ('+1.7', '-1.0')
    """
    text = percent(value)
    return f"+{text}" if signed and value > 0 and text not in (MISSING, "0.0") else text


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> plural(1, "run"), plural(2, "run")
        ('1 run', '2 runs')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
