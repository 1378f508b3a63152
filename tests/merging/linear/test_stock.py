import math

import pytest
import torch
from support.references import Case, model_stock

from clmerge.merging import ModelStock
from clmerge.merging.linear.stock import stock_ratio

CASES = {"ModelStock": Case(ModelStock, model_stock(1.0))}


def merged(*values):
    merger = ModelStock()
    for value in values:
        merger.update({"w": torch.tensor(value)})
    return merger.compute()["w"]


def test_two_vectors_follow_the_papers_formula():
    cosine = math.cos(1.0)
    tau = merged([2.0, 0.0], [3 * math.cos(1.0), 3 * math.sin(1.0)])
    mean = torch.tensor([1 + 1.5 * math.cos(1.0), 1.5 * math.sin(1.0)])
    torch.testing.assert_close(tau, 2 * cosine / (1 + cosine) * mean)


def test_equal_vectors_are_averaged_and_orthogonal_ones_vanish():
    torch.testing.assert_close(merged([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(merged([1.0, 0.0], [0.0, 1.0]), torch.zeros(2), atol=1e-6, rtol=0)


def test_opposite_vectors_do_not_reach_the_pole_of_the_formula():
    assert torch.equal(merged([1.0, 0.0], [-0.9, 0.1]), torch.zeros(2))
    assert stock_ratio(0.0, count=20) == 0.0


def test_a_frozen_tensor_does_not_take_part():
    torch.testing.assert_close(merged([1.0, 0.0], [0.0, 0.0], [0.6, 0.8]), merged([1.0, 0.0], [0.6, 0.8]))
    assert torch.equal(merged([1.0, 2.0], [0.0, 0.0]), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_norms_do_not_overflow(factor):
    small = merged([3.0 * factor, 4.0 * factor], [4.0 * factor, 3.0 * factor])
    torch.testing.assert_close(small / factor, merged([3.0, 4.0], [4.0, 3.0]))
