import numpy as np
import pytest
import torch
from support.references import Case, norm

from clmerge.merging import OPCM, TaskArithmetic


def projected(merged, tau, alpha, zero_diagonal):
    u, s, vh = np.linalg.svd(merged, full_matrices=True)
    coordinates = u.T @ tau @ vh.T
    rank = int(np.argmax(np.cumsum(s) / s.sum() > alpha)) if alpha < 1 else 0
    coordinates[:rank, :rank] = 0
    if zero_diagonal:
        np.fill_diagonal(coordinates[: len(s), : len(s)], 0)
    return u @ coordinates @ vh


def opcm(alpha, zero_diagonal, scale):
    def batch(vectors, tasks):
        merged, shrinkage, norms = vectors[0], 1.0, [norm(vectors[0])]
        for vector in vectors[1:]:
            norms.append(norm(vector))
            grown = {}
            for name, tau in vector.items():
                added = tau
                if tau.ndim == 2 and tau.size:
                    added = projected(merged[name], tau, alpha, zero_diagonal)
                grown[name] = shrinkage * merged[name] + added
            shrinkage = norm(grown) / np.mean(norms)
            merged = {name: entries / shrinkage for name, entries in grown.items()}
        return {name: scale * entries for name, entries in merged.items()}

    return batch


CASES = {
    "OPCM": Case(OPCM, opcm(0.5, True, 1.0), generic=True, condition=100),
    "OPCM released": Case(
        lambda: OPCM(0.8, zero_diagonal="released", scale=2.0),
        opcm(0.8, False, 2.0),
        generic=True,
        condition=100,
    ),
    "OPCM all": Case(lambda: OPCM(1.0), opcm(1.0, True, 1.0), generic=True, condition=100),
}


def vectors(num_tasks=4, dtype=torch.float64, **shapes):
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or {"w": (6, 8), "b": (8,)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
        for _ in range(num_tasks)
    ]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()


def length(vector):
    return torch.cat([tensor.flatten() for tensor in vector.values()]).norm()


def added(merger, taus):
    """What the last task adds to a matrix, and the merged matrix before."""
    before = merged(merger, taus[:-1])["w"]
    total = merger.state_dict()["slots"]["w"]["sum"]
    merger.update(taus[-1])
    return before, merger.state_dict()["slots"]["w"]["sum"] - total


def test_what_is_added_is_orthogonal_to_the_merged_matrix():
    before, new = added(OPCM(), vectors())
    assert abs((before * new).sum()) < 1e-12
    assert new.norm() > 1


def test_the_released_code_keeps_the_diagonal_outside_the_block():
    before, new = added(OPCM(zero_diagonal="released"), vectors())
    assert abs((before * new).sum()) > 1e-3


def test_the_leading_directions_are_protected():
    before, new = added(OPCM(alpha=0.6), vectors())
    u, s, vh = torch.linalg.svd(before, full_matrices=False)
    rank = int((s.cumsum(0) <= 0.6 * s.sum()).sum())
    assert rank > 1
    torch.testing.assert_close((u.t() @ new @ vh.t())[:rank, :rank], torch.zeros(rank, rank, dtype=torch.float64))


def test_length_is_the_mean_length_of_the_task_vectors_at_every_step():
    merger, lengths = OPCM(), []
    for tau in vectors():
        merger.update(tau)
        lengths.append(length(tau))
        torch.testing.assert_close(length(merger.compute()), torch.stack(lengths).mean())


def test_without_matrices_or_protection_it_is_a_sum_of_constant_length():
    taus = vectors()
    total = merged(TaskArithmetic(scale=1.0), taus)
    for merger in (OPCM(alpha=1.0, zero_diagonal="released"), OPCM(exclude=["w"])):
        tau = merged(merger, taus)
        torch.testing.assert_close(tau["w"] / length(tau), total["w"] / length(total))


def test_first_task_is_kept_as_it_is():
    (tau,) = vectors(1)
    torch.testing.assert_close(merged(OPCM(), [tau]), tau)


def test_a_task_after_a_frozen_one_is_added_whole():
    (tau,) = vectors(1)
    zero = {name: torch.zeros_like(tensor) for name, tensor in tau.items()}
    torch.testing.assert_close(merged(OPCM(), [zero, tau])["w"], tau["w"] / 2)


@pytest.mark.parametrize("name", ["attn.in_proj_weight", "attn.qkv.weight"])
def test_a_fused_weight_can_be_merged_as_three(name):
    taus = vectors(**{name: (12, 4)})
    split = merged(OPCM(split_qkv=True), taus)[name]
    parts = [{f"{i}": tau[name][4 * i : 4 * i + 4] for i in range(3)} for tau in taus]
    torch.testing.assert_close(split, torch.cat(list(merged(OPCM(), parts).values())))
    assert not torch.allclose(split, merged(OPCM(), taus)[name], atol=0.1)


@pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"alpha": -0.1}, {"zero_diagonal": "no"}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OPCM(**wrong)
