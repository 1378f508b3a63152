import numpy as np
import pytest
import torch
from support.matrix_references import by_kind, mean, polar, svd
from support.references import Case

from clmerge.merging import TSVM, DCMerge


def smoothed(s, ratio):
    if ratio is None:
        return s
    line = np.linspace(min(ratio, s[0] / s[-1]), 1, len(s))
    return s.sum() * line / line.sum()


def dc(density, smoothing, scale):
    def rule(taus):
        rank = min(taus.shape[1:])
        share = rank // len(taus)
        triplets = [svd(tau) for tau in taus]
        if not share:
            return np.zeros(taus.shape[1:])
        triplets = [(u[:, :share], smoothed(s[:share], smoothing), vh[:share]) for u, s, vh in triplets]
        cover_u = polar(np.hstack([u for u, _, _ in triplets]))
        cover_v = polar(np.vstack([vh for _, _, vh in triplets]))
        found = []
        for u, s, vh in triplets:
            coordinates = cover_u.T @ u @ np.diag(s) @ vh @ cover_v.T
            count = min(max(share, int(density * rank**2)), coordinates.size)
            threshold = np.sort(np.abs(coordinates).ravel())[-count]
            found.append(np.where(np.abs(coordinates) >= 0.99999 * threshold, coordinates, 0))
        sign = np.sign(sum(found))
        agree = np.sign(found) == sign
        elected = np.where(sign == 0, 0, (found * agree).sum(0) / np.maximum(agree.sum(0), 1))
        owner = np.repeat(np.arange(len(taus)), [len(s) for _, s, _ in triplets])
        return scale * cover_u @ (elected * (owner[:, None] == owner)) @ cover_v

    return by_kind(rule, mean(scale))


CASES = {
    "DCMerge": Case(DCMerge, dc(1e-3, None, 1.0), generic=True, condition=100),
    "DCMerge dense": Case(
        lambda: DCMerge(0.6, smoothing=1.0, scale=0.5), dc(0.6, 1.0, 0.5), generic=True, condition=100
    ),
    "DCMerge line": Case(lambda: DCMerge(0.3, smoothing=5.0), dc(0.3, 5.0, 1.0), generic=True, condition=100),
}

GENERATOR = torch.Generator().manual_seed(0)


def vectors(count, *shape):
    return [{"w": torch.randn(shape, generator=GENERATOR, dtype=torch.float64)} for _ in range(count)]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()["w"]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_one_task_is_kept_as_it_is(shape):
    (tau,) = vectors(1, *shape)
    torch.testing.assert_close(merged(DCMerge(), [tau]), tau["w"])


def test_smoothing_keeps_the_sum_of_the_singular_values():
    (tau,) = vectors(1, 6, 9)
    before, flat, line = (
        torch.linalg.svdvals(m)
        for m in (tau["w"], merged(DCMerge(smoothing=1.0), [tau]), merged(DCMerge(smoothing=2.0), [tau]))
    )
    torch.testing.assert_close(flat, torch.full((6,), float(before.mean()), dtype=torch.float64))
    torch.testing.assert_close(line.sum(), before.sum())
    torch.testing.assert_close(line[0] / line[-1], torch.tensor(2.0, dtype=torch.float64))


def test_tasks_in_orthogonal_subspaces_are_merged_as_tsvm_merges_them():
    basis = torch.linalg.qr(torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64)).Q
    taus = [
        {"w": basis[:, cut] @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ basis[:, cut].t()}
        for cut in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(merged(DCMerge(), taus), merged(TSVM(), taus))
    torch.testing.assert_close(merged(DCMerge(), taus), taus[0]["w"] + taus[1]["w"])


def test_what_lies_between_the_directions_of_two_tasks_is_dropped():
    taus = vectors(2, 8, 8)
    blocks = merged(DCMerge(1.0), taus)
    triplets = [svd(tau["w"].numpy()) for tau in taus]
    cover = polar(np.hstack([u[:, :4] for u, _, _ in triplets])), polar(np.vstack([v[:4] for _, _, v in triplets]))
    coordinates = cover[0].T @ blocks.numpy() @ cover[1].T
    np.testing.assert_allclose(coordinates[:4, 4:], 0, atol=1e-12)
    assert np.abs(coordinates[:4, :4]).max() > 0.1


@pytest.mark.parametrize("wrong", [{"density": 2.0}, {"smoothing": 0.5}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DCMerge(**wrong)
