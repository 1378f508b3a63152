import math

import pytest
import torch

from clmerge.evaluation.diagnostics import pairs
from clmerge.evaluation.diagnostics.pairs import pair_sums


def brute_force(taus):
    """Entry by entry in Python."""
    lists = [tau.double().reshape(-1).tolist() for tau in taus]
    product = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in lists] for x in lists]
    opposed = [[sum(a * b < 0 for a, b in zip(x, y, strict=True)) for y in lists] for x in lists]
    shared = [[sum(a != 0 and b != 0 for a, b in zip(x, y, strict=True)) for y in lists] for x in lists]
    return product, opposed, shared


@pytest.fixture
def taus():
    generator = torch.Generator().manual_seed(0)
    taus = [torch.randn(7, 5, generator=generator) for _ in range(4)]
    for tau in taus:
        tau[torch.rand(7, 5, generator=generator) < 0.3] = 0.0
    return taus


@pytest.mark.parametrize("entries", [1, 12, 1 << 20])
def test_sums_are_those_of_the_definition_whatever_the_blocks(taus, entries, monkeypatch):
    monkeypatch.setattr(pairs, "_ENTRIES", entries)
    sums = pair_sums(taus)
    product, opposed, shared = brute_force(taus)
    torch.testing.assert_close(sums.products, torch.tensor(product, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    assert sums.opposed.tolist() == opposed
    assert sums.shared.tolist() == shared
    assert sums.numel == 35
    assert sums.cosines().diagonal().tolist() == [1.0] * 4


def test_parts_add_up_to_the_whole(taus):
    parts = pair_sums([tau[:3] for tau in taus]) + pair_sums([tau[3:] for tau in taus])
    whole = pair_sums(taus)
    torch.testing.assert_close(parts.cosines(), whole.cosines(), rtol=1e-13, atol=1e-15)
    assert torch.equal(parts.sign_conflicts(), whole.sign_conflicts())
    assert parts.numel == whole.numel


def test_by_hand():
    sums = pair_sums([torch.tensor([3.0, 4.0, 0.0]), torch.tensor([-4.0, 3.0, 0.0]), torch.tensor([6.0, 8.0, 5.0])])
    assert sums.norms().tolist() == [5.0, 5.0, pytest.approx(math.sqrt(125))]
    assert sums.cosines()[0].tolist() == [1.0, 0.0, pytest.approx(50 / (5 * math.sqrt(125)))]
    assert sums.sign_conflicts()[0].tolist() == [0.0, 0.5, 0.0]
    assert sums.sign_conflicts()[1, 2] == 0.5


def test_values_beyond_float32_do_not_overflow():
    sums = pair_sums([torch.tensor([1e30]), torch.tensor([-1e30])])
    assert sums.cosines().tolist() == [[1.0, -1.0], [-1.0, 1.0]]


def test_a_vector_of_zeros_has_no_angle():
    sums = pair_sums([torch.zeros(2), torch.ones(2)])
    assert sums.norms()[0] == 0
    assert sums.cosines().isnan().tolist() == [[True, True], [True, False]]
    assert sums.sign_conflicts().isnan().tolist() == [[True, True], [True, False]]
