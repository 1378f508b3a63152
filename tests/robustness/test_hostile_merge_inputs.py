"""Inputs of ``clmerge merge`` that somebody damaged or made to harm: a result, or one message that names the file."""

import functools
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clmerge.cli.merge
from clmerge.cli import main
from clmerge.weights import TaskVectorBank, fingerprint

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn"]}


one_parser = functools.cache(clmerge.cli.merge.build_parser)  # to build it takes longer than most of these tests


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clmerge.cli.merge, "build_parser", one_parser)
    torch.manual_seed(0)
    for name in ("base", "m0", "m1"):
        save_file({"attn.weight": torch.randn(8, 6), "bias": torch.randn(3)}, f"{name}.safetensors")
    return tmp_path


def refused(capsys, *arguments, names, base="base.safetensors", merger=("--merger=TaskArithmetic",)):
    """Merge, see it fail within a few seconds with one short message that names all of ``names``, nothing left."""
    before = {*Path().iterdir()}
    capsys.readouterr()
    started = time.process_time()
    command = ["merge", *(["--base", base] if base else []), *arguments, *merger, "--out", "out.safetensors"]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert time.process_time() - started < 10
    message = capsys.readouterr().err
    assert code in (1, 2), message
    lines = [line for line in message.splitlines() if not line.startswith(("merging:", "clmerge merge: warning"))]
    assert len(lines) <= 3, message
    assert all(len(line) < 700 for line in lines), message
    for name in names:
        assert name in message, message
    assert "Traceback" not in message
    assert "weights_only" not in message
    assert {*Path().iterdir()} == before
    return message


def model(capsys, path, *names, **options):
    return refused(capsys, "--models", "m0.safetensors", path, names=(path.partition("/")[0], *names), **options)


def bank_file(path, tensors, **more):
    header = {"task": "0", "name": "a", "base": "", "sha256": fingerprint(tensors)} | more
    save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    ("scales", "names"),
    [
        ("{", ["low_rank"]),
        ("[" * 100_000, ["low_rank"]),
        ("3", ["low_rank"]),
        ("[]", ["low_rank"]),
        ('{"gone": 1.0}', ["gone/A"]),
        ('{"bias": 1.0}', ["bias/A"]),
        ('{"w": "x"}', ["'w'"]),
        ('{"w": null}', ["'w'"]),
        ('{"w": 1e999}', ["'w'"]),
        ('{"w": true}', ["'w'"]),
        ('{"w": 1.0}', ["'w'", "(8, 3)"]),
    ],
)
def test_factors_that_are_not_there(folder, capsys, scales, names):
    tensors = {"attn.weight": torch.zeros(8, 6), "bias": torch.zeros(3)}
    tensors |= {"w/A": torch.zeros(2, 6), "w/B": torch.zeros(8, 3)}
    bank_file("bad.safetensors", tensors, low_rank=scales)
    model(capsys, "bad.safetensors", *names)


def test_a_model_with_words_of_a_bank_in_its_header_is_a_model(folder, capsys):
    """Taken for a task vector it would be added to the base."""
    tensors = {"attn.weight": torch.ones(8, 6), "bias": torch.ones(3)}
    header = {"task": "image-classification", "name": "vit", "base": "", "low_rank": "8"}
    save_file(tensors, "stray.safetensors", metadata=header)
    command = ["merge", "--base", "base.safetensors", "--models", "stray.safetensors", "--merger=TaskArithmetic"]
    assert main([*command, "--merger.scale=1.0", "--out", "out.safetensors"]) == 0
    from clmerge.weights import load_tensors

    assert load_tensors("out.safetensors")["bias"].equal(torch.ones(3))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"r": 0}, ["rank 0"]),
        ({"r": None}, ["for r in"]),
        ({"r": [2]}, ["for r in"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"lora_alpha": [4]}, ["lora_alpha"]),
        ({"rank_pattern": ["attn"]}, ["rank_pattern"]),
        ({"alpha_pattern": "x"}, ["alpha_pattern"]),
        ({"rank_pattern": {"attn": "x"}}, ["rank_pattern", "attn"]),
        ({"rank_pattern": {"(": 2}}, ["rank_pattern", "'('"]),
        ({"alpha_pattern": {"(?P<x": 2}}, ["alpha_pattern"]),
        ({"alpha_pattern": {"a{99999999999}": 2}}, ["alpha_pattern"]),
        ({"alpha_pattern": {"(" * 3000 + ")" * 3000: 2}}, ["alpha_pattern"]),
        ({"alpha_pattern": {"((((((.*)*)*)*)*)*)*z": 2}}, ["alpha_pattern"]),
        ({"peft_type": ["LORA"]}, ["peft_type"]),
    ],
)
def test_adapter_settings(folder, capsys, change, names):
    (folder / "adapter").mkdir()
    rank = 0 if change.get("r") == 0 else 2
    factors = {"lora_A": torch.zeros(rank, 6), "lora_B": torch.zeros(8, rank)}
    save_file(
        {f"base_model.model.attn.{side}.weight": factor for side, factor in factors.items()},
        "adapter/adapter_model.safetensors",
    )
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(LORA | change))
    model(capsys, "adapter", "adapter_config.json", *names)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, '{"r": 1}', b"\xff\xfe"])
def test_adapter_settings_that_are_none(folder, capsys, text):
    (folder / "adapter").mkdir()
    save_file({"a.lora_A.weight": torch.zeros(1, 6)}, "adapter/adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    model(capsys, "adapter", "adapter_config.json")


def test_expressions_that_backtrack_without_end_are_matched_in_time(folder, capsys):
    from clmerge.checkpoints.formats import open_checkpoint

    (folder / "adapter").mkdir()
    module = "attn" + "a" * 60 + "!"
    save_file(
        {f"{module}.lora_A.weight": torch.ones(2, 6), f"{module}.lora_B.weight": torch.ones(8, 2)},
        "adapter/adapter_model.safetensors",
    )
    patterns = {"(a+)+$": 8, "(.*)*$x": 8, "attn(a|aa)+!": 6}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(LORA | {"alpha_pattern": patterns}))
    assert open_checkpoint("adapter")[f"{module}.weight"].unique().tolist() == [6.0]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 100_000, '{"weight_map": ' + '{"a":' * 50_000, "[]", "null"]
    + [
        json.dumps({"weight_map": value})
        for value in (None, [], ["a"], "x", 3, {}, {"bias": 3}, {"bias": None}, {"bias": ["a"]}, {"bias": {}})
    ]
    + [
        json.dumps({"weight_map": {"bias": name}})
        for name in ("a\0b", "", ".", "..", "a" * 5000, "../m0.safetensors", "/dev/zero", "fifo.safetensors")
    ],
)
def test_indexes(folder, capsys, content):
    (folder / "hf").mkdir()
    os.mkfifo("hf/fifo.safetensors")
    (folder / "hf" / "model.safetensors.index.json").write_text(content)
    model(capsys, "hf", "model.safetensors.index.json")


@pytest.mark.parametrize(
    "change",
    [
        {"threads": None},
        {"threads": 0},
        {"threads": 10**30},
        {"threads": "x"},
        {"models": []},
        {"models": [3]},
        {"models": None},
        {"base": 3},
        {"base": "/dev/zero"},
        {"files": [{}]},
        {"files": 3},
        {"files": [{"path": "a\0b", "bytes": 0, "sha256": None}]},
        {"merger": {"class_path": "os.system", "init_args": {"command": "touch canary"}}},
        {"merger": {"class_path": "TIES", "init_args": None}},
        {"merger": {"class_path": "TIES", "init_args": {"density": "x"}}},
        {"merger": {"class_path": ["TIES"], "init_args": {}}},
        {"merger": 3},
        {"groups": [3]},
        {"groups": [{"match": 3, "merger": None}]},
        {"shards": {"../m0.safetensors": "0"}},
        {"shards": {"/etc/passwd": "0"}},
        {"schema": True},
        {"more": 1},
    ],
)
def test_ledgers(folder, capsys, change):
    from safetensors import safe_open

    command = ["merge", "--base", "base.safetensors", "--models", "m0.safetensors", "--merger=TaskArithmetic"]
    assert main([*command, "--out", "merged.safetensors"]) == 0
    with safe_open("merged.safetensors", "pt") as file:
        ledger = json.loads(file.metadata()["clmerge"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, "merged.safetensors", metadata={"clmerge": json.dumps(ledger | change)})
    capsys.readouterr()
    assert main(["merge", "--verify", "merged.safetensors"]) in (1, 2)
    message = capsys.readouterr().err
    assert "merged.safetensors" in message or str(change.get("base")) in message
    assert len(message.splitlines()) <= 2
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[" * 100_000])
def test_ledgers_that_are_none(folder, capsys, text):
    save_file({"bias": torch.zeros(3)}, "merged.safetensors", metadata={"clmerge": text})
    assert main(["merge", "--verify", "merged.safetensors"]) == 1
    assert "merged.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (LAUGHS + "base: *i\n", ["recipe.yaml", "aliases"]),
        (LAUGHS + "merge_method: linear\nmodels: *i\n", ["recipe.yaml", "aliases"]),
        ("base: &a [*a]\n", ["recipe.yaml", "*a"]),
        ("merger: " + "[" * 20_000, ["recipe.yaml", "deep"]),
        ("- " * 20_000, ["recipe.yaml", "deep"]),
        ("merger: !!bool x\n", ["recipe.yaml"]),
        ("base: [1\n", ["recipe.yaml", "line 2"]),
        ("base: a\n---\nbase: b\n", ["recipe.yaml"]),
        ("threads: null\n", ["threads"]),
        ("threads: 99999999999999999999\n", ["threads"]),
        ("threads: 2000000000\n", ["threads"]),
        ("models: null\n", ["models"]),
        ("models: {a: 1}\n", ["recipe.yaml", "models"]),
        ("include: null\n", ["include"]),
        ("base: 3\n", ["recipe.yaml", "base"]),
        ("merger: {class_path: os.system, init_args: {command: touch canary}}\n", ["merger", "os.system"]),
        ("merger: {class_path: MagMax, init_args: {dty: 1}}\n", ["recipe.yaml", "merger", "MagMax", "dty", "scale"]),
        ("merger: true\n", ["recipe.yaml", "merger"]),
        ("groups: [[]]\n", ["recipe.yaml", "groups"]),
        ("groups: [{match: x}]\n", ["recipe.yaml", "groups", "match"]),
        ("recipe: 1\n", ["recipe.yaml", "config"]),
        ("basee: x\n", ["recipe.yaml", "basee", "did you mean base?"]),
        (b"\xff\xfe\0\0", ["recipe.yaml"]),
        (b"base: \x1b[31m\n", ["recipe.yaml"]),
    ],
)
def test_recipes(folder, capsys, recipe, names):
    (folder / "recipe.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    message = refused(capsys, "--recipe", "recipe.yaml", names=names, base=None, merger=())
    assert "\x1b" not in message
    assert not (folder / "canary").exists()


def test_settings_on_the_command_line_do_not_blame_a_file(folder, capsys):
    (folder / "recipe.yaml").write_text("threads: 1\n")
    message = refused(capsys, "--recipe", "recipe.yaml", "--threads=x", names=["--threads"], base=None)
    assert "recipe.yaml" not in message
    for option, names in (("density", ["its settings are scale, weights"]), ("scal", ["did you mean scale?"])):
        merger = ("--merger=TaskArithmetic", f"--merger.{option}=2")
        message = refused(
            capsys, "--models", "m0.safetensors", names=["TaskArithmetic", f"--merger.{option}", *names], merger=merger
        )
        assert "dtype" not in message


@pytest.mark.parametrize("name", ["m1.safetensors", "m1.pt", "m1.ckpt"])
def test_pipes_and_devices_are_not_read(folder, capsys, name):
    os.mkfifo("pipe")
    for target in ("pipe", "/dev/zero", "/dev/null"):
        link = folder / f"link{name}"
        link.symlink_to(target)
        model(capsys, link.name, "named pipe" if target == "pipe" else "device")
        refused(capsys, "--models", "m0.safetensors", names=[link.name], base=link.name)
        (folder / "recipe.json").write_text(json.dumps({"base": "base.safetensors", "models": [link.name]}))
        refused(capsys, "--recipe=recipe.json", names=[link.name], base=None)
        refused(capsys, "--recipe", link.name, names=[link.name])
        link.unlink()


@pytest.mark.parametrize("target", ["/dev/zero", "gone", "task_001.safetensors"])
def test_banks_with_a_gap(folder, capsys, target):
    bank = TaskVectorBank("run/bank")
    for task in range(3):
        bank.append(task, {"bias": torch.ones(3) * task})
    bank.path(1).unlink()
    refused(capsys, "--models", "run/bank", names=["run/bank", "task_002"])
    bank.path(1).symlink_to(target)
    refused(capsys, "--models", "run/bank", names=["task_001"])


def test_banks_whose_files_are_swapped(folder, capsys):
    bank = TaskVectorBank("bank")
    for task in range(2):
        bank.append(task, {"bias": torch.ones(3) * task})
    bank.path(0).rename("x"), bank.path(1).rename(bank.path(0)), (folder / "x").rename(bank.path(1))
    refused(capsys, "--models", "bank", names=["task_000.safetensors", "says task '1'"])


def test_nan_in_one_of_many_models_names_that_one(folder, capsys):
    for task in range(2, 30):
        save_file({"attn.weight": torch.randn(8, 6), "bias": torch.randn(3)}, f"m{task}.safetensors")
    save_file({"attn.weight": torch.zeros(8, 6), "bias": torch.tensor([0, torch.nan, 0])}, "m17.safetensors")
    models = [f"m{task}.safetensors" for task in range(30)]
    for merger in ("MagMax", "TIES", "OPCM"):
        message = refused(
            capsys, "--models", *models, names=["m17.safetensors", "'bias'"], merger=(f"--merger={merger}",)
        )
        assert message.count(".safetensors") == 1, message


def test_an_overflow_names_the_largest_entry(folder, capsys):
    save_file({"attn.weight": torch.zeros(8, 6), "bias": torch.tensor([0, 3e38, 0])}, "m2.safetensors")
    models = ["m0.safetensors", "m2.safetensors", "m2.safetensors"]
    refused(capsys, "--models", *models, names=["m2.safetensors", "'bias'", "overflow"])


@pytest.mark.parametrize("size", ["9" * 400, "1" * 400 + "GB", "0", "-1", "x"])
def test_sizes(folder, capsys, size):
    refused(capsys, "--models", "m0.safetensors", f"--shard-size={size}", names=["expected a size such as 5GB"])


def test_null_bytes_and_escapes_in_names(folder, capsys):
    for key, value in (("base", "a\0b"), ("models", ["a\0b"]), ("base", "\x1b[31m"), ("out", "a\0.safetensors")):
        recipe = {"base": "base.safetensors", "models": ["m0.safetensors"], "out": "x.safetensors", key: value}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        message = refused_recipe(capsys)
        assert "\x1b" not in message
        assert "\0" not in message
        assert r"a\x00" in message or r"\x1b[31m" in message, message


def refused_recipe(capsys):
    before = {*Path().iterdir()}
    assert main(["merge", "--recipe=recipe.json", "--merger=MagMax"]) == 1
    assert {*Path().iterdir()} == before
    return capsys.readouterr().err


def test_a_tensor_that_the_header_has_twice(folder, capsys):
    data = (folder / "m1.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    bias = json.dumps({"bias": json.loads(header)["bias"]})
    doubled = header[:-1] + b"," + bias[1:].encode()
    (folder / "twice.safetensors").write_bytes(len(doubled).to_bytes(8, "little") + doubled + data[8 + size :])
    model(capsys, "twice.safetensors", "'bias' twice")
