import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d
from torch.testing import assert_close

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.names import align_names
from clmerge.checkpoints.verify import verify
from clmerge.merging import TIES, MagMax, TaskArithmetic, WeightAverage

RANK = 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(folder, tensors, *, prefix="base_model.model.", **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_dora": False, "init_lora_weights": True} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(module, rows, columns, *, rank=RANK, seed=0):
    return {
        f"{module}.lora_A.weight": drawn(rank, columns, seed=seed),
        f"{module}.lora_B.weight": drawn(rows, rank, seed=seed + 1),
    }


def product(tensors, module):
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("named", ["folder", "file"])
def test_the_scale_is_alpha_over_rank(named, tmp_path):
    tensors = factors("net.0", 8, 5)
    path = adapter(tmp_path / "a", tensors)
    opened = open_checkpoint(path if named == "folder" else path / "adapter_model.safetensors")
    assert opened.is_task_vector
    assert "rank 3" in opened.kind
    assert {file.name for file in opened.files} == {"adapter_model.safetensors", "adapter_config.json"}
    assert_close(opened["net.0.weight"], 2 * product(tensors, "net.0"))


def test_ranks_and_alphas_of_patterns_and_rank_stabilised_scales(tmp_path):
    tensors = factors("net.0", 8, 5, rank=4) | factors("net.10", 8, 5) | factors("deep.net.0", 8, 5, rank=4)
    patterns = {"rank_pattern": {r"net\.0": 4}, "alpha_pattern": {r"^net\.0": 1, "10": 9}}
    opened = open_checkpoint(adapter(tmp_path / "a", tensors, use_rslora=True, **patterns))
    assert_close(opened["net.0.weight"], product(tensors, "net.0") * (1 / 4**0.5))
    assert_close(opened["net.10.weight"], product(tensors, "net.10") * (9 / 3**0.5))
    assert_close(opened["deep.net.0.weight"], product(tensors, "deep.net.0") * (6 / 4**0.5))


def test_layouts(tmp_path):
    tensors = {
        "conv.lora_A.weight": drawn(RANK, 4, 3, 2),
        "conv.lora_B.weight": drawn(6, RANK, 1, 1),
        "table.lora_embedding_A": drawn(RANK, 10),
        "table.lora_embedding_B": drawn(4, RANK),
        **factors("attn", 12, 4),
        **factors("attn.base_layer.out_proj", 4, 4),
    }
    opened = open_checkpoint(adapter(tmp_path / "a", tensors))
    conv = torch.einsum("orxy,rihw->oihw", tensors["conv.lora_B.weight"], tensors["conv.lora_A.weight"])
    assert_close(opened["conv.weight"], 2 * conv)
    table = (tensors["table.lora_embedding_B"] @ tensors["table.lora_embedding_A"]).t()
    assert_close(opened["table.weight"], 2 * table)
    assert_close(opened["attn.in_proj_weight"], 2 * product(tensors, "attn"))
    # PEFT adds the output projection of nn.MultiheadAttention twice.
    assert_close(opened["attn.out_proj.weight"], 2 * 2 * product(tensors, "attn.base_layer.out_proj"))
    turned = open_checkpoint(adapter(tmp_path / "b", factors("net.0", 8, 5), fan_in_fan_out=True))
    assert turned.entries["net.0.weight"].shape == (5, 8)
    assert_close(turned["net.0.weight"], 2 * product(factors("net.0", 8, 5), "net.0").t())


def test_an_adapter_of_convolutions_is_merged_as_peft_computes(tmp_path):
    tensors = {"conv.lora_A.weight": drawn(RANK, 4, 3, 3), "conv.lora_B.weight": drawn(6, RANK, 1, 1, seed=1)}
    theta = {"conv.weight": drawn(6, 4, 3, 3, seed=2), "conv.bias": drawn(6, seed=3)}
    save_file(theta, tmp_path / "base.safetensors")
    path = adapter(tmp_path / "a", tensors)
    job = CheckpointMerge(tmp_path / "base.safetensors", models=[path, path], merger=WeightAverage())
    job.run(tmp_path / "out.safetensors")
    merged, images = load_file(tmp_path / "out.safetensors"), drawn(2, 4, 8, 8, seed=4)
    # As PEFT's layer runs: the base's convolution, and beside it that of A and then that of B.
    added = conv2d(conv2d(images, tensors["conv.lora_A.weight"], padding=1), tensors["conv.lora_B.weight"])
    expected = conv2d(images, theta["conv.weight"], theta["conv.bias"], padding=1) + 2 * added
    assert_close(conv2d(images, merged["conv.weight"], merged["conv.bias"], padding=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_pieces_have_the_bits_of_the_whole(tmp_path, fan_in_fan_out):
    tensors = factors("net.0", 700, 501)
    opened = open_checkpoint(adapter(tmp_path / "a", tensors, fan_in_fan_out=fan_in_fan_out))
    whole = opened["net.0.weight"].reshape(-1)
    for start, stop in ((0, 1), (0, len(whole)), (65_001, 65_003), (123_456, 300_000), (350_699, 350_700)):
        assert torch.equal(opened.tensor("net.0.weight", slice(start, stop)), whole[start:stop])


def merged_models(theta, folder):
    """Two adapters of different modules, and the whole models that they make."""
    first, second = factors("net.0", 8, 5), factors("net.0", 8, 5, seed=7) | factors("net.1", 6, 8, seed=9)
    paths = [adapter(folder / "first", first), adapter(folder / "second", second)]
    models = [dict(theta), dict(theta)]
    models[0]["net.0.weight"] = theta["net.0.weight"] + 2 * product(first, "net.0")
    models[1]["net.0.weight"] = theta["net.0.weight"] + 2 * product(second, "net.0")
    models[1]["net.1.weight"] = theta["net.1.weight"] + 2 * product(second, "net.1")
    return paths, models


@pytest.mark.parametrize(
    "merger", [MagMax(), TaskArithmetic(0.5), TIES(0.3, trim="tensor"), TIES(0.3)], ids=lambda merger: merger.label
)
def test_merging_adapters_is_merging_what_they_make(merger, base, theta, tmp_path):
    paths, models = merged_models(theta, tmp_path)
    whole = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for path, model in zip(whole, models, strict=True):
        save_file(model, path)
    job = CheckpointMerge(base, models=paths, merger=merger)
    assert job.policy.merged == ["net.0.weight", "net.1.weight"]
    assert "in no task vector: logit_scale, net.0.bias" in job.describe()
    assert not job.policy.problems
    job.run(tmp_path / "out.safetensors")
    include = ["net.0.weight", "net.1.weight"]
    CheckpointMerge(base, models=whole, merger=merger, include=include).run(tmp_path / "expected.safetensors")
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert_close(found, expected)
    assert not torch.equal(found["net.1.weight"], theta["net.1.weight"])
    assert verify(tmp_path / "out.safetensors")[0] == []


def test_an_adapter_beside_a_whole_model_is_zero_elsewhere(base, theta, models, tmp_path):
    paths, made = merged_models(theta, tmp_path)
    save_file(models[0], tmp_path / "whole.safetensors")
    save_file(made[0], tmp_path / "made.safetensors")
    for name, second in (("out", paths[0]), ("expected", tmp_path / "made.safetensors")):
        job = CheckpointMerge(
            base, models=[tmp_path / "whole.safetensors", second], merger=TaskArithmetic(0.5), strict=True
        )
        job.run(tmp_path / f"{name}.safetensors")
    assert_close(load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "expected.safetensors"))


def test_saved_modules_and_biases_are_weights(base, theta, tmp_path):
    bias, head = drawn(8, seed=3), drawn(6, 8, seed=4)
    tensors = factors("net.0", 8, 5) | {"net.0.base_layer.bias": bias, "net.1.weight": head}
    path = adapter(tmp_path / "a", tensors, bias="lora_only", modules_to_save=["net.1"])
    CheckpointMerge(base, models=[path], merger=TaskArithmetic(1.0)).run(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert_close(merged["net.0.bias"], bias)
    assert_close(merged["net.1.weight"], head)
    assert_close(merged["net.0.weight"], theta["net.0.weight"] + 2 * product(tensors, "net.0"))


def test_names_are_aligned_with_the_base(base, tmp_path):
    opened = open_checkpoint(adapter(tmp_path / "a", factors("model.net.0", 8, 5) | factors("model.net.1", 6, 8)))
    align_names(opened, open_checkpoint(base), "the base")
    assert opened.keys() == {"net.0.weight", "net.1.weight"}
    assert_close(opened["net.1.weight"], 2 * product(factors("net.1", 6, 8), "net.1"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"use_dora": True},
            r"got use_dora=True and no magnitude of '.*net\.0' in .*; merge it into its base with PEFT",
        ),
        ({"use_qalora": True}, r"got use_qalora=True in .*adapter_config\.json; merge it into its base with PEFT"),
        ({"target_parameters": ["w"]}, r"got target_parameters=\['w'\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "which moves the base too"),
        ({"peft_type": "IA3"}, "of peft_type 'IA3'"),
        ({"r": 5}, r"factors of rank 5, as adapter_config\.json says, got shapes \(8, 3\) and \(3, 5\) of .*net\.0'"),
    ],
)
def test_what_is_no_product_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(adapter(tmp_path / "a", factors("net.0", 8, 5), **config))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors("w", 2, 2) | {"w.lora_magnitude_vector": torch.ones(2)}, "got use_dora=False and a magnitude of"),
        (factors("w", 2, 2) | {"w.lora_arrow.weight": torch.ones(2)}, r"got .*w\.lora_arrow\.weight'; merge it"),
        (
            factors("w", 2, 2) | {"w.lora_B.bias": torch.ones(3)},
            r"a bias of 2 entries for .*w' in .*, got shape \(3,\)",
        ),
        ({"w.lora_B.weight": torch.ones(2, RANK)}, r"got .*w\.lora_B\.weight' without .*w\.lora_A\.weight'"),
        ({"w.lora_A.weight": torch.ones(RANK, 2)}, r"got .*w\.lora_A\.weight' without .*w\.lora_B\.weight'"),
        ({"w.weight": torch.ones(2)}, "expected LoRA factors"),
        ({"w.lora_A.weight": torch.ones(RANK, 2, 1), "w.lora_B.weight": torch.ones(4, 1, 1)}, "grouped convolutions"),
        ({"w.lora_A.weight": torch.ones(RANK, 2, 2), "w.lora_B.weight": torch.ones(4, RANK, 2)}, "factors of rank 3"),
        ({"w.lora_A.weight": torch.ones(()), "w.lora_B.weight": torch.ones(4)}, "factors of rank 3"),
    ],
)
def test_odd_tensors_are_refused(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(adapter(tmp_path / "a", tensors))


def test_a_missing_or_damaged_part_is_named(tmp_path):
    folder = adapter(tmp_path / "a", factors("net.0", 8, 5))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON, got .*adapter_config\.json"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_config\.json beside the adapter"):
        open_checkpoint(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="got neither in"):
        open_checkpoint(folder)


def dora(tensors, module, theta, magnitude, scale, *, turned=False):
    """The folded weight in float64, from the paper: magnitudes times the directions of the weight with its product."""
    a, b = (tensors[f"{module}.lora_{side}.weight"].double() for side in "AB")
    weight = (theta.double().t() if turned else theta.double()).flatten(1)
    weight = weight + scale * b.flatten(1) @ a.flatten(1)
    folded = magnitude.double()[:, None] * weight / weight.square().sum(dim=1, keepdim=True).sqrt()
    return folded.t() if turned else folded.reshape(theta.shape)


@pytest.mark.parametrize("turned", [False, True])
def test_dora_is_folded_with_the_norms_of_the_base(turned, tmp_path):
    tensors, magnitude = factors("net.0", 700, 501), drawn(700, seed=5).abs() + 0.1
    theta = drawn(501, 700, seed=6) if turned else drawn(700, 501, seed=6)
    save_file({"net.0.weight": theta}, tmp_path / "base.safetensors")
    stored = tensors | {"net.0.lora_magnitude_vector": magnitude}
    path = adapter(tmp_path / "a", stored, use_dora=True, fan_in_fan_out=turned)
    CheckpointMerge(tmp_path / "base.safetensors", models=[path], merger=TaskArithmetic(1.0)).run(
        tmp_path / "out.safetensors"
    )
    expected = dora(tensors, "net.0", theta, magnitude, 2.0, turned=turned)
    assert_close(load_file(tmp_path / "out.safetensors")["net.0.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    opened = open_checkpoint(path)
    assert "DoRA adapter of rank 3" in opened.kind
    with pytest.raises(ValueError, match=r"the base of .*adapter_model\.safetensors, whose DoRA .* got none"):
        opened["net.0.weight"]
    opened.attach(open_checkpoint(tmp_path / "base.safetensors"))
    whole = opened["net.0.weight"].reshape(-1)
    for start, stop in ((0, 1), (65_001, 65_003), (123_456, 300_000), (350_699, 350_700)):
        assert torch.equal(opened.tensor("net.0.weight", slice(start, stop)), whole[start:stop])


def test_dora_of_a_convolution_below_another_name(tmp_path):
    tensors = {"model.conv.lora_A.weight": drawn(RANK, 4, 3, 3), "model.conv.lora_B.weight": drawn(6, RANK, 1, 1)}
    magnitude, theta = drawn(1, 6, 1, 1, seed=1).abs(), drawn(6, 4, 3, 3, seed=2)
    save_file({"conv.weight": theta, "conv.bias": drawn(6)}, tmp_path / "base.safetensors")
    stored = tensors | {"model.conv.lora_magnitude_vector.weight": magnitude}
    path = adapter(tmp_path / "a", stored, use_dora=True)
    CheckpointMerge(tmp_path / "base.safetensors", models=[path], merger=TaskArithmetic(1.0)).run(
        tmp_path / "out.safetensors"
    )
    expected = dora(tensors, "model.conv", theta, magnitude.reshape(-1), 2.0)
    assert_close(load_file(tmp_path / "out.safetensors")["conv.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_factor_is_added_to_the_bias(base, theta, tmp_path):
    tensors = factors("net.0", 8, 5) | {"net.0.lora_B.bias": drawn(8, seed=4)}
    path = adapter(tmp_path / "a", tensors, lora_bias=True)
    job = CheckpointMerge(base, models=[path, path], merger=WeightAverage(), strict=True)
    job.run(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert_close(merged["net.0.bias"], theta["net.0.bias"] + 2 * drawn(8, seed=4))
    assert_close(merged["net.0.weight"], theta["net.0.weight"] + 2 * product(tensors, "net.0"))


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.point = torch.nn.Conv2d(4, 4, 1)
        self.fc = torch.nn.Linear(8, 6)
        self.wide = torch.nn.Linear(8, 10)
        self.head = torch.nn.Linear(6, 3)


@pytest.mark.peers
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_merge_and_unload(use_rslora, tmp_path):
    """What ``LoraModel.merge_and_unload`` gives, with patterns, biases, a saved module and every kind of layer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Tower()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["embed", "attn", "conv", "point", "fc", "wide"],
        rank_pattern={"fc": 4},
        alpha_pattern={"wide": 7, "attn": 5},
        use_rslora=use_rslora,
        modules_to_save=["head"],
        bias="lora_only",
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    CheckpointMerge(tmp_path / "base.pt", models=[tmp_path / "adapter"], merger=TaskArithmetic(1.0), strict=True).run(
        tmp_path / "out.safetensors"
    )
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == merged.keys()
    assert sum(not torch.equal(found[name], tensor) for name, tensor in torch.load(tmp_path / "base.pt").items()) == 14
    assert_close(found, dict(merged), rtol=0, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["dora", "lora_bias"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_merges_dora_and_biases_of_factors_alike(kind, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Tower()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    targets = ["embed", "conv", "point", "fc", "wide"] if kind == "dora" else ["conv", "fc", "wide"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=targets,
        use_dora=kind == "dora",
        lora_bias=kind == "lora_bias",
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    CheckpointMerge(tmp_path / "base.pt", models=[tmp_path / "adapter"], merger=TaskArithmetic(1.0), strict=True).run(
        tmp_path / "out.safetensors"
    )
    found = load_file(tmp_path / "out.safetensors")
    changed = sum(not torch.equal(found[name], tensor) for name, tensor in torch.load(tmp_path / "base.pt").items())
    assert changed == (5 if kind == "dora" else 6)
    assert_close(found, dict(merged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("saved", ["lora_head", "ia3_gate", "lora_A_probe"])
def test_a_saved_module_may_be_called_like_a_factor(saved, theta, tmp_path):
    head, bias = drawn(4, 8, seed=3), drawn(4, seed=4)
    tensors = factors("net.0", 8, 5) | {f"{saved}.weight": head, f"{saved}.bias": bias}
    path = adapter(tmp_path / "a", tensors, modules_to_save=[saved])
    whole = theta | {f"{saved}.weight": torch.zeros(4, 8), f"{saved}.bias": torch.zeros(4)}
    save_file(whole, tmp_path / "base.safetensors")
    job = CheckpointMerge(tmp_path / "base.safetensors", models=[path], merger=TaskArithmetic(1.0), strict=True)
    job.run(tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    assert_close(merged[f"{saved}.weight"], head)
    assert_close(merged[f"{saved}.bias"], bias)
    assert_close(merged["net.0.weight"], theta["net.0.weight"] + 2 * product(tensors, "net.0"))


def test_a_target_may_be_called_like_a_factor(tmp_path):
    tensors = factors("net.lora_proj", 8, 5) | {"net.lora_proj.base_layer.bias": drawn(8)}
    opened = open_checkpoint(adapter(tmp_path / "a", tensors, bias="lora_only"))
    assert_close(opened["net.lora_proj.weight"], 2 * product(tensors, "net.lora_proj"))
    assert_close(opened["net.lora_proj.bias"], drawn(8))


def test_a_whole_model_with_a_module_of_such_a_name_is_no_adapter(tmp_path):
    save_file({"body.weight": drawn(3, 3), "lora_head.weight": drawn(2, 3)}, tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path / "model.safetensors")
    assert not opened.is_task_vector
    assert opened.keys() == {"body.weight", "lora_head.weight"}
