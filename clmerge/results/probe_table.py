"""Probes as text: what each found about every model, with its uncertainty where it is a share."""

import math
from collections.abc import Mapping
from typing import Any

from clmerge.results.results import ROUTING, Results

_Z = 1.959963984540054  # two-sided 95 %


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of n cases (Wilson, 1927).

    Args:
        share: The share, 0 to 1.
        n: Number of cases, at least one.

    Example:
        >>> [round(bound, 3) for bound in wilson(0.0, 36)]
        [0.0, 0.096]
    """
    spread = _Z * _Z / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def cases(n: Any) -> int:
    """Return what a probe's value counts over, all together.

    Args:
        n: One number, a list by task, or a mapping by name, in which ``value`` is what the value is over.
    """
    return (
        n.get("value", sum(n.values())) if isinstance(n, Mapping) else sum(n) if isinstance(n, list | tuple) else int(n)
    )


def probe_names(results: Results) -> list[str]:
    """Return the names of the probes that have one value for a model, in the order in which they were added."""
    found = [name for model in results.models for name, one in results.model(model).probes.items() if "value" in one]
    return [name for name in dict.fromkeys(found) if name != ROUTING]


def probe_text(results: Results) -> str:
    """Return a table with a row for every model and a column for every probe; empty if there are no probes."""
    names = probe_names(results)
    if not names:
        return ""
    rows = [["", *names]]
    rows += [
        [model, *(probe_cell(results.model(model).probes.get(name)) for name in names)] for model in results.models
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shares = any(found.get("share") for model in results.models for found in results.model(model).probes.values())
    note = ["shares are in percent, with a 95 % Wilson interval over all their cases"] if shares else []
    return "\n".join(["probes, means over the tasks learned so far", *lines, *note])


def probe_cell(found: Mapping[str, Any] | None) -> str:
    """Return what a probe found about a model in a few characters: a share in percent with its interval, or a number.

    Args:
        found: The entry of ``results.json``; None if the probe was not measured of the model.
    """
    value = None if found is None else found.get("value")
    if found is None or value is None or math.isnan(value):
        return "-"
    if not found.get("share"):
        return f"{value:.4g}"
    number = cases(found["n"])
    low, high = wilson(value, number) if number else (math.nan, math.nan)
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
