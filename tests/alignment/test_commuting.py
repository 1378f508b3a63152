"""Merging and moving units commute: the merge of moved vectors is the moved merge, except for draws by position."""

import pytest
import torch
from torch import nn

from clmerge.alignment import spec_of
from clmerge.alignment.reparametrization import random_reparametrization
from clmerge.merging import registered_mergers

NET = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 5)).double()
SPEC = spec_of(NET)
MAP = random_reparametrization(SPEC, torch.Generator().manual_seed(0))
NEED_IMAGES = {name for name, rule in registered_mergers().items() if rule().requires_score or rule().requires_gradient}
BY_POSITION = {"DARE", "DELLA", "RandomMix", "TunableMagMax"}
RULES = sorted(
    name
    for name, rule in registered_mergers().items()
    if rule.__module__.startswith("clmerge.") and name not in NEED_IMAGES and "mask_fisher" not in rule().requires
)


def moved_gram(name, gram):
    """Move the Gram matrix of a layer's inputs, which lie along axis 1 of its weight."""
    for key, axis in SPEC.axes_of(name):
        if axis.axis == 1:
            index = MAP.maps[key].index
            gram = gram[index][:, index]
    return gram


def statistics(task, base, *, moved):
    generator = torch.Generator().manual_seed(100 + task)
    fisher = {k: torch.rand(v.shape, generator=generator, dtype=v.dtype) for k, v in base.items()}
    inputs = {
        k: torch.randn(40, v.shape[1], generator=generator, dtype=v.dtype) for k, v in base.items() if v.ndim == 2
    }
    gram = {k: x.T @ x for k, x in inputs.items()}
    if moved:
        fisher, gram = MAP.apply_squared(fisher), {k: moved_gram(k, g) for k, g in gram.items()}
    weights = MAP.apply(base) if moved else base
    return {"fisher": fisher, "gram": gram, "weights": weights, "samples": 10.0 + task, "steps": 5.0 + 2 * task}


def merged(rule, *, moved):
    merger, base = rule(), {k: v.detach() for k, v in NET.state_dict().items()}
    for task in range(3):
        generator = torch.Generator().manual_seed(task)
        tau = {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in base.items()}
        given = statistics(task, base, moved=moved)
        merger.update(
            MAP.apply(tau) if moved else tau, task=task, statistics={key: given[key] for key in merger.requires}
        )
    return merger.compute()


@pytest.mark.parametrize("name", RULES)
def test_mergers_commute_with_permutations(name):
    rule = registered_mergers()[name]
    after, before = MAP.apply(merged(rule, moved=False)), merged(rule, moved=True)
    apart = sum(float((after[key] - before[key]).square().sum()) for key in after) ** 0.5
    size = sum(float(tensor.square().sum()) for tensor in after.values()) ** 0.5
    assert size > 0
    if name in BY_POSITION:
        assert apart > 1e-2 * size  # merge again from the moved vectors
    else:
        assert apart <= 1e-12 * size
