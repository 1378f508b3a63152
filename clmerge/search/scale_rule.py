"""A scale that changes as tasks are added, by a rule fitted to earlier tasks only."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clmerge.merging import Merger
from clmerge.search.grid import with_values


def fit_rule(chosen: Sequence[float]) -> tuple[float, float]:
    """Fit ``scale = a * t^b`` to the best scales after tasks 1..t, by least squares in the logarithms.

    Args:
        chosen: The best scales, all positive; with one of them b is 0.

    Returns:
        ``a`` and ``b``.

    Example:
        >>> a, b = fit_rule([1.0, 0.5, 1 / 3])
        >>> round(a, 6), round(b, 6)
        (1.0, -1.0)
    """
    if len(chosen) == 1:
        return chosen[0], 0.0
    b, log_a = np.polyfit(np.log(np.arange(1, len(chosen) + 1)), np.log(chosen), 1)
    return math.exp(log_a), float(b)


class ScaleRule:
    """A merger whose scale after task t is predicted from the best scales after earlier tasks.

    After task t the scale is ``a * t^b``, fitted to the scales that were best on the validation images after tasks
    1..t-1, and kept within the values tried. After the first task there are none: the merger's own scale is used.

    Args:
        merger: The merger; its scale is that of the first task.
        scales: Scales that are tried, all positive.
        best: The best scale after every task.

    Attributes:
        used: The scale after every task; None if the merger's default depends on its parts.

    Example:
        >>> from clmerge.merging import TaskArithmetic
        >>> rule = ScaleRule(TaskArithmetic(scale=1.0), [0.1, 0.4, 0.8], [0.8, 0.4, 0.4])
        >>> [round(scale, 3) for scale in rule.used]
        [1.0, 0.8, 0.267]
    """

    def __init__(self, merger: Merger, scales: Sequence[float], best: Sequence[float]) -> None:
        self.merger = merger
        self.best = list(best)
        self.used: list[float | None] = [vars(merger)["scale"]]
        for t in range(2, len(best) + 1):
            a, b = fit_rule(self.best[: t - 1])
            self.used.append(min(max(a * t**b, min(scales)), max(scales)))

    def at(self, t: int) -> Merger:
        """Return the merger with the scale after task t, from 1."""
        return with_values(self.merger, {"scale": self.used[t - 1]})

    def to_dict(self) -> dict[str, Any]:
        """Return the rule in the form of the document; ``a`` and ``b`` are fitted to all tasks."""
        a, b = fit_rule(self.best)
        return {"chosen": self.best, "used": self.used, "a": a, "b": b}
