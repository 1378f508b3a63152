import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from clmerge.evaluation.diagnostics.spectra import effective_rank, spectrum, subspace_overlap


def random_matrix(rows, columns, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return random_matrix(rows, rank, seed=seed) @ random_matrix(rank, columns, seed=seed + 1)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)])
def test_spectrum_agrees_with_the_full_decomposition(shape):
    matrix = random_matrix(*shape)
    left, values, right = spectrum(matrix, rank=3)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = min(3, *shape)
    torch.testing.assert_close(values, s, rtol=1e-9, atol=1e-9)
    # Singular vectors are unique but for their signs.
    torch.testing.assert_close((left.T @ u[:, :count]).abs(), torch.eye(count).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close((right.T @ vh[:count].T).abs(), torch.eye(count).double(), rtol=0, atol=1e-9)


def test_directions_that_are_rounding_errors_are_left_out():
    left, values, right = spectrum(random_matrix(20, 30, rank=2).float(), rank=8)
    assert (left.shape, values.shape, right.shape) == ((20, 2), (2,), (30, 2))
    left, values, right = spectrum(torch.zeros(3, 4), rank=2)
    assert (left.shape, values.shape, right.shape) == ((3, 0), (0,), (4, 0))


@pytest.mark.parametrize("num", [1, 3, 7])
def test_effective_rank_of_equal_singular_values_counts_them(num):
    assert effective_rank(torch.full((num,), 0.3)) == pytest.approx(num)
    assert effective_rank(torch.cat([torch.full((num,), 5.0), torch.zeros(4)])) == pytest.approx(num)


def test_effective_rank_by_hand():
    # p = (3/4, 1/4)
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(expected)
    assert effective_rank(torch.tensor([30.0, 10.0])) == pytest.approx(expected)
    assert math.isnan(effective_rank(torch.zeros(3)))
    assert math.isnan(effective_rank(torch.zeros(0)))


def test_the_overlap_of_planes_that_share_a_line():
    angle = 0.3
    first = torch.eye(4, dtype=torch.float64)[:, :2]
    second = torch.tensor([[1, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]], dtype=torch.float64).T
    assert subspace_overlap(first, second) == pytest.approx((1 + math.cos(angle) ** 2) / 2)


def test_overlap_is_the_mean_squared_cosine_and_needs_no_particular_basis():
    bases = [torch.linalg.qr(random_matrix(12, k, seed=k)).Q for k in (3, 5)]
    expected = np.square(np.cos(subspace_angles(*(basis.numpy() for basis in bases)))).mean()
    assert subspace_overlap(*bases) == pytest.approx(float(expected))
    turned = bases[0] @ torch.linalg.qr(random_matrix(3, 3)).Q
    assert subspace_overlap(turned, bases[1]) == pytest.approx(float(expected))
    assert subspace_overlap(bases[1], bases[0]) == pytest.approx(float(expected))


def test_overlap_of_a_space_with_itself_inside_another_and_with_nothing():
    basis = torch.linalg.qr(random_matrix(6, 4)).Q
    assert subspace_overlap(basis, basis) == pytest.approx(1.0)
    assert subspace_overlap(basis[:, :2], basis) == pytest.approx(1.0)
    assert subspace_overlap(basis[:, :2], basis[:, 2:]) == pytest.approx(0.0)
    assert math.isnan(subspace_overlap(basis, basis[:, :0]))


def test_overlap_by_chance_is_the_share_of_the_dimensions():
    overlaps = [
        subspace_overlap(*(torch.linalg.qr(random_matrix(40, k, seed=100 * seed + k)).Q for k in (4, 8)))
        for seed in range(60)
    ]
    assert sum(overlaps) / len(overlaps) == pytest.approx(8 / 40, abs=0.02)
