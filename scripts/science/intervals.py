"""Means, paired intervals and rank correlations, for few numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval, of 95 % where nothing else is said.

    Attributes:
        mean: The mean.
        low: Lower end; minus infinity for a single number.
        high: Upper end.
        count: How many numbers it is of.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 for an interval on one side of zero, 0 for one that holds zero."""
        return int(self.low > 0) - int(self.high < 0)


def points(one: Interval) -> str:
    """Write a difference of shares in points, with its interval."""
    if math.isinf(one.low):
        return f"{100 * one.mean:+.1f} (too few seeds)"
    return f"{100 * one.mean:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def interval_of(values: Sequence[float]) -> Interval:
    """Return the mean of independent numbers with the interval of Student's t distribution."""
    return mean_of_groups([values])


def mean_of_groups(groups: Sequence[Sequence[float]], *, level: float = 0.95) -> Interval:
    """Return the mean of the groups' means, each group counting the same, with an interval.

    The variance of the mean is that of the groups' means, added up and divided by the square of their number, with the
    degrees of freedom of Welch and Satterthwaite; a group of one number leaves it unknown. For one group that is
    Student's interval.

    Args:
        groups: Independent numbers, group by group.
        level: Of the interval.
    """
    mean = statistics.mean(statistics.mean(group) for group in groups)
    count = sum(len(group) for group in groups)
    if any(len(group) < 2 for group in groups):
        return Interval(mean, -math.inf, math.inf, count)
    variances = [statistics.variance(group) / len(group) for group in groups]
    if not sum(variances):
        return Interval(mean, mean, mean, count)
    freedom = sum(variances) ** 2 / sum(v**2 / (len(group) - 1) for v, group in zip(variances, groups, strict=True))
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(sum(variances)) / len(groups)
    return Interval(mean, mean - half, mean + half, count)


def rank_correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence[str], clusters: Sequence[str], *, draws: int = 2000
) -> Interval:
    """Return Spearman's correlation inside of groups, with a bootstrap interval over clusters.

    Ranks are taken inside of every group, as shares of its size, and centred there, so that what differs between groups
    alone counts nothing. Clusters, such as the seeds of one setting, are drawn as a whole, with replacement; the ends
    are the 2.5th and the 97.5th percentile.

    Args:
        x: One number per run.
        y: Another.
        groups: Name of the group of each run.
        clusters: Name of the cluster of each run.
        draws: How many resamples.
    """
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    cluster = np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(cluster.max()) + 1
    drawn = np.random.default_rng(0).integers(count, size=(draws, count))
    times = np.stack([np.bincount(one, minlength=count) for one in drawn])[:, cluster].astype(np.float64)
    times = np.vstack([np.ones(len(x)), times])  # how often each run was drawn; first all runs, once
    mean, *found = _correlations(np.asarray(x), np.asarray(y), group, times)
    known = [one for one in found if not math.isnan(one)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (-math.inf, math.inf)
    return Interval(float(mean), float(low), float(high), len(x))


def _correlations(x: np.ndarray, y: np.ndarray, group: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return one correlation per row of ``times``; not a number where ranks do not differ."""
    same = group[:, None] == group[None, :]
    sizes = times @ same
    sizes[sizes == 0] = 1  # a group that was not drawn counts nothing
    ranks = []
    for values in (x, y):
        # Of every run: how many in its group are less, and half of those that are equal.
        less = (values[:, None] > values[None, :]) + 0.5 * (values[:, None] == values[None, :])
        shares = times @ (same * less).T / sizes
        ranks.append(shares - (times * shares) @ same / sizes)
    products = [(times * a * b).sum(axis=1) for a, b in ((ranks[0], ranks[1]), (ranks[0],) * 2, (ranks[1],) * 2)]
    spread = np.sqrt(products[1] * products[2])
    return np.where(spread > 1e-9, products[0] / np.maximum(spread, 1e-9), math.nan)
