"""Merge the same experts in other orders."""

import random
import statistics
from collections.abc import Mapping
from typing import Any

from clmerge.merging import Merger
from clmerge.results.results import SETTINGS
from clmerge.runs.comparison.refold import sweep
from clmerge.runs.comparison.row_cache import RowCache
from clmerge.runs.stored_run import StoredRun
from clmerge.search.search import mean_accuracy


def permutations(num_tasks: int, num_orders: int, seed: int) -> list[list[int]]:
    """Return the run's own order and others drawn by seed, all different as long as there are enough.

    Args:
        num_tasks: Number of tasks T.
        num_orders: Number of orders; fewer are returned if T! is smaller.
        seed: Seed.

    Example:
        >>> permutations(3, 2, seed=0)[0]
        [0, 1, 2]
        >>> len(permutations(2, 10, seed=0))
        2
    """
    generator = random.Random(seed)
    wanted = min(num_orders, _factorial(num_tasks, num_orders))
    found = [list(range(num_tasks))]
    while len(found) < wanted:
        order = generator.sample(range(num_tasks), num_tasks)
        if order not in found:
            found.append(order)
    return found


def _factorial(n: int, enough: int) -> int:
    product = 1
    for factor in range(2, n + 1):
        product *= factor
        if product >= enough:
            break
    return product


def order_sweep(
    run: StoredRun, mergers: Mapping[str, Merger], num_orders: int, cache: RowCache, *, seed: int, memory: int
) -> dict[str, Any]:
    """Return the accuracies of the final merged models over several orders of the experts.

    A rule that does not depend on the order is not merged again: its sums differ in rounding only.

    Args:
        run: The run.
        mergers: Mergers by name.
        num_orders: Number of orders, the run's own included.
        cache: Stores the rows.
        seed: Seed of the orders.
        memory: Bytes of accumulators and weights that are held at a time.

    Returns:
        Merger -> its part of the document.
    """
    num_tasks = len(run.kept)
    orders = [[run.kept[i] for i in order] for order in permutations(num_tasks, num_orders, seed)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in mergers}
    for number, order in enumerate(orders):
        chosen = {name: merger for name, merger in mergers.items() if not number or not merger.order_free}
        what = f"models, order {number + 1} of {len(orders)}"
        table = sweep(run, chosen, cache, order=order, last_only=True, memory=memory, what=what)
        for name, rows in table.items():
            found[name].append(dict(rows[num_tasks]))
    return {
        name: {
            "order_free": mergers[name].order_free,
            "permutations": orders[: len(rows)],
            **{setting: _spread([run.counted(row[setting]) for row in rows]) for setting in SETTINGS},
        }
        for name, rows in found.items()
    }


def _spread(accuracies: list[list[float]]) -> dict[str, Any]:
    averages = [mean_accuracy(row) for row in accuracies]
    std = statistics.stdev(averages) if len(averages) > 1 else 0.0
    return {"accuracy": accuracies, "average_accuracy": averages, "mean": statistics.fmean(averages), "std": std}
