"""Merging and moving units commute: the merge of moved vectors is the moved merge, except for draws by position.

To the bit where a rule looks at one entry of all vectors at a time, or at exact ranks among the entries; to rounding
where it adds up entries, whose order the move changes.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from clmerge.alignment import identity, spec_of
from clmerge.alignment.reparametrization import random_reparametrization
from clmerge.merging import registered_mergers

NET = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5)).double()
SPEC = spec_of(NET)
MAPS = [random_reparametrization(SPEC, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
NEED_IMAGES = {name for name, rule in registered_mergers().items() if rule().requires_score or rule().requires_gradient}
BY_POSITION = {"DARE", "DELLA", "RandomMix", "TunableMagMax"}
BIT_FOR_BIT = {
    *("Breadcrumbs", "CoFiMA", "Consensus", "EMR", "FactorProduct", "FedNova", "Fisher", "MagMax", "PCB", "Pipeline"),
    *("SSU", "TALL", "TIES", "TaskArithmetic", "UGM", "WeightAverage", "WeightedAverage", "WiSEFT"),
}
RULES = sorted(
    name
    for name, rule in registered_mergers().items()
    if rule.__module__.startswith("clmerge.") and name not in NEED_IMAGES and "mask_fisher" not in rule().requires
)


def moved_gram(by, name, gram):
    """Move the Gram matrix of a layer's inputs, which lie along axis 1 of its weight."""
    for key, axis in SPEC.axes_of(name):
        if axis.axis == 1 and key in by.maps:
            index = by.maps[key].index
            gram = gram[index][:, index]
    return gram


def statistics(task, base, by):
    generator = torch.Generator().manual_seed(100 + task)
    fisher = {k: torch.rand(v.shape, generator=generator, dtype=v.dtype) for k, v in base.items()}
    inputs = {
        k: torch.randn(40, v.shape[1], generator=generator, dtype=v.dtype) for k, v in base.items() if v.ndim == 2
    }
    gram = {k: x.T @ x for k, x in inputs.items()}
    fisher, gram = by.apply_squared(fisher), {k: moved_gram(by, k, g) for k, g in gram.items()}
    return {"fisher": fisher, "gram": gram, "weights": by.apply(base), "samples": 10.0 + task, "steps": 5.0 + 2 * task}


def merged(rule, by):
    """Merge three vectors after they were moved."""
    merger, base = rule(), {k: v.detach() for k, v in NET.state_dict().items()}
    for task in range(3):
        generator = torch.Generator().manual_seed(task)
        tau = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in base.items()}
        given = statistics(task, base, by)
        merger.update(by.apply(tau), task=task, statistics={key: given[key] for key in merger.requires})
    return merger.compute()


@pytest.mark.parametrize("name", RULES)
def test_mergers_commute_with_permutations(name):
    rule = registered_mergers()[name]
    whole = merged(rule, identity(SPEC))
    for by in MAPS:
        after, before = by.apply(whole), merged(rule, by)
        apart = sum(float((after[key] - before[key]).square().sum()) for key in after) ** 0.5
        size = sum(float(tensor.square().sum()) for tensor in after.values()) ** 0.5
        assert size > 0
        if name in BY_POSITION:
            assert apart > 1e-2 * size  # merge again from the moved vectors
        elif name in BIT_FOR_BIT:
            assert all(torch.equal(after[key], before[key]) for key in after)
        else:
            assert apart <= 1e-12 * size


def test_every_class_of_rules_is_there():
    assert set(RULES) >= BY_POSITION | BIT_FOR_BIT
    assert not BY_POSITION & BIT_FOR_BIT
    page = (Path(__file__).parents[2] / "docs" / "rebase.md").read_text(encoding="utf-8")
    told = {name.strip("`") for name in re.findall(r"`\w+`", page.partition("Merging and moving units commute")[2])}
    assert told == BY_POSITION | BIT_FOR_BIT
