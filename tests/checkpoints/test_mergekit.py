import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from clmerge.checkpoints.mergekit import from_mergekit, is_mergekit
from clmerge.checkpoints.mergekit_rules import METHODS
from clmerge.cli import main

SHAPES = {f"model.layers.{index}.{kind}.weight": (8, 12) for index in range(3) for kind in ("self_attn", "mlp")}
SHAPES |= {"model.embed.weight": (16, 8), "model.norm.weight": (40,)}


@pytest.fixture
def states():
    """A base and three models that have something in common."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base, shared = draw(), draw()
    return [base] + [{n: base[n] + 0.1 * t + 0.1 * shared[n] for n, t in draw().items()} for _ in range(3)]


@pytest.fixture
def files(states, tmp_path):
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b", "c")]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    return paths


def recipe(files, method, each, *, base=True, **more):
    """A recipe as in mergekit's documentation; ``each`` has the parameters of every model."""
    models = [{"model": path, "parameters": one} for path, one in zip(files[1:], each, strict=False)]
    return {"merge_method": method, "models": models} | ({"base_model": files[0]} if base else {}) | more


def by_filters(filters, tensor, depth=0.0):
    """What mergekit's documentation says of filters and gradients, for these tensors."""
    for one in filters:
        if one.get("filter") in (None, "*") or one["filter"] in tensor:
            value = one["value"]
            if isinstance(value, list):
                position = depth * (len(value) - 1)
                low = min(int(position), len(value) - 2)
                return value[low] + (position - low) * (value[low + 1] - value[low])
            return value
    raise AssertionError(tensor)


def merged(content, tmp_path, *more):
    """Merge by a recipe, from the command line."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "out.safetensors"
    assert main(["merge", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out), "--overwrite", *more]) == 0
    return load_file(out)


WEIGHTS = [{"weight": 0.5}, {"weight": 2.0}, {"weight": 1.5}]
DENSITIES = [{"weight": 1, "density": 0.25}, {"weight": 1, "density": 0.5}, {"weight": 1, "density": 1.0}]
BOTH = [{"weight": 0.5, "density": 0.25}, {"weight": 2, "density": 0.5}, {"weight": 1, "density": 1.0}]
CRUMBS = [{"weight": 0.5, "density": 0.375, "gamma": 0.125}] * 3


@pytest.mark.peers
@pytest.mark.parametrize(
    ("method", "each", "whole"),
    [
        ("linear", WEIGHTS, {}),
        ("linear", WEIGHTS, {"normalize": False}),
        ("task_arithmetic", WEIGHTS, {"lambda": 0.4}),
        ("task_arithmetic", WEIGHTS, {"normalize": True}),
        ("ties", [{"weight": 0.7, "density": 0.2}] * 3, {"lambda": 0.8}),
        ("ties", [{"weight": 0.7, "density": 0.2}] * 3, {"normalize": False}),
        ("ties", DENSITIES, {"int8_mask": True}),
        ("ties", BOTH, {}),
        ("ties", BOTH, {"normalize": False, "lambda": 1.5}),
        ("dare_ties", WEIGHTS, {}),
        ("dare_linear", WEIGHTS, {"normalize": True}),
        ("breadcrumbs", CRUMBS, {"lambda": 0.6}),
        ("breadcrumbs_ties", CRUMBS, {}),
        ("della", WEIGHTS, {"lambda": 1.1}),
        ("della_linear", WEIGHTS, {}),
        ("model_stock", [{}] * 3, {}),
        ("nuslerp", [{"weight": 1.0}, {"weight": 3.0}], {}),
    ],
)
def test_numbers_of_mergekit(method, each, whole, files, states, tmp_path):
    """Random methods are compared at a density of 1, where nothing is dropped; test_peers.py compares their masks."""
    mergekit = pytest.importorskip("mergekit.merge_methods")
    base = method != "linear"
    ours = merged(recipe(files, method, each, base=base, parameters=whole), tmp_path)
    models = {index: state for index, state in enumerate(states[1 : 1 + len(each)])}
    given = {key: {index: one[key] for index, one in enumerate(each)} for key in each[0]}
    theirs = mergekit.merge_state_dicts(
        models | ({"base": states[0]} if base else {}),
        method,
        base="base" if base else None,
        parameters=given | whole,
    )
    assert_close(ours, theirs, rtol=0, atol=1e-5 if "stock" in method else 2e-6)


FILTERS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]


@pytest.mark.peers
def test_slerp_with_filters_and_gradients_is_that_of_mergekit(files, states, tmp_path):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    sources = [{"model": path, "layer_range": [0, 3]} for path in (files[1], files[0])]
    content = {
        "merge_method": "slerp",
        "base_model": files[0],
        "slices": [{"sources": sources}],
        "parameters": {"t": FILTERS},
    }
    ours = merged(content, tmp_path)
    for name in SHAPES:
        depth = int(name.split(".")[2]) / 2 if "layers" in name else 0
        theirs = mergekit.merge_state_dicts(
            {"base": {name: states[0][name]}, "a": {name: states[1][name]}},
            "slerp",
            base="base",
            parameters={"t": by_filters(FILTERS, name, depth)},
        )
        assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)


@pytest.mark.peers
def test_every_method_that_is_read_is_one_of_mergekit():
    pytest.importorskip("mergekit.merge_methods")
    from mergekit.merge_methods.registry import get

    for name, method in METHODS.items():
        known = {parameter.name: parameter for parameter in get(name).spec.parameters}
        ours = dict(method.shared) | dict(method.defaults)
        assert {key: None if known[key].required else known[key].default for key in ours} == ours, name


def test_settings_of_a_model_come_before_those_of_the_whole(files):
    content = recipe(files, "task_arithmetic", [{"weight": 2}, {}, {}], parameters={"weight": 0.5, "lambda": "1e-1"})
    options = from_mergekit(content)
    assert options == {
        "base": files[0],
        "models": files[1:],
        "merger": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.1, "weights": [2.0, 0.5, 0.5]}},
        "groups": [],
        "origin": "base",
        "dtype": None,
    }
    assert is_mergekit(content)
    assert not is_mergekit(options)


def test_filters_make_groups(files):
    weight = [{"filter": "mlp", "value": [0, 1]}, {"filter": "embed", "value": 9.0}]
    each = [{"weight": weight}, {"weight": 1.0}, {"weight": 1.0}]
    options = from_mergekit(recipe(files, "task_arithmetic", each, parameters={"weight": 3.0}))
    assert options["merger"]["init_args"]["weights"] == [3.0, 1.0, 1.0]
    found = {name: group["merger"]["init_args"]["weights"][0] for group in options["groups"] for name in group["match"]}
    mlp = {f"model.layers.{index}.mlp.weight": index / 2 for index in range(3)}
    assert found == mlp | {"model.embed.weight": 9.0}


def test_densities_and_random_rules(files):
    def sparsifier(method, density, **more):
        options = from_mergekit(recipe(files, method, [{"weight": 1.0, "density": density} | more] * 3))
        return options["merger"]["init_args"]["sparsifier"]

    assert sparsifier("dare_ties", 0.9)["init_args"] == {"drop_rate": 0.1, "rescale": "l1"}
    assert sparsifier("della", 0.9, epsilon=0.05)["init_args"] == {"drop_rate": 0.1, "window": 0.1, "rescale": "l1"}
    assert sparsifier("breadcrumbs", 0.9)["init_args"] == {"beta": 0.09, "gamma": 0.01}
    assert sparsifier("breadcrumbs", 1.0)["init_args"] == {"beta": 0.0, "gamma": 0.0}
    each = [{"weight": 1.0, "density": density} for density in (0.1, 0.2, 0.2)]
    parts = from_mergekit(recipe(files, "dare_linear", each))["merger"]["init_args"]["sparsifier"]["init_args"]["parts"]
    assert [part["init_args"]["drop_rate"] for part in parts] == [0.9, 0.8, 0.8]


def test_the_dtype_is_that_of_the_recipe(files, states, tmp_path):
    plain = merged(recipe(files, "task_arithmetic", WEIGHTS), tmp_path)
    half = merged(recipe(files, "task_arithmetic", WEIGHTS, dtype="float32", out_dtype="bfloat16"), tmp_path)
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in plain.items())
    assert main(["merge", "--verify", str(tmp_path / "out.safetensors")]) == 0


def test_an_adapter_is_given_beside_its_base(files, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    factors = {"A": torch.randn(2, 12), "B": torch.randn(8, 2)}
    name = "base_model.model.model.layers.1.mlp.lora_{}.weight"
    save_file({name.format(side): tensor for side, tensor in factors.items()}, folder / "adapter_model.safetensors")
    content = recipe(files, "task_arithmetic", WEIGHTS)
    content["models"] = [{"model": f"{files[0]}+{folder}", "parameters": {"weight": 1.0}}]
    tuned = "model.layers.1.mlp.weight"
    assert_close(merged(content, tmp_path)[tuned], load_file(files[0])[tuned] + factors["B"] @ factors["A"])
    content["models"][0]["model"] = f"{files[1]}+{folder}"
    with pytest.raises(ValueError, match="expected an adapter to the base model"):
        from_mergekit(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "sce"}, "expected a merge_method of linear, .*, got 'sce'"),
        ({"tokenizer_source": "union"}, "got 'tokenizer_source', which is not read"),
        ({"parameters": {"weight": 1.0, "rescale": True}}, "got 'rescale', which is not read"),
        ({"base_model": None}, "expected a base_model"),
        ({"models": []}, "expected models in the recipe, got none"),
        ({"models": [{"model": {"model": {"path": "x"}}}]}, "expected a model as a path"),
        ({"merge_method": "model_stock", "parameters": {"filter_wise": True}}, "got 'filter_wise'"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "expected 2 models, got 4"),
        ({"parameters": {}}, "expected weight for 'model.embed.weight', got none"),
    ],
)
def test_what_is_not_read_is_named(change, message, files):
    content = recipe(files, "task_arithmetic", [{}] * 3, parameters={"weight": 1.0}) | change
    with pytest.raises(ValueError, match=message):
        from_mergekit(content)


def test_slices_other_than_all_layers_are_refused(files):
    sources = [{"model": path, "layer_range": [0, 2]} for path in files[:2]]
    content = {
        "merge_method": "slerp",
        "base_model": files[0],
        "slices": [{"sources": sources}],
        "parameters": {"t": 0.5},
    }
    with pytest.raises(ValueError, match=r"expected all layers, \[0, 3\], got the slice \[0, 2\]"):
        from_mergekit(content)
    with pytest.raises(ValueError, match="expected models, or one slice with all layers, got 2 slices"):
        from_mergekit(content | {"slices": content["slices"] * 2})


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected a document in YAML"), ("merge_method: ties", "says: expected models")]
)
def test_a_recipe_that_cannot_be_read_is_named(text, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["merge", "--recipe", str(tmp_path / "recipe.yaml"), "--out", "x.safetensors"]) == 1
    assert message in capsys.readouterr().err
