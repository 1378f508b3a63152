import copy

import pytest
import torch
from support.tiny import tiny_clip
from support.towers import TOWERS, clip_tower, images, shake
from torch import nn

from clmerge.models import IA3, OpenClip
from clmerge.models.tuning.ia3 import IA3Linear, IA3MultiheadAttention, add_ia3
from clmerge.weights.parametrization import folded, merged_parameters, read_task_vector, renew, state_of
from clmerge.weights.swap import swapped

EVERY_TOWER = pytest.mark.parametrize("tower", TOWERS)


@EVERY_TOWER
def test_nothing_changes_at_first_and_all_factors_are_trained(tmp_path, tower):
    model, size = tower(tmp_path)
    with torch.no_grad():
        expected = model(images(size))
    model.requires_grad_(False)
    add_ia3(model)
    model.train()
    found = model(images(size))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {name for name, _ in model.named_parameters() if name.endswith("ia3")}
    assert trained


@EVERY_TOWER
def test_factors_fold_into_the_weights(tmp_path, tower):
    model, size = tower(tmp_path)
    model.double()
    keys, kinds = list(model.state_dict()), [type(part) for part in model.modules()]
    add_ia3(model)
    shake(model)
    x = images(size, torch.float64)
    with torch.no_grad():
        expected = model(x)
        with folded(model):
            assert list(model.state_dict()) == keys
            assert [type(part) for part in model.modules()] == kinds
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(copy.deepcopy(model)(x), expected)


@EVERY_TOWER
def test_a_task_vector_comes_back_as_weights_and_a_task_starts_from_them(tmp_path, tower):
    model, size = tower(tmp_path)
    model.requires_grad_(False)
    add_ia3(model)
    base = {name: tensor.detach().clone() for name, tensor in merged_parameters(model).items()}
    shake(model)
    tau = read_task_vector(model, base)
    assert all(tensor.any() for name, tensor in tau.items() if base[name].any())
    with torch.no_grad():
        trained = model(images(size))
        with swapped(model, state_of(model, base, tau)):
            assert not any(p.any() for name, p in model.named_parameters() if name.endswith("ia3"))
            torch.testing.assert_close(model(images(size)), trained, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(images(size)), trained)
        with swapped(model, state_of(model, {n: t for n, t in base.items() if "bias" not in n}, {})):
            again = read_task_vector(model, base)
            for name, tensor in again.items():
                if "bias" in name:
                    torch.testing.assert_close(tensor, tau[name], msg="what is not merged keeps its value")
                else:
                    assert not tensor.any()
        renew(model, seed=0, task=1)
        torch.testing.assert_close(model(images(size)), trained, rtol=1e-4, atol=1e-5)


def test_by_hand():
    block = nn.ModuleDict(
        {
            "attn": nn.ModuleDict({"qkv": nn.Linear(1, 3)}),
            "mlp": nn.ModuleDict({"fc2": nn.Linear(2, 1, bias=False)}),
            "other": nn.Linear(1, 1),
        }
    )
    assert add_ia3(block) == ["attn.qkv", "mlp.fc2"]
    qkv, last = block["attn"]["qkv"], block["mlp"]["fc2"]
    with torch.no_grad():
        qkv._parameters["weight"].copy_(torch.tensor([[1.0], [2.0], [3.0]]))
        qkv._parameters["bias"].copy_(torch.tensor([1.0, 1.0, 1.0]))
        qkv.ia3.copy_(torch.tensor([0.5, -1.0]))
        last._parameters["weight"].copy_(torch.tensor([[3.0, 4.0]]))
        last.ia3.copy_(torch.tensor([1.0, -0.5]))
    assert qkv.weight.flatten().tolist() == [1.0, 3.0, 0.0]
    assert qkv.bias.tolist() == [1.0, 1.5, 0.0]
    assert qkv(torch.tensor([[2.0]])).tolist() == [[3.0, 7.5, 0.0]]
    assert last.weight.tolist() == [[6.0, 2.0]]
    assert last(torch.ones(1, 2)).tolist() == [[8.0]]


def test_the_tuning_stays_in_the_image_tower(tmp_path):
    backbone = OpenClip(tiny_clip(tmp_path))
    names = IA3().prepare(backbone)
    kinds = {"attn.in_proj_weight", "attn.in_proj_bias", "mlp.c_proj.weight"}
    assert set(names) == {f"visual.transformer.resblocks.{i}.{kind}" for i in (0, 1) for kind in kinds}
    # 2 * 8 keys and values and 4 * 8 hidden features a block
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 2 * (16 + 32)


def test_attention_keeps_its_kind_and_queries_are_left_alone(tmp_path):
    model, _ = clip_tower(tmp_path)
    add_ia3(model)
    attention = model.transformer.resblocks[0].attn
    assert isinstance(attention, IA3MultiheadAttention)
    assert isinstance(model.transformer.resblocks[0].mlp.c_proj, IA3Linear)
    shake(model)
    moved = (attention.in_proj_weight != attention._parameters["in_proj_weight"]).any(dim=1)
    assert moved.tolist() == [False] * 8 + [True] * 16


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="attention or MLP layers in Sequential"):
        add_ia3(nn.Sequential(nn.Linear(2, 2)))
