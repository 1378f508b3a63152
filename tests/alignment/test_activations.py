import pytest
import torch
from support.networks import network
from torch import nn

from clmerge.alignment import ActivationMatching, correlations, spec_of
from clmerge.alignment.activations import FEATURES, recorded, rotations
from clmerge.alignment.reparametrization import random_reparametrization


def pair(name, seed=1):
    """Return a network, the same one with its units moved, the map, and images."""
    first, images = network(name)
    second, _ = network(name)
    hidden = random_reparametrization(spec_of(first), torch.Generator().manual_seed(seed))
    second.load_state_dict(hidden.apply(first.state_dict()))
    return first, second, hidden, images


@pytest.mark.parametrize("weights", [0.0, 0.4])
@pytest.mark.parametrize("name", ["open_clip", "torchvision resnet", "mlp", "timm query norms"])
def test_units_that_fire_alike_are_matched(name, weights):
    first, second, hidden, images = pair(name)
    images = torch.cat([images, images.flip(3), images.roll(3, 2) * 0.5])
    spec = spec_of(first)
    found = correlations(first, second, spec, images.split(4))
    match = ActivationMatching(weights).match(first.state_dict(), second.state_dict(), spec, correlations=found)
    assert max(match.compose(hidden).moved().values()) == 0.0


def test_correlations_are_pearson_s():
    torch.manual_seed(0)
    one, two = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double() for _ in range(2))
    inputs = torch.randn(50, 3, dtype=torch.float64)
    found = correlations(one, two, spec_of(one), inputs.split(7))["hidden.0"]
    both = torch.cat([one[0](inputs), two[0](inputs)], dim=1).detach()
    assert torch.allclose(found, torch.corrcoef(both.T)[:4, 4:], atol=1e-12)
    with torch.no_grad():
        one[0].weight[0] = 0.0  # a unit that is constant
    assert torch.equal(correlations(one, two, spec_of(one), [inputs])["hidden.0"][0], torch.zeros(4).double())
    with pytest.raises(ValueError, match="expected images to compare two networks on"):
        correlations(one, two, spec_of(one), [])


def test_projections_of_attention_are_those_it_computes():
    module, images = network("open_clip")
    attention = module.transformer.resblocks[0].attn
    with torch.no_grad(), recorded(module) as (inputs, outputs):
        module(images)
    name = "transformer.resblocks.0.attn.out_proj.weight"
    expected = inputs[name] @ attention.out_proj.weight.T + attention.out_proj.bias
    assert torch.allclose(outputs[name], expected.detach(), atol=1e-12)


def test_rotations_of_a_permuted_network_are_its_permutations():
    first, second, hidden, images = pair("mlp")
    spec = spec_of(first)
    found = rotations(
        first, second, {}, torch.cat([images + shift for shift in torch.randn(40, 1, 1, 1, 1).double()]).split(30)
    )
    index = hidden.maps["hidden.4"].index
    turn = found["4.weight"][0][0]
    assert torch.allclose(turn, torch.eye(9).double()[index].T, atol=1e-6)
    assert torch.allclose(found["6.weight"][1], turn, atol=1e-1)
    assert found[FEATURES][1].shape == (4, 4)
    assert spec.names == set(first.state_dict())
