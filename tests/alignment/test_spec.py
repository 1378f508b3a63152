import pytest
import timm
import torch
from support.networks import NETWORKS, error, network
from torch import nn

from clmerge.alignment import (
    Axis,
    Group,
    PermutationSpec,
    Reparametrization,
    UnitMap,
    spec_of,
)
from clmerge.alignment.reparametrization import random_reparametrization
from clmerge.models import OpenClip


@pytest.mark.parametrize("within_head", ["none", "permutation", "orthogonal", "invertible"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_random_symmetry_leaves_the_function(name, within_head):
    module, images = network(name)
    state = module.state_dict()
    found = random_reparametrization(spec_of(module), torch.Generator().manual_seed(1), within_head=within_head)
    moved = found.apply(state)
    assert any(not torch.equal(moved[key], state[key]) for key in state)
    assert error(module, images, moved) < (1e-11 if within_head == "invertible" else 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_covered_and_every_group_moves(name):
    module, _ = network(name)
    spec = spec_of(module)
    assert spec.names == set(module.state_dict())
    rigid = {key for key, group in spec.groups.items() if group.rigid}
    moved = random_reparametrization(spec, torch.Generator().manual_seed(2)).moved()
    assert all(share > 0.3 for key, share in moved.items() if key not in rigid)


def test_float32_stays_within_rounding():
    module, images = network("open_clip")
    module.float()
    moved = random_reparametrization(spec_of(module), torch.Generator().manual_seed(1), within_head="orthogonal")
    assert error(module, images.float(), moved.apply(module.state_dict())) < 1e-4


def other_heads(spec, state):
    """Turn the heads of queries and keys, and not those of values and outputs."""
    index = torch.arange(96).view(-1, spec.groups["blocks.0.qk"].head_size).roll(1, 0).reshape(-1)
    for name, axis in [("in_proj_weight", 0), ("in_proj_bias", 0)]:
        whole = f"transformer.resblocks.0.attn.{name}"
        rows = torch.cat([index, index + 96, torch.arange(192, 288)])
        state[whole] = state[whole].index_select(axis, rows)
    return state


def flipped(spec, state):
    """Flip the sign of one channel of the residual stream everywhere."""
    for axis in spec.groups["residual"].axes:
        part = state[axis.name].select(axis.axis, 5)
        part.neg_()
    return state


@pytest.mark.parametrize("change", [other_heads, flipped])
def test_what_is_no_symmetry_changes_the_function(change):
    module, images = network("open_clip")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert error(module, images, change(spec_of(module), state)) > 1e-2


def test_running_statistics_must_move_too():
    module, images = network("torchvision resnet")
    state = module.state_dict()
    moved = random_reparametrization(spec_of(module), torch.Generator().manual_seed(1)).apply(state)
    left = {name: state[name] if "running" in name else tensor for name, tensor in moved.items()}
    assert error(module, images, left) > 1e-2


def test_two_orders_of_heads_are_refused():
    spec = spec_of(network("open_clip")[0])
    turned = torch.arange(96).view(-1, spec.groups["blocks.0.qk"].head_size).roll(1, 0).reshape(-1)
    with pytest.raises(ValueError, match=r"one order of heads for 'blocks\.0\.qk' and 'blocks\.0\.vo', got two"):
        Reparametrization(spec, {"blocks.0.qk": UnitMap(turned)})
    torn = torch.arange(96).roll(1)
    with pytest.raises(ValueError, match="expected whole heads"):
        Reparametrization(spec, {"blocks.0.qk": UnitMap(torn), "blocks.0.vo": UnitMap(torn)})


class Gated(nn.Sequential):
    """Not a known architecture."""


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: timm.create_model("resnet26d", num_classes=0), "'conv1', whose parameters no group"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, scale_attn_norm=True), "attn.norm.weight"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), "got Eva"),
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.Bilinear(3, 3, 2)), "Bilinear '1'"),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 2)), "without groups"),
        (lambda: Gated(nn.Linear(2, 3), nn.Linear(3, 2)), "got Gated"),
    ],
)
def test_what_no_group_covers_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        spec_of(make())


def test_a_parameter_of_ones_own_is_named():
    module, _ = network("open_clip")
    module.transformer.resblocks[1].gate = nn.Parameter(torch.zeros(96))
    with pytest.raises(ValueError, match=r"'transformer\.resblocks\.1\.gate', which no group of units covers"):
        spec_of(module)
    with pytest.raises(ValueError, match="got 'gate' in the state: no group of units lies along it"):
        random_reparametrization(spec_of(network("mlp")[0]), torch.Generator()).apply({"gate": torch.zeros(1)})


def test_the_encoder_is_found_within_a_module():
    spec = spec_of(OpenClip("nano"))
    assert "model.visual.proj" in spec.moved_names
    assert "model.logit_scale" in spec.fixed
    assert spec.prefixed("backbone.").groups["residual"].axes[0].name == "backbone.model.visual.conv1.weight"


@torch.no_grad()
def test_features_keep_their_order_unless_their_readers_are_named():
    torch.manual_seed(0)
    features, _ = network("timm features")
    model = nn.Sequential()
    model.add_module("trunk", features)
    model.add_module("head", nn.Linear(192, 4).double())
    assert "residual" not in spec_of(model).groups
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = random_reparametrization(spec_of(model, readers=["head.weight"]), torch.Generator().manual_seed(0))
    assert found.moved()["residual"] > 0.3
    assert error(model, images, found.apply(model.state_dict())) < 1e-12
    with pytest.raises(ValueError, match="got 'tail'"):
        spec_of(model, readers=["tail"])


def test_sizes_and_claims_are_checked():
    group = Group(4, (Axis("w", 0),))
    with pytest.raises(ValueError, match="one group for every axis of 'w', got 'a' and 'b'"):
        PermutationSpec({"a": group, "b": group})
    with pytest.raises(ValueError, match="got it on two"):
        PermutationSpec({"a": Group(4, (Axis("w", 0), Axis("w", 1)))})
    with pytest.raises(ValueError, match="multiple of 3 heads, got 4 units"):
        PermutationSpec({"a": Group(4, (Axis("w", 0),), heads=3)})
    with pytest.raises(ValueError, match="got 'w', which has some"):
        PermutationSpec({"a": group}, fixed=("w",))
    spec = PermutationSpec({"a": group}, fixed=("b",))
    with pytest.raises(ValueError, match=r"expected 4 entries along axis 0 of 'w' \(a\), got \(3,\)"):
        spec.check({"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="got none named 'w'"):
        spec.check({"b": torch.zeros(3)}, whole=True)
    with pytest.raises(ValueError, match="got 'c'"):
        spec.without(["c"])
    assert spec.without(["a"]).fixed == ("w", "b")
