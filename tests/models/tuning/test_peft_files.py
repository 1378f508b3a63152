import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_clip
from support.towers import clip_tower, images, shake, timm_tower
from torch import nn

from clmerge.checkpoints import open_checkpoint
from clmerge.models import OpenClip, add_lora
from clmerge.models.tuning.peft_files import load_adapter, save_adapter
from clmerge.weights.parametrization import merged_parameters, read_task_vector


def tuned(folder):
    model, _ = timm_tower(None)
    model.requires_grad_(False)
    add_lora(model, "attn", rank=2, alpha=6)
    add_lora(model, r"blocks\.0\.mlp", rank=4)
    base = {name: tensor.detach().clone() for name, tensor in merged_parameters(model).items()}
    shake(model)
    save_adapter(model, folder)
    return model, base


def test_what_was_written_is_read_back(tmp_path):
    model, base = tuned(tmp_path)
    again, size = timm_tower(None)
    assert set(load_adapter(again, tmp_path)) == set(base)
    with torch.no_grad():
        assert torch.equal(again(images(size)), model(images(size)))
    expected = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) and p.requires_grad for name, p in found.items())


def test_clmerge_merge_takes_the_files_for_the_task_vector(tmp_path):
    model, base = tuned(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert set(opened.entries) == set(base)
    for name, tensor in read_task_vector(model, base).items():
        torch.testing.assert_close(opened[name], tensor)


def test_files_are_in_the_layout_of_peft(tmp_path):
    tuned(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 6.0)
    assert config["rank_pattern"] == {r"^blocks\.0\.mlp\.fc1": 4, r"^blocks\.0\.mlp\.fc2": 4}
    assert set(config["alpha_pattern"].values()) == {4.0}
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.blocks.0.attn.qkv.lora_A.weight"] == (2, 64)
    assert shapes["base_model.model.blocks.0.attn.qkv.lora_B.weight"] == (192, 2)


def test_a_packed_projection_of_peft_becomes_one_product_for_each_of_its_slices(tmp_path):
    a, b = torch.randn(2, 8), torch.randn(24, 2)
    names = [f"base_model.model.transformer.resblocks.0.attn.lora_{side}.weight" for side in "AB"]
    out = [f"base_model.model.transformer.resblocks.0.attn.base_layer.out_proj.lora_{side}.weight" for side in "AB"]
    zeros = [torch.zeros(2, 8), torch.zeros(8, 2)]
    save_file(dict(zip([*names, *out], [a, b, *zeros], strict=True)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["attn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = OpenClip(tiny_clip(tmp_path / "clip")).model.visual
    before = model.transformer.resblocks[0].attn.in_proj_weight.detach().clone()
    load_adapter(model, tmp_path)
    found = model.transformer.resblocks[0].attn.in_proj_weight
    torch.testing.assert_close(found.detach(), before + 1.5 * b @ a)


def test_what_peft_would_compute_otherwise_is_not_written(tmp_path):
    model, _ = clip_tower(tmp_path / "clip")
    with pytest.raises(ValueError, match="alone in VisionTransformer, got none"):
        save_adapter(model, tmp_path / "a")
    add_lora(model, "attn", rank=2)
    with pytest.raises(ValueError, match=r"got 'transformer\.resblocks\.0\.attn', an attention module's"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    tuned(tmp_path)
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected 'blocks\.0\.attn\.proj\.weight' of shape \(64, 64\) in Sequential"):
        load_adapter(net, tmp_path)
    assert list(net.state_dict()) == ["0.weight", "0.bias"]
    file = tmp_path / "whole.safetensors"
    save_file({"w": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"a folder with adapter_config\.json and an adapter, got safetensors"):
        load_adapter(net, file)


def test_whole_weights_beside_the_factors_are_refused(tmp_path):
    tuned(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors") | {"base_model.model.head.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"LoRA factors alone, got also 'head\.weight'"):
        load_adapter(timm_tower(None)[0], tmp_path)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_alone_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = tuned(tmp_path / "ours")
    plain, size = timm_tower(None)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = model(images(size))
        torch.testing.assert_close(loaded(images(size)), expected, rtol=1e-5, atol=1e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    again, _ = timm_tower(None)
    load_adapter(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again(images(size)), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded.merge_and_unload()(images(size)), expected, rtol=1e-3, atol=2e-4)
