import numpy as np
import pytest
import torch
from support.matrix_references import by_kind, mean, polar, svd
from support.references import Case

from clmerge.merging import IsoC, IsoCTS


def iso_cts(common, scale):
    def rule(taus):
        total = taus.sum(axis=0)
        size, num_tasks = min(total.shape), len(taus)
        share = min(round((size - int(size * common)) / num_tasks), size // num_tasks)
        num_common = size - share * num_tasks
        u, s, vh = svd(total)
        basis = u[:, :num_common]
        lefts, values, rights = [basis], [s[:num_common]], [vh[:num_common]]
        for tau in taus:
            u_t, s_t, vh_t = svd(tau - basis @ basis.T @ tau, largest=np.linalg.norm(tau))
            lefts.append(u_t[:, :share])
            values.append(s_t[:share])
            rights.append(vh_t[:share])
        return scale * np.concatenate(values).sum() / size * polar(np.hstack(lefts)) @ polar(np.vstack(rights))

    return by_kind(rule, mean(scale))


CASES = {
    "IsoCTS": Case(IsoCTS, iso_cts(0.8, 1.0), generic=True, condition=100),
    "IsoCTS half": Case(lambda: IsoCTS(0.5, scale=1.5), iso_cts(0.5, 1.5), generic=True, condition=100),
}


def vectors(*shape, num_tasks=3, name="w"):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator)} for _ in range(num_tasks)]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()


def test_spectrum_is_flat():
    spectrum = torch.linalg.svdvals(merged(IsoCTS(common=0.4), vectors(10, 12))["w"])
    torch.testing.assert_close(spectrum, spectrum.mean().expand(10))


def test_all_common_is_iso_c():
    taus = vectors(6, 9)
    torch.testing.assert_close(merged(IsoCTS(common=1.0), taus), merged(IsoC(), taus))


def test_a_direction_of_one_task_alone_survives():
    """The sum hides a weak direction behind four strong ones of the other task; its own share brings it back."""
    strong = torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.0, 0.0, 0.0]))
    weak = torch.diag(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.1]))
    tau = merged(IsoCTS(common=0.4), [{"w": strong}, {"w": weak}])["w"]
    mean = (9 + 8 + 7 + 6 + 0.5 + 0.1) / 6
    torch.testing.assert_close(tau, mean * torch.eye(6))


def test_zero_tasks_bring_no_arbitrary_directions():
    tau = merged(IsoCTS(common=0.5), [{"w": torch.ones(4, 4)}, {"w": torch.zeros(4, 4)}])["w"]
    torch.testing.assert_close(tau, torch.ones(4, 4) / 4)


def test_a_fused_weight_can_be_merged_as_three():
    taus = vectors(12, 4, name="attn.in_proj_weight")
    split = merged(IsoCTS(split_qkv=True), taus)["attn.in_proj_weight"]
    rows = (slice(0, 4), slice(4, 8), slice(8, 12))
    parts = [merged(IsoCTS(), [{"w": tau["attn.in_proj_weight"][cut]} for tau in taus])["w"] for cut in rows]
    torch.testing.assert_close(split, torch.cat(parts))


@pytest.mark.parametrize("common", [-0.1, 1.1])
def test_shares_out_of_range_are_refused(common):
    with pytest.raises(ValueError, match="expected common in"):
        IsoCTS(common)
