import itertools

import pytest
import torch
from support.networks import error, network
from torch import nn

from clmerge.alignment import (
    Axis,
    CCAMatching,
    Group,
    OTFusion,
    PermutationSpec,
    SinkhornMatching,
    StraightThroughMatching,
    Universe,
    WeightMatching,
    spec_of,
    zipped,
)
from clmerge.alignment.reparametrization import random_reparametrization

NANO, IMAGES = network("open_clip")
MLP = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))


def mlp(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    return net, net.state_dict()


def moved(state, spec, seed, noise=0.0):
    generator = torch.Generator().manual_seed(seed)
    found = random_reparametrization(spec, generator)
    other = found.apply(state)
    return found, {k: v + noise * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in other.items()}


def agreement(states):
    pairs = itertools.combinations(states, 2)
    return sum(float((one[k] * two[k]).sum()) for one, two in pairs for k in one)


# Universe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 50])
def test_networks_that_are_one_meet_in_the_universe(steps):
    _, state = mlp(0)
    spec = spec_of(MLP)
    states = [moved(state, spec, seed)[1] for seed in range(4)]
    maps = Universe(steps).match(states, spec)
    found = [one.apply(each) for one, each in zip(maps, states, strict=True)]
    assert all(torch.equal(found[0][k], other[k]) for other in found[1:] for k in state)


def test_maps_through_the_universe_are_consistent_and_pairwise_ones_need_not_be():
    spec = spec_of(MLP)
    states = [mlp(seed)[1] for seed in range(3)]
    maps = Universe().match(states, spec)
    between = {(i, j): maps[j].inverse().compose(maps[i]).state_dict() for i, j in itertools.permutations(range(3), 2)}
    pairwise = {
        (i, j): WeightMatching().match(states[j], states[i], spec) for i, j in itertools.permutations(range(3), 2)
    }
    for key in between[0, 1]:
        assert torch.equal(between[0, 1][key][between[1, 2][key]], between[0, 2][key])
    one_way = pairwise[1, 2].compose(pairwise[0, 1]).state_dict()
    assert any(not torch.equal(one_way[key], pairwise[0, 2].state_dict()[key]) for key in one_way)
    before, after = agreement(states), agreement([m.apply(s) for m, s in zip(maps, states, strict=True)])
    assert after > before


def test_heads_meet_in_the_universe_too():
    spec, state = spec_of(NANO), NANO.state_dict()
    states = [state, moved(state, spec, 1)[1], moved(state, spec, 2, noise=0.01)[1]]
    maps = Universe(0).match(states, spec)
    found = [one.apply(each) for one, each in zip(maps, states, strict=True)]
    assert all(torch.equal(found[0][k], found[1][k]) for k in state)
    assert max(float((found[2][k] - found[0][k]).abs().max()) for k in state) < 0.1


def test_a_universe_takes_two():
    with pytest.raises(ValueError, match="two networks or more, got 1"):
        Universe().match([mlp(0)[1]], spec_of(MLP))
    with pytest.raises(ValueError, match="got -1 and 100"):
        Universe(-1)


# By gradient ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_sinkhorn_finds_a_planted_permutation(noise):
    _, state = mlp(0)
    spec = spec_of(MLP)
    hidden, other = moved(state, spec, 1, noise)
    assert set(SinkhornMatching().match(state, other, spec).compose(hidden).moved().values()) == {0.0}


def test_the_straight_through_map_has_a_small_loss_midway():
    net, state = mlp(0)
    spec = spec_of(MLP)
    inputs = torch.randn(100, 5, dtype=torch.float64)
    labels = net(inputs).argmax(1)

    def loss(weights):
        return nn.functional.cross_entropy(torch.func.functional_call(net, dict(weights), (inputs,)), labels)

    hidden, other = moved(state, spec, 1)
    found = StraightThroughMatching(loss, steps=5).match(state, other, spec)
    assert set(found.compose(hidden).moved().values()) == {0.0}
    independent = mlp(3)[1]

    def midway(map_):
        turned = map_.apply(independent)
        return float(loss({k: (state[k] + turned[k]) / 2 for k in state}))

    once = StraightThroughMatching(loss, steps=1).match(state, independent, spec)
    assert midway(StraightThroughMatching(loss, steps=10).match(state, independent, spec)) <= midway(once)


# Soft maps -----------------------------------------------------------------------------------------------------------


def test_transport_of_equal_widths_is_a_permutation():
    ot = pytest.importorskip("ot")
    assert ot.__version__
    _, state = mlp(0)
    spec = spec_of(MLP)
    _, other = moved(state, spec, 1)
    found = OTFusion().match(state, other, spec).apply(other)
    assert max(float((found[k] - state[k]).abs().max()) for k in state) < 1e-12
    for write, read in OTFusion(0.5).match(state, other, spec).maps.values():
        assert torch.allclose(write.sum(1), torch.ones(len(write), dtype=torch.float64))
        assert torch.allclose(read.sum(1), torch.ones(len(read), dtype=torch.float64))
        assert 1e-6 < float(write.min()) < float(write.max()) < 1.0


def test_a_network_with_every_unit_twice_comes_back_to_its_own_width():
    pytest.importorskip("ot")
    net, state = mlp(0)
    wide = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, 3)).double()
    twice = {
        "0.weight": state["0.weight"].repeat_interleave(2, 0),
        "0.bias": state["0.bias"].repeat_interleave(2),
        "2.weight": state["2.weight"].repeat_interleave(2, 0).repeat_interleave(2, 1) / 2,
        "2.bias": state["2.bias"].repeat_interleave(2),
        "4.weight": state["4.weight"].repeat_interleave(2, 1) / 2,
        "4.bias": state["4.bias"],
    }
    found = OTFusion().match(state, twice, spec_of(net), spec_of(wide)).apply(twice)
    inputs = torch.randn(20, 5, dtype=torch.float64)
    assert torch.allclose(torch.func.functional_call(net, found, (inputs,)), net(inputs), atol=1e-10)


def test_transport_keeps_heads_whole():
    pytest.importorskip("ot")
    spec, state = spec_of(NANO), NANO.state_dict()
    _, other = moved(state, spec, 1)
    found = OTFusion().match(state, other, spec).apply({k: other[k] for k in spec.moved_names})
    assert error(NANO, IMAGES, found) < 1e-10


def adapter(rank):
    """A bottleneck adapter of some rank: its groups, and one that is drawn (MerA)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, rank), nn.GELU(), nn.Linear(rank, 6)).double()
    axes = (Axis("down.weight", 0), Axis("down.bias", 0), Axis("up.weight", 1, reads=True))
    spec = PermutationSpec({"rank": Group(rank, axes)}, ("up.bias",))
    return spec, {f"{('down', 'up')[int(name[0]) // 2]}{name[1:]}": t for name, t in net.state_dict().items()}


def through(state, inputs):
    hidden = nn.functional.gelu(inputs @ state["down.weight"].T + state["down.bias"])
    return hidden @ state["up.weight"].T + state["up.bias"]


@pytest.mark.parametrize("matcher", [WeightMatching(), OTFusion()])
def test_adapters_meet_by_their_ranks(matcher):
    pytest.importorskip("ot")
    spec, state = adapter(4)
    _, other = moved(state, spec, 3)
    found = matcher.match(state, other, spec).apply(other)
    mean = {name: (state[name] + found[name]) / 2 for name in state}
    inputs = torch.randn(30, 6, dtype=torch.float64)
    assert torch.allclose(through(mean, inputs), through(state, inputs), atol=1e-12)
    naive = {name: (state[name] + other[name]) / 2 for name in state}
    assert float((through(naive, inputs) - through(state, inputs)).norm()) > 0.1


def test_adapters_of_other_ranks_meet_by_transport():
    pytest.importorskip("ot")
    spec, state = adapter(4)
    wide, _ = adapter(8)
    twice = {
        "down.weight": state["down.weight"].repeat_interleave(2, 0),
        "down.bias": state["down.bias"].repeat_interleave(2),
        "up.weight": state["up.weight"].repeat_interleave(2, 1) / 2,
        "up.bias": state["up.bias"],
    }
    found = OTFusion().match(state, twice, spec, wide).apply(twice)
    inputs = torch.randn(30, 6, dtype=torch.float64)
    assert torch.allclose(through(found, inputs), through(state, inputs), atol=1e-12)


def test_canonical_correlations_of_a_permuted_network_are_nearly_its_permutation():
    net, state = mlp(0)
    spec = spec_of(net)
    _, other = moved(state, spec, 1)
    second = mlp(0)[0]
    second.load_state_dict(other)
    inputs = torch.randn(2000, 5, dtype=torch.float64)
    maps = CCAMatching(0.01).match(net, second, spec, inputs.split(500))
    write, read = maps.maps["hidden.0"]
    assert torch.allclose(write @ read, torch.eye(12, dtype=torch.float64), atol=1e-8)
    found = maps.apply(other)
    assert float((found["0.weight"] - state["0.weight"]).norm() / state["0.weight"].norm()) < 0.1
    for setting in (0.0, -1.0):
        with pytest.raises(ValueError, match="regularization above 0"):
            CCAMatching(setting)


# Zip -----------------------------------------------------------------------------------------------------------------


def all_correlations(nets, spec, inputs):
    found = {}
    for key, layers in {"hidden.0": 1, "hidden.2": 3}.items():
        rows = torch.cat([net[:layers](inputs) for net in nets], dim=1).detach()
        found[key] = torch.corrcoef(rows.T)
    return found


def test_zipping_permuted_networks_gives_their_function():
    net, state = mlp(0)
    spec = spec_of(net)
    nets = [net]
    for seed in (1, 2):
        second = mlp(0)[0]
        second.load_state_dict(moved(state, spec, seed)[1])
        nets.append(second)
    inputs = torch.randn(500, 5, dtype=torch.float64)
    merged = zipped([n.state_dict() for n in nets], spec, all_correlations(nets, spec, inputs), within=0.0, shrink=1.0)
    assert torch.allclose(torch.func.functional_call(net, merged, (inputs,)), net(inputs), atol=1e-10)


def test_zips_are_checked():
    spec = spec_of(NANO)
    with pytest.raises(ValueError, match=r"got 'blocks\.0\.qk': pin it"):
        zipped([NANO.state_dict()] * 2, spec, {key: torch.eye(2 * g.size) for key, g in spec.groups.items()})
    with pytest.raises(ValueError, match=r"2 times 12 units for .*, got None"):
        zipped([mlp(0)[1]] * 2, spec_of(MLP), {})
