import numpy as np
import pytest
import torch
from support.matrix_references import by_kind, mean, svd
from support.references import Case, ties

from clmerge.merging import TIES, KnOTS, WeightAverage


def knots(reduce, scale):
    """``reduce`` is TIES in batch form; it sees the coordinates of all matrices."""

    def batch(vectors, tasks):
        bases, coordinates = {}, [{} for _ in vectors]
        merged = by_kind(lambda taus: None, mean(scale))(vectors, tasks)
        for name in [name for name, entries in merged.items() if entries is None]:
            bases[name], s, vh = svd(np.hstack([vector[name] for vector in vectors]))
            for own, part in zip(coordinates, np.hsplit(s[:, None] * vh, len(vectors)), strict=True):
                own[name] = part
        reduced = reduce(coordinates, tasks) if bases else {}
        return merged | {name: scale * bases[name] @ part for name, part in reduced.items()}

    return batch


CASES = {
    "KnOTS": Case(KnOTS, knots(ties(0.2, "model", "mean", 1.0), 1.0), generic=True, condition=100),
    "KnOTS tensor": Case(
        lambda: KnOTS(0.5, trim="tensor", merge="sum", scale=0.6),
        knots(ties(0.5, "tensor", "sum", 1.0), 0.6),
        generic=True,
        condition=100,
    ),
}


def vectors(*shape, num_tasks=3, name="w"):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(shape, generator=generator)} for _ in range(num_tasks)]


def merged(merger, taus):
    for tau in taus:
        merger.update(tau)
    return merger.compute()


def test_one_untrimmed_task_is_kept_as_it_is():
    (tau,) = vectors(5, 3, num_tasks=1)
    torch.testing.assert_close(merged(KnOTS(density=1.0), [tau]), tau)


def test_rotating_the_outputs_rotates_the_result_as_ties_alone_does_not():
    taus = vectors(5, 7)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q
    rotated = [{"w": rotation @ tau["w"]} for tau in taus]
    torch.testing.assert_close(merged(KnOTS(), rotated)["w"], rotation @ merged(KnOTS(), taus)["w"], rtol=0, atol=1e-4)
    assert not torch.allclose(merged(TIES(), rotated)["w"], rotation @ merged(TIES(), taus)["w"], atol=0.1)


def test_result_stays_in_the_span_of_low_rank_tasks():
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(8, 2, generator=generator)
    tau = merged(KnOTS(), [{"w": left @ torch.randn(2, 6, generator=generator)} for _ in range(3)])["w"]
    assert tau.any()
    torch.testing.assert_close(tau, left @ torch.linalg.pinv(left) @ tau, rtol=0, atol=1e-5)


def test_without_matrices_it_is_the_average():
    taus = vectors(4, 4)
    torch.testing.assert_close(merged(KnOTS(exclude=["w"]), taus), merged(WeightAverage(), taus))


def test_a_fused_weight_can_be_merged_as_three():
    taus = vectors(12, 4, name="qkv.weight")
    split = merged(KnOTS(trim="tensor", split_qkv=True), taus)["qkv.weight"]
    rows = (slice(0, 4), slice(4, 8), slice(8, 12))
    parts = [merged(KnOTS(trim="tensor"), [{"w": tau["qkv.weight"][cut]} for tau in taus])["w"] for cut in rows]
    torch.testing.assert_close(split, torch.cat(parts))


@pytest.mark.parametrize("wrong", [{"density": 0.0}, {"trim": "layer"}, {"merge": "median"}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KnOTS(**wrong)
