"""Seeded, stratified cuts of labelled data, without touching any global random state."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that is a pure function of the given parts.

    The parts are hashed instead of added, because neighbouring run seeds must not yield related random numbers.

    Args:
        parts: keys of the random numbers, e.g. ``(seed, "validation", task)``.

    Example:
        >>> derived_seed(0, "validation", 1) == derived_seed(0, "validation", 1)
        True
        >>> derived_seed(0, "validation", 1) == derived_seed(1, "validation", 0)
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_test_fraction(test_fraction: float) -> None:
    """Refuse a share of held-out images that leaves none on one side.

    Raises:
        ValueError: if it is not between 0 and 1.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"expected test_fraction in (0, 1), got {test_fraction}")


def stratified_cut(
    targets: Sequence[int], fraction: float, *, seed: int, max_held: int | None = None
) -> tuple[list[int], list[int]]:
    """Cut positions into a kept and a held-out part, class by class.

    Of the ``n`` samples of a class, ``round(fraction * n)`` are held out: at least one if the class has two or more,
    and never all of them. Both parts are returned in ascending order.

    Args:
        targets: class id of each sample, length ``n``.
        fraction: share of each class to hold out, in ``[0, 1)``; 0 holds out nothing.
        seed: seed of the choice.
        max_held: upper bound of the held-out part's size; the fraction is lowered to meet it (default: no
            bound).

    Returns:
        The kept and the held-out positions, disjoint and together all of ``range(n)``.

    Raises:
        ValueError: if ``fraction`` is outside ``[0, 1)`` or ``max_held`` is negative.

    Example:
        >>> kept, held = stratified_cut([0, 0, 0, 0, 1, 1, 1, 1], 0.25, seed=0)
        >>> len(kept), len(held)
        (6, 2)
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"expected a held-out fraction in [0, 1), got {fraction}")
    if max_held is not None and max_held < 0:
        raise ValueError(f"expected an upper bound of 0 or more held-out samples, got {max_held}")
    if max_held is not None and fraction * len(targets) > max_held:
        fraction = max_held / len(targets)
    if fraction == 0.0:
        return list(range(len(targets))), []
    by_class: dict[int, list[int]] = defaultdict(list)
    for position, target in enumerate(targets):
        by_class[target].append(position)
    held: list[int] = []
    for target in sorted(by_class):
        positions = by_class[target]
        num_held = min(max(round(fraction * len(positions)), 1), len(positions) - 1)
        # random.Random.shuffle is stable across Python versions, and construction is cheap.
        order = positions.copy()
        random.Random(derived_seed(seed, "cut", target)).shuffle(order)
        held += order[:num_held]
    out = set(held)
    return [position for position in range(len(targets)) if position not in out], sorted(held)


def dealt(targets: Sequence[int], num_parts: int, *, seed: int) -> list[list[int]]:
    """Divide positions into parts with equally many samples of every class, up to remainders.

    Args:
        targets: class id of each sample, length ``n``.
        num_parts: number of parts.
        seed: seed of the choice.

    Returns:
        ``num_parts`` lists of positions, ascending, disjoint and together all of ``range(n)``.

    Raises:
        ValueError: if there are fewer samples than parts.

    Example:
        >>> parts = dealt([0, 0, 0, 0, 1, 1], 2, seed=0)
        >>> [len(part) for part in parts], [sum(p > 3 for p in part) for part in parts]
        ([3, 3], [1, 1])
    """
    if len(targets) < num_parts:
        raise ValueError(f"expected at least one sample for each of {num_parts} parts, got {len(targets)}")
    order = list(range(len(targets)))
    random.Random(derived_seed(seed, "deal")).shuffle(order)
    order.sort(key=targets.__getitem__)
    return [sorted(order[part::num_parts]) for part in range(num_parts)]


def dirichlet_parts(targets: Sequence[int], num_parts: int, alpha: float, *, seed: int) -> list[list[int]]:
    """Divide positions into parts of different classes and sizes, as the clients of a federation have them.

    The shares of a class are drawn from a Dirichlet distribution; parts that hold ``n / num_parts`` samples get no
    more, and all is drawn anew until every part has 10 samples, or half of an even share where that is less (as FedMA's
    released code and Flower's partitioner do; arXiv 2002.06440).

    Args:
        targets: class id of each sample, length ``n``.
        num_parts: number of parts.
        alpha: concentration: large for nearly equal parts, 0.5 as usual, 0.1 for parts of one or two classes.
        seed: seed of the draw.

    Returns:
        ``num_parts`` lists of positions, ascending, disjoint and together all of ``range(n)``.

    Raises:
        ValueError: if alpha is not positive, there are fewer samples than two for each part, or no draw of 1,000 fills
            all parts.

    Example:
        >>> parts = dirichlet_parts([0] * 50 + [1] * 50, 2, 0.5, seed=0)
        >>> sorted(position for part in parts for position in part) == list(range(100))
        True
    """
    import numpy as np

    if not alpha > 0:
        raise ValueError(f"expected alpha of a Dirichlet distribution above 0, got {alpha}")
    if len(targets) < 2 * num_parts:
        raise ValueError(f"expected two samples or more for each of {num_parts} parts, got {len(targets)}")
    generator = np.random.default_rng(derived_seed(seed, "dirichlet"))
    least = min(10, len(targets) // (2 * num_parts))
    by_class = [np.flatnonzero(np.asarray(targets) == class_id) for class_id in sorted(set(targets))]
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(num_parts)]
        for positions in by_class:
            shares = generator.dirichlet([alpha] * num_parts)
            room = np.array([len(part) < len(targets) / num_parts for part in parts])
            shares = shares * room
            if not shares.sum() > 0:  # all that were drawn are full, or alpha is so small that they vanish
                shares = room.astype(float)
            ends = np.rint(np.cumsum(shares / shares.sum()) * len(positions)).astype(int)
            shuffled = generator.permutation(positions)
            for part, piece in zip(parts, np.split(shuffled, ends[:-1]), strict=True):
                part += piece.tolist()
        if min(map(len, parts)) >= least:
            return [sorted(part) for part in parts]
    raise ValueError(
        f"expected parts of {least} samples or more, got none in 1,000 draws of {num_parts} parts of {len(targets)} "
        f"samples with alpha {alpha}: choose a larger alpha, or fewer parts"
    )
