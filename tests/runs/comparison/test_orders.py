from types import SimpleNamespace

import pytest

from clmerge.merging import OPCM, MagMax
from clmerge.runs.comparison import orders
from clmerge.runs.comparison.orders import order_sweep, permutations


def test_orders_begin_with_the_runs_own_and_are_different():
    found = permutations(4, 10, seed=3)
    assert found[0] == [0, 1, 2, 3]
    assert len({tuple(order) for order in found}) == 10
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)
    assert found == permutations(4, 10, seed=3)
    assert found != permutations(4, 10, seed=4)
    assert len(permutations(3, 100, seed=0)) == 6


def test_rules_that_do_not_depend_on_the_order_are_merged_once(monkeypatch):
    merged = []

    def sweep(run, mergers, ledger, *, order, last_only, memory, what):
        merged.append(list(mergers))
        row = {"task_agnostic": [order[0] / 4, 0.5], "task_aware": [1.0, 1.0], "merge_seconds": 0.1}
        return {name: {2: row} for name in mergers}

    monkeypatch.setattr(orders, "sweep", sweep)
    run = SimpleNamespace(kept=[0, 1], counted=list, name="run")
    found = order_sweep(run, {"magmax": MagMax(), "opcm": OPCM()}, 2, None, seed=0, memory=0)
    assert merged == [["magmax", "opcm"], ["opcm"]]
    assert found["magmax"]["task_agnostic"]["std"] == 0
    agnostic = found["opcm"]["task_agnostic"]
    assert agnostic["average_accuracy"] == [0.25, 0.375]
    assert agnostic["mean"] == 0.3125
    assert agnostic["std"] == pytest.approx(0.125 / 2**0.5)
    assert found["opcm"]["permutations"] == [[0, 1], [1, 0]]
