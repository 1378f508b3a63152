import pytest
import torch
from support.tiny import tiny_clip
from support.towers import TOWERS, images, shake
from torch import nn

from clmerge.models import Adapters, OpenClip
from clmerge.models.tuning.adapters import add_adapters
from clmerge.weights.parametrization import merged_parameters


@pytest.mark.parametrize("tower", TOWERS)
def test_nothing_changes_at_first_and_only_the_bottlenecks_are_trained(tmp_path, tower):
    model, size = tower(tmp_path)
    with torch.no_grad():
        expected = model(images(size))
    keys = list(model.state_dict())
    model.requires_grad_(False)
    add_adapters(model, width=3)
    with torch.no_grad():
        assert torch.equal(model(images(size)), expected)
    shake(model)
    model(images(size)).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert trained == list(merged_parameters(model)) == [name for name in model.state_dict() if name not in keys]


def test_by_hand():
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc2": nn.Linear(1, 2, bias=False)})})
    add_adapters(block, width=1)
    layer = block["mlp"]["fc2"]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [2.0]]))
        layer.adapter_down.copy_(torch.tensor([[10.0, 10.0]]))
        layer.adapter_down_bias.fill_(-5.0)
        layer.adapter_up.copy_(torch.tensor([[1.0], [0.5]]))
        layer.adapter_up_bias.copy_(torch.tensor([0.0, 1.0]))
    # the hidden feature is gelu(10 * 1 + 10 * 2 - 5) = 25
    assert layer(torch.tensor([[1.0]])).tolist() == [[1.0 + 25.0, 2.0 + 12.5 + 1.0]]


def test_the_final_model_loads_into_a_backbone_with_adapters(tmp_path):
    backbone = OpenClip(tiny_clip(tmp_path))
    names = Adapters(width=2).prepare(backbone)
    assert all(name.startswith("visual.transformer.resblocks.") and ".mlp.c_proj.adapter_" in name for name in names)
    shake(backbone)
    other = OpenClip(tiny_clip(tmp_path)).model
    add_adapters(other.visual, width=2)
    other.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other.encode_image(images(8)), backbone(images(8)))


def test_what_cannot_have_a_bottleneck_is_refused():
    with pytest.raises(ValueError, match="width of 1 or more, got 0"):
        add_adapters(nn.Sequential(), width=0)
    with pytest.raises(ValueError, match="expected MLPs in Sequential"):
        add_adapters(nn.Sequential(nn.Linear(2, 2)))
