import torch
from support.matrix_references import by_kind, mean, svd
from support.references import Case

from clmerge.merging import IsoC


def iso_c(scale):
    def rule(taus):
        total = taus.sum(axis=0)
        u, s, vh = svd(total)
        return scale * s.sum() / min(total.shape) * u @ vh

    return by_kind(rule, mean(scale))


CASES = {
    "IsoC": Case(IsoC, iso_c(1.0), condition=100),
    "IsoC scale": Case(lambda: IsoC(scale=1.5), iso_c(1.5), condition=100),
}


def vectors(*shape, num_tasks=3):
    generator = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(shape, generator=generator)} for _ in range(num_tasks)]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()


def test_spectrum_is_flat_at_the_mean_of_the_sum():
    taus = vectors(4, 7)
    spectrum = torch.linalg.svdvals(merged(IsoC(), taus)["w"])
    mean = torch.linalg.svdvals(sum(tau["w"] for tau in taus)).mean()
    torch.testing.assert_close(spectrum, mean.expand(4))


def test_a_sum_of_low_rank_gains_no_arbitrary_directions():
    left, right = torch.randn(6, 2), torch.randn(2, 5)
    tau = merged(IsoC(), [{"w": left @ right}])["w"]
    spectrum = torch.linalg.svdvals(tau)
    torch.testing.assert_close(spectrum[:2], torch.linalg.svdvals(left @ right).mean().expand(2), rtol=1e-4, atol=0)
    torch.testing.assert_close(tau, left @ torch.linalg.pinv(left) @ tau, rtol=0, atol=1e-5)


def test_orthogonal_matrices_are_left_as_they_are():
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q
    torch.testing.assert_close(merged(IsoC(), [{"w": rotation}])["w"], rotation)


def test_what_is_no_matrix_is_averaged():
    taus = [
        {"w": torch.ones(2, 2), "conv": torch.full((2, 2, 1, 1), value), "b": torch.tensor([value])}
        for value in (1.0, 4.0)
    ]
    tau = merged(IsoC(scale=2.0), taus)
    assert torch.equal(tau["b"], torch.tensor([5.0]))
    assert torch.equal(tau["conv"], torch.full((2, 2, 1, 1), 5.0))


def test_a_fused_weight_can_be_merged_as_three():
    taus = [{"attn.in_proj_weight": tau["w"]} for tau in vectors(12, 4)]
    split = merged(IsoC(split_qkv=True), taus)["attn.in_proj_weight"]
    parts = [{f"{i}": tau["attn.in_proj_weight"][4 * i : 4 * i + 4] for i in range(3)} for tau in taus]
    torch.testing.assert_close(split, torch.cat(list(merged(IsoC(), parts).values())))
    assert not torch.allclose(split, merged(IsoC(), taus)["attn.in_proj_weight"], atol=0.1)
