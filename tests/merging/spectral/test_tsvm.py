import numpy as np
import pytest
import torch
from support.matrix_references import by_kind, mean, polar, svd
from support.references import Case

from clmerge.merging import TSVM


def tsvm(scale):
    def rule(taus):
        share = min(taus.shape[1:]) // len(taus)
        triplets = [svd(tau) for tau in taus]
        u = np.hstack([u[:, :share] for u, _, _ in triplets])
        s = np.concatenate([s[:share] for _, s, _ in triplets])
        vh = np.vstack([vh[:share] for _, _, vh in triplets])
        return scale * polar(u) @ np.diag(s) @ polar(vh)

    return by_kind(rule, mean(scale))


CASES = {
    "TSVM": Case(TSVM, tsvm(1.0), generic=True, condition=100),
    "TSVM scale": Case(lambda: TSVM(scale=0.5), tsvm(0.5), generic=True, condition=100),
}


def vectors(*shape, num_tasks=3, name="w"):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator)} for _ in range(num_tasks)]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (1, 1), (1, 6)])
def test_one_task_is_kept_as_it_is(shape):
    (tau,) = vectors(*shape, num_tasks=1)
    torch.testing.assert_close(merged(TSVM(), [tau])["w"], tau["w"])


def test_a_tall_matrix_is_merged_like_its_transpose():
    taus = vectors(9, 4)
    transposed = [{"w": tau["w"].t().contiguous()} for tau in taus]
    torch.testing.assert_close(merged(TSVM(), taus)["w"], merged(TSVM(), transposed)["w"].t())


def test_tasks_in_orthogonal_subspaces_do_not_disturb_each_other():
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    taus = [
        {"w": basis[:, cut] @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ basis[:, cut].t()}
        for cut in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(merged(TSVM(), taus)["w"], taus[0]["w"] + taus[1]["w"], rtol=0, atol=1e-5)


def test_every_task_has_an_equal_share_of_the_rank():
    assert torch.linalg.matrix_rank(merged(TSVM(), vectors(8, 10, num_tasks=3))["w"]) == 6
    assert not merged(TSVM(), vectors(2, 5, num_tasks=3))["w"].any()


def test_a_task_merged_twice_adds_nothing_arbitrary():
    (tau,) = vectors(6, 6, num_tasks=1)
    twice = merged(TSVM(), [tau, tau])["w"]
    u, s, vh = torch.linalg.svd(tau["w"])
    torch.testing.assert_close(twice, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], rtol=0, atol=1e-5)


def test_a_fused_weight_can_be_merged_as_three():
    taus = vectors(12, 4, name="attn.qkv.weight")
    split = merged(TSVM(split_qkv=True), taus)["attn.qkv.weight"]
    parts = [merged(TSVM(), [{"w": tau["attn.qkv.weight"][4 * i : 4 * i + 4]} for tau in taus])["w"] for i in range(3)]
    assert torch.equal(split, torch.cat(parts))
    assert not torch.allclose(split, merged(TSVM(), taus)["attn.qkv.weight"], atol=0.1)
