"""How unlikely a count is by chance."""

import math


def binomial_tail(hits: int, n: int, share: float) -> float:
    """Return the probability of at least so many hits in n independent cases; exact up to rounding.

    Args:
        hits: Number of hits.
        n: Number of cases.
        share: Probability of a hit, 0 to 1.

    Example:
        >>> binomial_tail(2, 2, 0.5), binomial_tail(0, 2, 0.5)
        (0.25, 1.0)
    """
    if hits <= 0:
        return 1.0
    if share in (0.0, 1.0):
        return share
    log_hit, log_miss = math.log(share), math.log1p(-share)
    terms = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_hit + (n - k) * log_miss
        for k in range(hits, n + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def false_positive_rate(hits: list[int], n: int, share: float, level: float) -> float:
    """Return how often counts that can only be chance are called significant.

    Args:
        hits: The counts, each of n cases.
        n: Number of cases.
        share: Probability of a hit by chance.
        level: Largest probability at which a count is significant.
    """
    return sum(binomial_tail(each, n, share) <= level for each in hits) / len(hits)
