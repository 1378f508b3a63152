"""LoRA adapters in the layouts of kohya's scripts and of diffusers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.merging import TaskArithmetic

RANK = 2
TOWER = "text_model.encoder.layers.{}.{}"
MODULES = [TOWER.format(layer, module) for layer in (0, 11) for module in ("self_attn.q_proj", "mlp.fc1")]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def theta():
    found = {f"{module}.weight": drawn(6, 4, seed=seed) for seed, module in enumerate(MODULES, start=50)}
    return found | {f"{module}.bias": torch.zeros(6) for module in MODULES} | {"text_projection.weight": drawn(4, 4)}


def layers(spell, seed=0, modules=MODULES):
    """Factors by names, and the products by modules."""
    tensors, products = {}, {}
    for index, module in enumerate(modules):
        down, up = drawn(RANK, 4, seed=seed + 2 * index), drawn(6, RANK, seed=seed + 2 * index + 1)
        names = spell(module)
        tensors |= {names[0]: down, names[1]: up}
        products[f"{module}.weight"] = up @ down
    return tensors, products


def kohya(part):
    def spell(module):
        flat = f"{part}_{module.replace('.', '_')}"
        return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"

    return spell


def diffusers(prefix, end="lora_linear_layer"):
    return lambda module: (f"{prefix}{module}.{end}.down.weight", f"{prefix}{module}.{end}.up.weight")


def attention(module):
    """The names of processors, for the modules of attention; a layer's for the others."""
    if not module.endswith("q_proj"):
        return diffusers("text_encoder.")(module)
    owner = module.removesuffix(".q_proj")
    return f"text_encoder.{owner}.to_q_lora.down.weight", f"text_encoder.{owner}.to_q_lora.up.weight"


def merged(theta, folder, tensors, **options):
    prefix = options.pop("prefix", "")
    base = {f"{prefix}{name}": tensor for name, tensor in theta.items()}
    save_file(base, folder / "base.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "lora.safetensors")
    job = CheckpointMerge(
        folder / "base.safetensors", models=[folder / "lora.safetensors"], merger=TaskArithmetic(1.0), **options
    )
    job.run(folder / "out.safetensors")
    assert verify(folder / "out.safetensors")[0] == []
    return job, load_file(folder / "out.safetensors")


def check(found, theta, products, scale, prefix=""):
    for name, start in theta.items():
        expected = start + scale * products[name] if name in products else start
        assert_close(found[prefix + name], expected)


@pytest.mark.parametrize("prefix", ["", "clip."])
def test_kohya_with_alphas(theta, tmp_path, prefix):
    tensors, products = layers(kohya("lora_te"))
    tensors |= {name.replace("lora_up.weight", "alpha"): torch.tensor(3.0) for name in tensors if "lora_up" in name}
    job, found = merged(theta, tmp_path, tensors, prefix=prefix)
    check(found, theta, products, 3 / RANK, prefix)
    assert "LoRA of kohya of rank 2, under 'lora_te'" in job.describe()


def test_the_tower_may_be_saved_alone(theta, tmp_path):
    tensors, products = layers(kohya("lora_te"))
    alone = {name.removeprefix("text_model."): tensor for name, tensor in theta.items()}
    _, found = merged(alone, tmp_path, tensors)
    check(found, alone, {name.removeprefix("text_model."): one for name, one in products.items()}, 1.0)


@pytest.mark.parametrize(
    "spell", [diffusers("text_encoder."), diffusers("text_encoder.", "lora"), diffusers(""), attention]
)
def test_diffusers(theta, tmp_path, spell):
    tensors, products = layers(spell)
    _, found = merged(theta, tmp_path, tensors)
    check(found, theta, products, 1.0)


def test_the_processors_of_an_attention(tmp_path):
    tensors = {}
    for which in ("q", "out"):
        tensors[f"unet.mid.attn1.processor.to_{which}_lora.down.weight"] = drawn(RANK, 4)
        tensors[f"unet.mid.attn1.processor.to_{which}_lora.up.weight"] = drawn(4, RANK)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert open_checkpoint(tmp_path / "lora.safetensors").keys() == {
        "mid.attn1.to_q.weight",
        "mid.attn1.to_out.0.weight",
    }


def test_the_tower_is_read_and_not_what_generates(theta, tmp_path):
    tensors, products = layers(kohya("lora_te"))
    tensors |= layers(kohya("lora_unet"), seed=30, modules=["down_blocks.0.attn1.to_q"])[0]
    job, found = merged(theta, tmp_path, tensors)
    check(found, theta, products, 1.0)
    assert "under 'lora_te' (there are also 'lora_unet')" in job.describe()
    assert not job.policy.problems


def test_one_of_two_towers_is_chosen(theta, tmp_path):
    first, second = (layers(kohya(f"lora_te{number}"), seed=20 * number) for number in (1, 2))
    with pytest.raises(ValueError, match=r"got lora_te1, lora_te2; choose one with --weights lora_te1"):
        merged(theta, tmp_path, first[0] | second[0])
    _, found = merged(theta, tmp_path, first[0] | second[0], weights="lora_te2")
    check(found, theta, second[1], 1.0)


def test_configurations_in_the_header(theta, tmp_path):
    tensors = {}
    for module in MODULES:
        tensors[f"text_encoder.{module}.lora_A.weight"] = drawn(RANK, 4)
        tensors[f"text_encoder.{module}.lora_B.weight"] = drawn(6, RANK)
    tensors["unet.mid.to_q.lora_A.weight"], tensors["unet.mid.to_q.lora_B.weight"] = drawn(3, 4), drawn(4, 3)
    settings = {"text_encoder.r": RANK, "text_encoder.lora_alpha": 5, "unet.r": 3, "unet.lora_alpha": 3}
    save_file(theta, tmp_path / "base.safetensors")
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
    CheckpointMerge(tmp_path / "base.safetensors", models=[path], merger=TaskArithmetic(1.0)).run(
        tmp_path / "out.safetensors"
    )
    product = drawn(6, RANK) @ drawn(RANK, 4)
    check(load_file(tmp_path / "out.safetensors"), theta, {f"{one}.weight": product for one in MODULES}, 5 / RANK)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"expected adapter_config\.json beside the adapter"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_te_a.dora_scale": torch.ones(1)}, "got 'lora_te_a.dora_scale' among them, which is no plain LoRA"),
        ({"lora_te_b.lora_up.weight": torch.ones(3, 2)}, r"got 'lora_te_b\.lora_up\.weight' without lora_down"),
        ({"lora_te_a.lora_up.weight": torch.ones(3, 5)}, r"multiplied in .*, got shapes \(3, 5\) and \(2, 4\) of 'a'"),
        ({"lora_te_a.alpha": torch.ones(2)}, r"expected a number for 'lora_te_a\.alpha'"),
        ({"lora_te_a.alpha": torch.tensor(float("nan"))}, r"expected a number for 'lora_te_a\.alpha'"),
    ],
)
def test_odd_files_are_refused(change, message, tmp_path):
    tensors = {"lora_te_a.lora_down.weight": torch.ones(2, 4), "lora_te_a.lora_up.weight": torch.ones(3, 2)}
    save_file(tensors | change, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "lora.safetensors")


def test_names_that_fit_nowhere_or_twice_are_refused(theta, tmp_path):
    tensors, _ = layers(kohya("lora_te"))
    with pytest.raises(ValueError, match=r"expected modules of .*base\.safetensors in .*, got none that fits"):
        merged({"conv.weight": torch.ones(2, 2)}, tmp_path, tensors)
    twice = {f"{side}.{name}": tensor.clone() for side in ("a", "b") for name, tensor in theta.items()}
    with pytest.raises(ValueError, match=r"expected one part of .* as well as"):
        merged(twice, tmp_path, tensors)
