import itertools

import pytest
import torch

from clmerge.merging import DARE, OPCM, MagMax, WeightAverage, joined


def workers(rule, tasks):
    found = []
    for task in tasks:
        worker = rule()
        worker.update(vector(task), task=task, base="b")
        found.append(worker)
    return found


def vector(task):
    return {"w": torch.randn(5, 7, generator=torch.Generator().manual_seed(task))}


@pytest.mark.parametrize("rule", [WeightAverage, MagMax, lambda: DARE(0.5)])
def test_the_order_of_arrival_does_not_change_a_bit(rule):
    whole = rule()
    for task in range(5):
        whole.update(vector(task), task=task, base="b")
    expected = joined(workers(rule, range(5)))
    assert expected.tasks == whole.tasks
    torch.testing.assert_close(expected.compute(), whole.compute())
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        assert joined(workers(rule, order)).compute()["w"].equal(expected.compute()["w"])


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="expected accumulators that hold tasks"):
        joined([])
    with pytest.raises(ValueError, match="expected accumulators that hold tasks"):
        joined([WeightAverage()])
    with pytest.raises(RuntimeError, match="order"):
        joined(workers(OPCM, range(2)))
