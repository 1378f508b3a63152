import itertools

import pytest
import timm
import torch
from support.networks import error, network
from torch import nn

from clmerge.alignment import deepen, layer_map, spec_of, widen


@pytest.mark.parametrize("name", ["open_clip", "timm", "timm layer scale"])
def test_a_deeper_network_is_the_same_bit_for_bit(name):
    module, images = network(name)
    state = deepen(module.state_dict(), [0, 1])
    with torch.no_grad():
        before = module(images)
        stack = module.transformer.resblocks if name == "open_clip" else module.blocks
        blocks = list(stack)
        new, _ = network(name)
        extra = list(new.transformer.resblocks if name == "open_clip" else new.blocks)
        longer = [blocks[0], extra[0], blocks[1], extra[1], *blocks[2:]]
        if name == "open_clip":
            module.transformer.resblocks = nn.ModuleList(longer)
        else:
            module.blocks = nn.Sequential(*longer)
        module.load_state_dict(state)
        assert torch.equal(module(images), before)


def test_a_wider_network_is_the_same():
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 16, "depth": 2, "num_classes": 5}
    small = timm.models.VisionTransformer(embed_dim=24, num_heads=3, **settings).double().eval()
    large = timm.models.VisionTransformer(embed_dim=48, num_heads=6, **settings).double().eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        large.load_state_dict(widen(small.state_dict(), spec_of(small), 2))
        assert float((large(images) - small(images)).norm() / small(images).norm()) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "open_clip"])
def test_once_as_wide_is_the_same(name):
    module, images = network(name)
    assert error(module, images, widen(module.state_dict(), spec_of(module), 1)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_map_of_layers_is_the_best_of_all(seed):
    costs = torch.rand(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = layer_map(costs)

    def allowed(stands):
        steps = [after - before for before, after in itertools.pairwise(stands)]
        return stands[0] == 0 and stands[-1] == 3 and all(step in (0, 1) for step in steps)

    def total(stands):
        return sum(float(costs[stand, layer]) for layer, stand in enumerate(stands))

    assert allowed(found)
    assert total(found) == min(total(stands) for stands in itertools.product(range(4), repeat=7) if allowed(stands))


def test_what_cannot_be_lifted_is_refused():
    with pytest.raises(ValueError, match=r"among the blocks \[0, 1, 2, 3, 4\], got \[7\]"):
        deepen(network("open_clip")[0].state_dict(), [7])
    with pytest.raises(ValueError, match="factor of 1 or more"):
        widen({}, spec_of(network("mlp")[0]), 0)
    with pytest.raises(ValueError, match="got 3 by 2"):
        layer_map(torch.zeros(3, 2))
