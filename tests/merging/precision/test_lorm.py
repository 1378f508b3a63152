import numpy as np
import pytest
import torch
from support.matrix_references import matrices_or_mean, regmean
from support.references import Case, shapes_of, statistics_of

from clmerge.merging import LoRM, RegMean


def lorm(rank, reduce, ridge, scale):
    """The least squares of a rank, by a singular value decomposition of the outputs."""

    def batch(vectors, tasks):
        whole = regmean(reduce, ridge, scale)(vectors, tasks)

        def solve(name, taus, tasks):
            grams = [statistics_of(task, shapes_of(vectors))["gram"][name].numpy() for task in tasks]
            total = sum(np.where(np.eye(len(gram)) > 0, gram, reduce * gram) for gram in grams)
            total = total + ridge * np.trace(total) / len(total) * np.eye(len(total))
            root = np.linalg.cholesky(total)
            u, s, vh = np.linalg.svd(whole[name] @ root, full_matrices=False)
            return (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root)

        low = matrices_or_mean(solve)(vectors, tasks)
        return {name: low[name] if whole[name].ndim == 2 and whole[name].size else whole[name] for name in whole}

    return batch


CASES = {
    "LoRM": Case(LoRM, regmean(0.5, 1e-8, 1.0)),
    "LoRM rank": Case(
        lambda: LoRM(2, reduce=0.8, ridge=0.01, scale=0.5), lorm(2, 0.8, 0.01, 0.5), generic=True, condition=100
    ),
}

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def adapters(count=3, rank=2, outputs=6, inputs=5):
    """The factors of every task, and a Gram matrix of its inputs."""
    found = []
    for _ in range(count):
        x = randn(40, inputs)
        found.append((randn(outputs, rank), randn(rank, inputs), x.t() @ x))
    return found


def merged(merger, tasks, name="w"):
    for b, a, gram in tasks:
        merger.update({name: b @ a}, statistics={"gram": {name: gram}})
    return merger.compute()[name]


def test_across_tasks_it_is_regmean_of_the_products():
    tasks = adapters()
    torch.testing.assert_close(merged(LoRM(reduce=1.0), tasks), merged(RegMean(1.0), tasks))


def test_neither_step_of_the_papers_alternation_moves_the_merged_factors():
    tasks = adapters()
    low = merged(LoRM(2, reduce=1.0, ridge=1e-14), tasks)
    assert torch.linalg.matrix_rank(low) == 2
    u, s, vh = torch.linalg.svd(low, full_matrices=False)
    b, a = u[:, :2] * s[:2], vh[:2]
    total, moment = sum(gram for *_, gram in tasks), sum(b_t @ a_t @ gram for b_t, a_t, gram in tasks)
    torch.testing.assert_close(moment @ a.t() @ torch.linalg.inv(a @ total @ a.t()), b)
    torch.testing.assert_close(torch.linalg.solve(b.t() @ b, b.t()) @ moment @ torch.linalg.inv(total), a)


def test_no_other_matrix_of_the_rank_is_nearer_to_the_experts():
    tasks = adapters()

    def loss(matrix):
        return sum(float((d @ gram @ d.t()).trace()) for b, a, gram in tasks for d in [matrix - b @ a])

    low = merged(LoRM(2, reduce=1.0, ridge=1e-14), tasks)
    u, s, vh = torch.linalg.svd(low, full_matrices=False)
    for _ in range(20):
        other = (u[:, :2] * s[:2] + 1e-2 * randn(6, 2)) @ (vh[:2] + 1e-2 * randn(2, 5))
        assert loss(other) > loss(low)


def test_a_packed_projection_has_the_rank_three_times():
    tasks = adapters(rank=6, outputs=15)
    low = merged(LoRM(1, reduce=1.0), tasks, "attn.in_proj_weight")
    assert [int(torch.linalg.matrix_rank(part)) for part in low.chunk(3)] == [1, 1, 1]
    assert torch.linalg.matrix_rank(low) == 3


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank of 1 or more"):
        LoRM(0)
