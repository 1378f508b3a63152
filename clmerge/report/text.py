"""Format numbers for readers: percent, points, megabytes, seconds."""

import math

from clmerge.report.charts import Unit
from clmerge.report.study import Spread

MISSING = "-"


def show(value: float, unit: Unit = "share", *, digits: int = 1) -> str:
    """Return a number with its unit.

    Args:
        value: The number; NaN is shown as a dash.
        unit: Its unit; a share is shown in percent.
        digits: Decimals of percentages.

    Example:
        >>> show(0.93846), show(2_801_664, "bytes"), show(0.042, "seconds"), show(0.30000000000000004, "number")
        ('93.8 %', '2.8 MB', '42 ms', '0.3')
    """
    if math.isnan(value):
        return MISSING
    if unit == "share":
        return f"{percent(value, digits)} %"
    if unit == "bytes":
        return _bytes(value)
    if unit == "seconds":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    return f"{value:.4g}"


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


def points(value: float, *, signed: bool = False) -> str:
    """Return a difference of shares in percentage points.

    Example:
        >>> points(0.017, signed=True), points(-0.01)
        ('+1.7', '-1.0')
    """
    text = percent(value)
    return f"+{text}" if signed and value > 0 and text not in (MISSING, "0.0") else text


def show_spread(spread: Spread, unit: Unit = "share", *, digits: int = 1) -> str:
    """Return a mean, with the standard deviation over runs if there are several.

    Example:
        >>> show_spread(Spread((0.9, 0.92))), show_spread(Spread((0.9,)))
        ('91.0 ± 1.4 %', '90.0 %')
    """
    text = show(spread.mean, unit, digits=digits)
    if math.isnan(spread.std):
        return text
    if unit == "share":
        return f"{percent(spread.mean, digits)} ± {percent(spread.std, digits)} %"
    return f"{text} ± {show(spread.std, unit)}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> plural(1, "run"), plural(2, "run")
        ('1 run', '2 runs')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def of_runs(count: int) -> str:
    """Return the number of runs in brackets; empty for one run.

    Example:
        >>> of_runs(1), of_runs(3)
        ('', ' (3 runs)')
    """
    return f" ({plural(count, 'run')})" if count > 1 else ""


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
