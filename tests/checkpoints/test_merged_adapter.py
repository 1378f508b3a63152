"""One LoRA adapter out of several, against the merged weights in float64."""

import json

import numpy as np
import pytest
import torch
from checkpoints.test_adapter import Tower, adapter, drawn, factors
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import DARE, TIES, MagMax, TaskArithmetic, WeightAverage

BIG = {"net.0.weight": (30, 20), "net.0.bias": (30,), "deep.net.0.weight": (24, 30), "conv.weight": (16, 4, 3, 3)}


@pytest.fixture
def start(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file({name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(BIG.items())}, path)
    return path


@pytest.fixture
def two(tmp_path):
    """Adapters of other ranks, scales and targets."""
    first = factors("net.0", 30, 20) | factors("deep.net.0", 24, 30, rank=2, seed=3)
    second = factors("net.0", 30, 20, seed=7) | {
        "conv.lora_A.weight": drawn(3, 4, 3, 3, seed=9),
        "conv.lora_B.weight": drawn(16, 3, 1, 1, seed=10),
    }
    ranks = {"rank_pattern": {r"deep\.net\.0": 2}, "alpha_pattern": {r"deep\.net\.0": 7}}
    return [adapter(tmp_path / "a", first, **ranks), adapter(tmp_path / "b", second, use_rslora=True, lora_alpha=2)]


def merged_delta(start, models, merger, folder):
    """The dense merge's change of the weights."""
    CheckpointMerge(start, models=models, merger=merger, dtype="float64").run(folder / "dense.safetensors")
    base, found = load_file(start), load_file(folder / "dense.safetensors")
    return {name: found[name] - base[name].double() for name in found}


def nearest(delta, rank):
    """The nearest matrix of a rank, by numpy in float64."""
    u, s, vh = np.linalg.svd(delta.flatten(1).numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(delta.shape)


@pytest.mark.parametrize("merger", [TaskArithmetic(0.7), WeightAverage(), MagMax(), TIES(0.3), DARE(0.5)], ids=repr)
@pytest.mark.parametrize("rank", [1, 4, 6, 100])
def test_the_adapter_is_the_nearest_of_its_rank(merger, rank, start, two, tmp_path):
    delta = merged_delta(start, two, merger, tmp_path)
    job = CheckpointMerge(start, models=two, merger=merger, lora_rank=rank)
    job.run(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    found = open_checkpoint(tmp_path / "out")
    assert found.keys() == {"net.0.weight", "deep.net.0.weight", "conv.weight"}
    for name in found:
        expected = nearest(delta[name], rank)
        assert_close(found[name].double(), expected, rtol=1e-4, atol=2e-5)
        energy = float(expected.square().sum() / delta[name].square().sum())
        assert job.adapter.kept[name].share == pytest.approx(energy, abs=1e-5)
    assert verify(tmp_path / "out")[0] == []
    assert verify(tmp_path / "out" / "adapter_model.safetensors")[0] == []


@pytest.mark.parametrize("merger", [TaskArithmetic(0.7), WeightAverage()], ids=repr)
def test_linear_rules_are_exact_once_the_rank_is_the_sum(merger, start, two, tmp_path):
    delta = merged_delta(start, two, merger, tmp_path)
    job = CheckpointMerge(start, models=two, merger=merger, lora_rank=6)
    job.run(tmp_path / "out")
    for name, tensor in open_checkpoint(tmp_path / "out").items():
        assert_close(tensor.double(), delta[name], rtol=1e-5, atol=1e-5)
        assert job.adapter.kept[name].share == 1.0
    # The decomposed matrices are those of the factors, and their padding is zero.
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored["base_model.model.deep.net.0.lora_A.weight"].shape == (6, 30)
    assert not stored["base_model.model.deep.net.0.lora_A.weight"][2:].any()


def test_patterns_do_not_reach_modules_with_longer_names(start, tmp_path):
    save_file({"net.0.weight": drawn(2, 20), "deep.net.0.weight": drawn(24, 30)}, start)
    path = adapter(tmp_path / "a", factors("net.0", 2, 20, rank=1) | factors("deep.net.0", 24, 30, rank=1), r=1)
    CheckpointMerge(start, models=[path], merger=TaskArithmetic(1.0), lora_rank=5).run(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] | {"r": config["r"]} in ({"r": 2, r"^deep\.net\.0": 5}, {"r": 5, r"^net\.0": 2})
    assert_close(dict(open_checkpoint(tmp_path / "out")), dict(open_checkpoint(path)), rtol=1e-4, atol=1e-5)


def test_layouts_that_peft_has(tmp_path):
    tensors = {
        "table.lora_embedding_A": drawn(3, 10),
        "table.lora_embedding_B": drawn(6, 3),
        **factors("attn", 12, 4),
        **factors("attn.base_layer.out_proj", 4, 4),
        "attn.base_layer.out_proj.bias": drawn(4),
        "head.weight": drawn(3, 4),
        "head.bias": drawn(3),
    }
    base = {
        "table.weight": drawn(10, 6),
        "attn.in_proj_weight": drawn(12, 4),
        "attn.out_proj.weight": drawn(4, 4),
        "attn.out_proj.bias": drawn(4),
        "head.weight": drawn(3, 4, seed=5),
        "head.bias": drawn(3, seed=6),
    }
    save_file(base, tmp_path / "base.safetensors")
    path = adapter(tmp_path / "a", tensors, bias="lora_only", modules_to_save=["head"], task_type="X")
    job = CheckpointMerge(tmp_path / "base.safetensors", models=[path], merger=TaskArithmetic(1.0), lora_rank=4)
    job.run(tmp_path / "out")
    found, expected = open_checkpoint(tmp_path / "out"), open_checkpoint(path)
    assert_close(dict(found), dict(expected), rtol=1e-4, atol=1e-5)
    assert {name: found.is_difference(name) for name in found} == {
        name: expected.is_difference(name) for name in expected
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    assert (config["bias"], config["task_type"], config["fan_in_fan_out"]) == ("lora_only", "X", False)
    assert set(config["target_modules"].split("|")) == {"table", "attn"}
    turned = adapter(tmp_path / "b", factors("table", 6, 10), fan_in_fan_out=True)
    CheckpointMerge(tmp_path / "base.safetensors", models=[turned], merger=TaskArithmetic(1.0), lora_rank=3).run(
        tmp_path / "t"
    )
    assert_close(dict(open_checkpoint(tmp_path / "t")), dict(open_checkpoint(turned)), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "t" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_dora_and_biases_of_factors_become_plain_lora(base, theta, tmp_path):
    tensors = factors("net.0", 8, 5) | {"net.0.lora_magnitude_vector": drawn(8, seed=4).abs() + 1}
    other = factors("net.0", 8, 5, seed=8) | {"net.0.lora_B.bias": drawn(8, seed=4)}
    models = [adapter(tmp_path / "a", tensors, use_dora=True), adapter(tmp_path / "b", other, lora_bias=True)]
    delta = merged_delta(base, models, WeightAverage(), tmp_path)
    CheckpointMerge(base, models=models, merger=WeightAverage(), lora_rank=5).run(tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert_close(found["net.0.weight"].double(), delta["net.0.weight"], rtol=1e-4, atol=1e-5)
    assert_close(found["net.0.bias"].double(), theta["net.0.bias"].double() + delta["net.0.bias"], rtol=1e-5, atol=1e-6)
    assert "use_dora" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())


def test_the_dtype_is_the_widest_of_the_factors(base, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in factors("net.0", 8, 5).items()}
    models = [adapter(tmp_path / "a", half), adapter(tmp_path / "b", half)]
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        job = CheckpointMerge(base, models=models, merger=WeightAverage(), lora_rank=3, dtype=dtype)
        assert {entry.dtype for entry in job.entries.values()} == {expected}
    models[1] = adapter(tmp_path / "b", factors("net.0", 8, 5))
    job = CheckpointMerge(base, models=models, merger=WeightAverage(), lora_rank=3)
    assert {entry.dtype for entry in job.entries.values()} == {torch.float32}


def test_kohya_adapters_become_one_of_peft(base, tmp_path):
    tensors = {"lora_te_net_0.lora_down.weight": drawn(3, 5), "lora_te_net_0.lora_up.weight": drawn(8, 3)}
    save_file(tensors, tmp_path / "lora.safetensors")
    job = CheckpointMerge(base, models=[tmp_path / "lora.safetensors"], merger=TaskArithmetic(1.0), lora_rank=3)
    job.run(tmp_path / "out")
    assert_close(open_checkpoint(tmp_path / "out")["net.0.weight"], drawn(8, 3) @ drawn(3, 5), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_one_adapter_is_refused(base, theta, tmp_path):
    path = adapter(tmp_path / "a", factors("net.0", 8, 5) | {"net.1.weight": drawn(6, 8)}, modules_to_save=["net.1"])
    save_file(theta, tmp_path / "whole.safetensors")
    for options, message in (
        ({"lora_rank": 0}, "expected --lora-rank of at least 1, got 0"),
        ({"models": [path, tmp_path / "whole.safetensors"]}, r"got .*whole\.safetensors \(safetensors\); leave"),
        ({"origin": "zero"}, "got --origin zero"),
        ({"buffers": "latest"}, "got --buffers latest"),
        ({"include": ["net.1.*"]}, "expected a merged matrix with factors for --lora-rank, got none"),
    ):
        arguments = {"models": [path], "merger": MagMax(), "lora_rank": 2} | options
        with pytest.raises(ValueError, match=message):
            CheckpointMerge(base, **arguments)
    job = CheckpointMerge(base, models=[path], merger=MagMax(), lora_rank=2)
    with pytest.raises(ValueError, match="leave --shard-size out"):
        job.run(tmp_path / "out", shard_bytes=100)
    with pytest.raises(ValueError, match="expected a folder to write to"):
        job.run(tmp_path / "out.safetensors")


def test_the_command(start, two, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["merge", "--base", str(start), "--models", *map(str, two), "--merger", "TIES", "--lora-rank", "2"]
    assert main([*command, "--dry-run"]) == 0
    assert "an adapter of PEFT" in capsys.readouterr().out
    assert main([*command, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "% of the energy of 3 matrices, least" in printed
    assert main(["merge", "--verify", out]) == 0
    assert main([*command, "--out", out]) == 1
    assert "adapter_config.json, which exists" in capsys.readouterr().err
    assert main([*command, "--out", out, "--overwrite"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert main(["merge", "--verify", out]) == 1
    capsys.readouterr()


@pytest.mark.peers
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_loads_the_adapter(use_rslora, tmp_path):
    """The model that PEFT makes of our adapter is the dense merge of the adapters that PEFT made."""
    peft = pytest.importorskip("peft")
    paths = []
    for seed in range(2):
        torch.manual_seed(0)
        model = Tower()
        torch.save(model.state_dict(), tmp_path / "base.pt")
        config = peft.LoraConfig(
            r=1 + seed,
            lora_alpha=3,
            target_modules=["embed", "attn", "conv", "point", "fc", "wide"],
            rank_pattern={"fc": 3},
            use_rslora=use_rslora,
            modules_to_save=["head"],
            bias="lora_only",
            init_lora_weights=False,
        )
        torch.manual_seed(seed + 1)
        tuned = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        tuned.save_pretrained(tmp_path / f"adapter{seed}")
        paths.append(tmp_path / f"adapter{seed}")
    CheckpointMerge(tmp_path / "base.pt", models=paths, merger=WeightAverage()).run(tmp_path / "dense.safetensors")
    CheckpointMerge(tmp_path / "base.pt", models=paths, merger=WeightAverage(), lora_rank=8).run(tmp_path / "out")
    model = Tower()
    model.load_state_dict(torch.load(tmp_path / "base.pt"))
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    assert_close(dict(merged), load_file(tmp_path / "dense.safetensors"), rtol=0, atol=1e-5)
