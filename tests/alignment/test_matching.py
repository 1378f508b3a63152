import copy
import itertools

import numpy as np
import pytest
import torch
from support.networks import network
from torch import nn

from clmerge.alignment import (
    ActivationMatching,
    Aligner,
    Axis,
    Group,
    PermutationSpec,
    Permuted,
    Reparametrization,
    Swap,
    UnitMap,
    WeightMatching,
    spec_of,
)
from clmerge.alignment.descent import Descent
from clmerge.alignment.reparametrization import random_reparametrization

NANO = network("open_clip")[0]
SPEC, STATE = spec_of(NANO), NANO.state_dict()


def planted(within_head, seed=1, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    found = random_reparametrization(SPEC, generator, within_head=within_head)
    other = found.apply(STATE)
    for name, tensor in other.items():
        spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        other[name] = tensor + noise * spread * drawn
    return found, other


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("within_head", ["none", "permutation"])
def test_a_planted_permutation_is_found(within_head, noise):
    hidden, other = planted(within_head, noise=noise)
    found = WeightMatching(within_head).match(STATE, other, SPEC)
    assert set(found.compose(hidden).moved().values()) == {0.0}
    if not noise:
        assert all(torch.equal(tensor, STATE[name]) for name, tensor in found.apply(other).items())


@pytest.mark.parametrize(
    ("planting", "matching"),
    [("orthogonal", "orthogonal"), ("invertible", "invertible"), ("permutation", "orthogonal")],
)
def test_a_planted_basis_of_the_heads_is_found(planting, matching):
    hidden, other = planted(planting)
    found = WeightMatching(matching).match(STATE, other, SPEC).compose(hidden).apply(STATE)
    assert max(float((found[name] - STATE[name]).abs().max()) for name in STATE) < 1e-13


def test_a_fine_tuned_model_stays_where_it_is():
    tuned = {name: tensor + 0.02 * tensor.abs().mean() * torch.randn_like(tensor) for name, tensor in STATE.items()}
    assert set(WeightMatching().match(STATE, tuned, SPEC).moved().values()) == {0.0}


def test_the_objective_never_falls():
    other = network("open_clip", seed=3)[0].state_dict()
    other = {name: tensor + torch.randn(tensor.shape, dtype=tensor.dtype) for name, tensor in other.items()}
    descent = Descent(STATE, other, SPEC)
    descent.run(max_sweeps=20, generator=torch.Generator().manual_seed(0))
    inner = {
        name: float((STATE[name] * tensor).sum())
        for name, tensor in WeightMatching().match(STATE, other, SPEC).apply(other).items()
    }
    start = sum(float((STATE[name] * other[name]).sum()) for name in SPEC.moved_names)
    values = []
    for sweeps in range(1, len(descent.history) + 1):
        found = WeightMatching(max_sweeps=sweeps).match(STATE, other, SPEC).apply(other)
        values.append(sum(float((STATE[name] * found[name]).sum()) for name in SPEC.moved_names))
    assert values[-1] > start
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise([start, *values]))
    assert values[-1] == pytest.approx(sum(inner[name] for name in SPEC.moved_names))


def test_two_runs_and_other_orders_of_names_give_the_same():
    _, other = planted("permutation", noise=1.5)
    once = WeightMatching(seed=2).match(STATE, other, SPEC).state_dict()
    turned = dict(reversed(list(STATE.items()))), dict(reversed(list(other.items())))
    again = WeightMatching(seed=2).match(*turned, SPEC).state_dict()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_one_hidden_layer_is_solved_exactly():
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double() for _ in range(2))
    spec = spec_of(one)
    found = WeightMatching().match(one.state_dict(), two.state_dict(), spec)
    ours = torch.cat([one[0].weight, one[0].bias[:, None], one[2].weight.T], dim=1).detach().numpy()
    theirs = torch.cat([two[0].weight, two[0].bias[:, None], two[2].weight.T], dim=1).detach().numpy()
    best = max(itertools.permutations(range(5)), key=lambda order: float((ours * theirs[list(order)]).sum()))
    assert np.array_equal(found.maps["hidden.0"].index.numpy(), best)


def test_the_residual_stream_may_be_left_alone():
    _, other = planted("permutation")
    assert WeightMatching(residual=False).match(STATE, other, SPEC).moved()["residual"] == 0.0


def test_what_is_missing_is_named():
    short = {name: tensor for name, tensor in STATE.items() if name != "ln_post.bias"}
    with pytest.raises(
        ValueError, match=r"all parameters with units in the other network, got none named 'ln_post\.bias'"
    ):
        WeightMatching().match(STATE, short, SPEC)
    with pytest.raises(ValueError, match=r"measure them with clmerge\.alignment\.correlations"):
        ActivationMatching().match(STATE, STATE, SPEC)
    with pytest.raises(ValueError, match=r"got 1\.0; for weights alone WeightMatching"):
        ActivationMatching(weights=1.0)
    with pytest.raises(ValueError, match="max_sweeps of 1 or more"):
        WeightMatching(max_sweeps=0)
    assert repr(WeightMatching("none")) == "WeightMatching(within_head='none', residual=True, max_sweeps=100, seed=0)"


def test_ranks_of_adapters_are_units_too():
    torch.manual_seed(0)
    spec = PermutationSpec({"rank": Group(4, (Axis("A", 0), Axis("B", 1, reads=True)))})
    one = {"A": torch.randn(4, 10), "B": torch.randn(6, 4)}
    order = torch.tensor([2, 0, 3, 1])
    two = {"A": one["A"][order] + 0.01 * torch.randn(4, 10), "B": one["B"][:, order]}
    found = WeightMatching().match(one, two, spec).apply(two)
    assert torch.equal(found["B"], one["B"])
    assert torch.allclose(found["B"] @ found["A"], two["B"] @ two["A"], atol=1e-5)


class Learned(Aligner):
    """A matcher of one's own, such as a network that was trained to answer (Deep-Align)."""

    def __init__(self, answer):
        self._answer = answer

    def match(self, reference, other, spec, *, correlations=None):
        return Reparametrization(spec, {key: UnitMap(index) for key, index in self._answer.items()})


def test_a_matcher_of_ones_own_is_a_class_with_one_method():
    hidden, other = planted("permutation")
    answer = {key: found.index for key, found in hidden.inverse().maps.items()}
    transport = Permuted(Learned(answer))
    new = copy.deepcopy(NANO)
    new.load_state_dict(other)
    transport.prepare(Swap(new, NANO, lambda: SPEC, tuple(STATE), lambda count: [], lambda task, count: []))
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in transport.transport(other, 0).items())
    torn = {key: index.roll(1) for key, index in answer.items()}
    with pytest.raises(ValueError, match="expected whole heads"):
        Learned(torn).match(STATE, other, SPEC)


def test_a_deep_network_is_matched_from_its_input_on():
    torch.manual_seed(0)
    widths = [16, *[96] * 8, 4]
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    net = nn.Sequential(*itertools.chain.from_iterable(layers)).double()
    spec, state = spec_of(net), net.state_dict()
    hidden = random_reparametrization(spec, torch.Generator().manual_seed(1))
    other = {k: v + 0.3 * v.std() * torch.randn_like(v) for k, v in hidden.apply(state).items()}
    for seed in range(3):
        found = WeightMatching(seed=seed, max_sweeps=1).match(state, other, spec)
        assert set(found.compose(hidden).moved().values()) == {0.0}
