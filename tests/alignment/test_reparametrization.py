import pytest
import torch
from support.networks import network

from clmerge.alignment import (
    Axis,
    Group,
    PermutationSpec,
    Reparametrization,
    UnitMap,
    identity,
    spec_of,
)
from clmerge.alignment.reparametrization import random_reparametrization

KINDS = ["none", "permutation", "orthogonal", "invertible"]


@pytest.fixture(scope="module")
def nano():
    module, _ = network("open_clip")
    return spec_of(module), module.state_dict()


def drawn(spec, seed, within_head="permutation"):
    return random_reparametrization(spec, torch.Generator().manual_seed(seed), within_head=within_head)


def distance(left, right):
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize("within_head", KINDS)
def test_the_inverse_undoes_the_map(nano, within_head):
    spec, state = nano
    found = drawn(spec, 1, within_head)
    for back in (found.inverse().compose(found), found.compose(found.inverse())):
        assert distance(back.apply(state), state) <= (1e-11 if within_head in KINDS[2:] else 0.0)
        assert set(back.moved().values()) == {0.0}


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_composing_is_applying_twice(nano, first, second):
    spec, state = nano
    one, two = drawn(spec, 1, first), drawn(spec, 2, second)
    assert distance(two.compose(one).apply(state), two.apply(one.apply(state))) <= (
        0.0 if {first, second} <= set(KINDS[:2]) else 1e-11
    )


def test_permutations_are_linear_and_keep_every_bit(nano):
    spec, state = nano
    found = drawn(spec, 3)
    tau = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    total = found.apply({name: state[name] + tau[name] for name in state})
    apart, moved = found.apply(state), found.apply(tau)
    assert all(torch.equal(total[name], apart[name] + moved[name]) for name in state)
    assert all(torch.equal(moved[name].flatten().sort().values, tau[name].flatten().sort().values) for name in tau)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tau.items()}
    assert all(torch.equal(found.apply(half)[name], moved[name].to(torch.bfloat16)) for name in tau)


def test_rotations_keep_norms(nano):
    spec, state = nano
    moved = drawn(spec, 3, "orthogonal").apply(state)
    for name, tensor in state.items():
        assert float(moved[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-12)


def test_squares_move_with_permutations_and_with_nothing_else(nano):
    spec, state = nano
    squares = {name: tensor.square() for name, tensor in state.items()}
    found = drawn(spec, 4)
    expected = {name: tensor.square() for name, tensor in found.apply(state).items()}
    assert distance(found.apply_squared(squares), expected) == 0.0
    with pytest.raises(ValueError, match=r"a change of basis within the heads of 'blocks\.0\.qk'"):
        drawn(spec, 4, "orthogonal").apply_squared(squares)


@pytest.mark.parametrize("within_head", KINDS)
def test_a_saved_map_is_the_map(nano, within_head):
    spec, state = nano
    found = drawn(spec, 5, within_head)
    again = Reparametrization.from_state_dict(spec, found.state_dict())
    assert distance(again.apply(state), found.apply(state)) == 0.0
    assert again.is_permutation == (within_head in KINDS[:2])


def test_a_part_of_the_parameters_may_be_moved(nano):
    spec, state = nano
    found = drawn(spec, 6)
    name = "transformer.resblocks.2.mlp.c_fc.weight"
    assert torch.equal(found.apply({name: state[name]})[name], found.apply(state)[name])
    untouched = identity(spec).apply({name: state[name]})[name]
    assert torch.equal(untouched, state[name])
    assert untouched.data_ptr() != state[name].data_ptr()


def test_wrong_maps_are_refused():
    spec = PermutationSpec({"a": Group(4, (Axis("w", 0),)), "h": Group(4, (Axis("v", 0),), heads=2)})
    for maps, message in [
        ({"b": UnitMap(torch.arange(4))}, "got 'b'"),
        ({"a": UnitMap(torch.arange(3))}, r"int64 indices of 4 units for 'a', got torch.int64 \(3,\)"),
        ({"a": UnitMap(torch.tensor([0, 0, 1, 2]))}, "got a unit twice"),
        ({"a": UnitMap(torch.arange(4), torch.eye(4)[None])}, "expected no matrices for 'a'"),
        (
            {"h": UnitMap(torch.tensor([1, 0, 2, 3]), torch.eye(2).expand(2, 2, 2))},
            "keep their place within their head",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Reparametrization(spec, maps)
    with pytest.raises(ValueError, match="two specifications"):
        identity(spec).compose(identity(spec.without(["a"])))
