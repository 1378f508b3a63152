import pytest
import torch
from safetensors.torch import load_file, save_file

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.cli import main
from clmerge.merging import MagMax


def merged(base, models, folder, **options):
    """Merge states given by their names; return what is written."""
    for name, state in {"base": base, **{f"model_{index}": model for index, model in enumerate(models)}}.items():
        torch.save(state, folder / f"{name}.pt")
    paths = [folder / f"model_{index}.pt" for index in range(len(models))]
    job = CheckpointMerge(folder / "base.pt", models=paths, merger=MagMax(), **options)
    job.run(folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), job


def spelled(state, pattern):
    """Put a wrapper into names: ``{}`` is the whole name, ``{0}.{1}`` its first part and the rest."""
    whole = (pattern.format(*name.split(".", 1)) if "." in name else None for name in state)
    if "{}" in pattern:
        whole = (pattern.format(name) for name in state)
    return {new or name: tensor for new, (name, tensor) in zip(whole, state.items(), strict=True)}


SPELLINGS = [
    "module.{}",
    "_orig_mod.module.{}",
    "module._orig_mod.{}",
    "model._orig_mod.{}",
    "model.module.{}",
    "_forward_module.model.{}",
    "_fsdp_wrapped_module.{}",
    "model._fsdp_wrapped_module.{}",
    "backbone.model.{}",
    "{0}.module.{1}",
    "{0}._orig_mod.{1}",
    "{0}._fsdp_wrapped_module._checkpoint_wrapped_module.{1}",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_wrapped_model_is_merged(spelling, theta, models, tmp_path):
    expected, _ = merged(theta, models, tmp_path)
    found, job = merged(theta, [spelled(model, spelling) for model in models], tmp_path, strict=True)
    assert not job.policy.problems
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(found["net.0.weight"], theta["net.0.weight"])
    assert ("without" in job.describe()) or spelling == "{0}.module.{1}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_wrapped_base_is_merged(spelling, theta, models, tmp_path):
    expected, _ = merged(theta, models, tmp_path)
    found, job = merged(spelled(theta, spelling), models, tmp_path, strict=True)
    assert not job.policy.problems
    names = open_checkpoint(tmp_path / "base.pt").keys()
    assert found.keys() == names
    for name, tensor in zip(sorted(names), (expected[name] for name in sorted(expected)), strict=True):
        assert torch.equal(found[name], tensor)


def test_a_part_of_a_network_that_is_called_module_keeps_its_name(theta, models, tmp_path):
    def around(state):
        return {f"module.{name}" if index % 2 else name: tensor for index, (name, tensor) in enumerate(state.items())}

    found, _ = merged(around(theta), [around(model) for model in models], tmp_path, strict=True)
    assert found.keys() == around(theta).keys()


def test_names_that_would_fall_together_stay(theta, tmp_path):
    both = {"w": torch.ones(2), "_orig_mod.w": torch.zeros(2), "module.w": torch.full((2,), 2.0)}
    save_file(both, tmp_path / "both.safetensors")
    assert open_checkpoint(tmp_path / "both.safetensors").keys() == both.keys()


def test_one_name_in_common_does_not_hide_a_prefix(theta, models, tmp_path):
    # A LightningModule with a scale of its own beside the network that has one, too.
    models = [{f"model.{name}": value for name, value in model.items()} for model in models]
    expected, _ = merged(theta, [{k.removeprefix("model."): v for k, v in model.items()} for model in models], tmp_path)
    outer = [model | {"logit_scale": torch.tensor(9.0), "head.bias": torch.ones(3)} for model in models]
    found, job = merged(theta, outer, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    row = job.policy.problems[0]
    assert row.names == ["logit_scale", "head.bias"]
    assert row.reason.startswith("not in the base")


def test_two_sets_of_weights_in_one_file_are_not_chosen_between(theta, models, tmp_path):
    both = [
        {f"{prefix}.{name}": value + shift for prefix, shift in (("model", 0), ("ema", 1)) for name, value in m.items()}
        for m in models
    ]
    with pytest.raises(ValueError, match=r"different ones below 'ema\.' and 'model\.'|below 'model\.' and 'ema\.'"):
        merged(theta, both, tmp_path)
    same = [{f"{prefix}.{name}": value for prefix in ("net", "encoder") for name, value in m.items()} for m in models]
    found, _ = merged(theta, same, tmp_path)
    expected, _ = merged(theta, models, tmp_path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def clip_like(seed, context=17):
    """Return a model of an image and a text tower of one width, whose blocks have the same names."""
    generator = torch.Generator().manual_seed(seed)
    block = {"attn.weight": (12, 4), "attn.bias": (12,), "mlp.weight": (4, 4)}
    shapes = {f"transformer.resblocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    text = {"positional_embedding": (context, 4), **shapes, "token_embedding.weight": (9, 4), "logit_scale": ()}
    image = {"positional_embedding": (17, 4), **shapes, "conv1.weight": (4, 3, 2, 2), "class_embedding": (4,)}
    shapes = {**text, **{f"visual.{name}": shape for name, shape in image.items()}}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("context", [17, 10])
@pytest.mark.parametrize("prefix", ["backbone.", "model.backbone.", ""])
@pytest.mark.parametrize("beside", [{}, {"logit_scale": torch.tensor(9.0), "head.bias": torch.ones(3)}])
def test_an_image_tower_is_not_taken_for_the_text_tower(beside, prefix, context, tmp_path):
    base, tuned = clip_like(0, context), clip_like(1, context)
    tower = {prefix + k.removeprefix("visual."): v for k, v in tuned.items() if k.startswith("visual.")}
    found, job = merged(base, [tower | beside], tmp_path)
    assert "below 'visual.'" in job.describe()
    for name, tensor in base.items():
        is_taken = name.startswith("visual.") or (prefix and name in beside)
        model = beside.get(name, tuned[name]) if is_taken else tensor
        torch.testing.assert_close(found[name], (tensor + model) / 2)


def test_what_is_beside_a_tower_keeps_its_name(tmp_path):
    base, tuned = clip_like(0), clip_like(1)
    del tuned["token_embedding.weight"]
    found, _ = merged(base, [{name.replace("visual", "image_encoder"): v for name, v in tuned.items()}], tmp_path)
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], (tensor + tuned.get(name, tensor)) / 2)


def test_blocks_that_fit_both_towers_are_refused_and_fit_by_their_whole_names(tmp_path):
    base, tuned = clip_like(0), clip_like(1)
    blocks = {name: tensor for name, tensor in tuned.items() if name.startswith("visual.transformer.")}
    short = {f"backbone.{name.removeprefix('visual.')}": tensor for name, tensor in blocks.items()}
    with pytest.raises(ValueError, match=r"'backbone\.(transformer\.\S+)' for '\1' as well as \S+ for 'visual\.\1'"):
        merged(base, [short], tmp_path)
    found, _ = merged(base, [blocks], tmp_path)
    assert {name for name in base if not torch.equal(found[name], base[name])} == blocks.keys()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("foreign", ["names", "shapes", "scalar"])
def test_a_run_where_almost_nothing_matches_is_an_error(foreign, order, theta, models, tmp_path, capsys):
    if foreign == "names":
        models[1] = {name.replace("net.", "encoder.layer_"): value for name, value in models[1].items()}
    elif foreign == "shapes":
        models[1] = {name: torch.ones(3, *value.shape) for name, value in models[1].items()}
    else:
        models[1] = {
            "logit_scale": models[1]["logit_scale"],
            "conv.weight": torch.ones(8, 8),
            "conv.bias": theta["net.0.bias"],
        }
    paths = [tmp_path / f"{index}.pt" for index in range(2)]
    for path, model in zip(paths, models, strict=False):
        torch.save(model, path)
    save_file(theta, tmp_path / "base.safetensors")
    inputs = [str(path) for path in (paths if order else reversed(paths))]
    out = tmp_path / "out.safetensors"
    command = ["merge", "--base", str(tmp_path / "base.safetensors"), "--models", *inputs, "--merger", "MagMax"]
    assert main([*command, "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert f"got {paths[1]}" in message
    assert "'net.0.weight'" in message
    assert repr(next(iter(models[1]))) in message
    assert not out.exists()


def test_models_that_share_almost_nothing_with_each_other_are_an_error(theta, models, tmp_path):
    halves = [dict(list(models[0].items())[:1]), dict(list(models[1].items())[2:])]
    both = [half | {"logit_scale": theta["logit_scale"]} for half in halves]
    with pytest.raises(ValueError, match="and every model have, got 1 of them"):
        merged(theta, both, tmp_path)


def test_what_is_meant_to_differ_may_be_left_out(theta, models, tmp_path):
    models = [model | {"net.1.weight": torch.ones(4000, 8)} for model in models]
    theta["net.1.weight"] = torch.ones(3000, 8)
    with pytest.raises(ValueError, match="leave out with --exclude what is meant to differ"):
        merged(theta, models, tmp_path)
    found, _ = merged(theta, models, tmp_path, exclude=["net.1.*"])
    assert not torch.equal(found["net.0.weight"], theta["net.0.weight"])
