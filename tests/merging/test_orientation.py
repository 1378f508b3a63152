"""Rules that speak of outputs read CLIP's projections, which are stored (in, out), the right way round."""

import pytest
import torch
from support.references import gradients, score, statistics_of

from clmerge.merging import (
    DELLA,
    OPCM,
    TSVM,
    WUDI,
    ACTMat,
    ExtSub,
    Fisher,
    IsoC,
    KnOTS,
    MaTS,
    RegMean,
    TaskArithmetic,
    ZipMerge,
)
from clmerge.merging.orientation import from_output_rows, output_rows, outputs_first

RULES = {
    "Fisher rows": lambda: Fisher(granularity="row"),
    "ExtSub": ExtSub,
    "DELLA": lambda: DELLA(0.5, window=0.9, reducer=TaskArithmetic()),
    "KnOTS": lambda: KnOTS(0.5),
    "RegMean": RegMean,
    "MaTS": MaTS,
    "ACTMat": ACTMat,
    "WUDI": WUDI,
    "IsoC": IsoC,
    "TSVM": TSVM,
    "OPCM": OPCM,
    "ZipMerge": lambda: ZipMerge(steps=3),
}


@pytest.fixture
def every_mask_alike(monkeypatch):
    """Random numbers by the entry of a matrix (out, in), whatever its name and orientation."""

    def alike(tau, *, seed, task, name, purpose):
        turned = outputs_first(name, tau)
        return outputs_first(name, torch.rand(turned.shape, generator=torch.Generator().manual_seed(task)))

    monkeypatch.setattr("clmerge.merging.sparsify.della.seeded_uniform", alike)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("every_mask_alike")
def test_a_projection_stored_in_by_out_is_merged_as_the_layer_it_is(rule):
    taus = [torch.randn(4, 6, generator=torch.Generator().manual_seed(task)) for task in range(3)]
    merged = []
    for name in ("fc.weight", "visual.proj"):
        merger = RULES[rule]()
        for task, tau in enumerate(taus):
            statistics = statistics_of(task, {"fc.weight": (4, 6)})
            fisher = {name: outputs_first(name, statistics["fisher"]["fc.weight"])}
            given = {"fisher": fisher, "gram": {name: statistics["gram"]["fc.weight"]}}
            vector = {name: outputs_first(name, tau)}
            merger.update(vector, task=task, score=score, gradients=gradients, statistics=given)
        merged.append(outputs_first(name, merger.compute()[name]))
    torch.testing.assert_close(merged[0], merged[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("visual.proj", (3, 2), (2, 3)),
        ("text_projection", (3, 2), (2, 3)),
        ("attn.proj.weight", (3, 2), (3, 2)),
        ("conv1.weight", (4, 3, 2, 2), (4, 12)),
        ("proj", (5,), (1, 5)),
        ("scalar", (), (1, 1)),
        ("empty", (0, 3), (1, 0)),
    ],
)
def test_rows_are_outputs_and_go_back(name, shape, rows):
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    found = output_rows(name, tensor)
    assert tuple(found.shape) == rows
    assert torch.equal(from_output_rows(name, found, shape), tensor)
