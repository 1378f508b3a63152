import json
import pickle
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from support.records import record
from support.run_folders import write_run

from clmerge.cli import main
from clmerge.results.run_manifest import Manifest
from clmerge.weights import TaskVectorBank, save_tensors


def inspected(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert main(["inspect", *map(str, arguments)]) == 0
    return document, capsys.readouterr().out.splitlines()


@pytest.fixture
def files(tmp_path):
    base = {"visual.w": torch.zeros(4, 3), "visual.b": torch.zeros(3), "text.w": torch.zeros(2, dtype=torch.float16)}
    save_file(base, tmp_path / "base.safetensors")
    for number in (1, 2):
        save_file({name: value + number for name, value in base.items()}, tmp_path / f"m{number}.safetensors")
    return tmp_path


def test_a_checkpoint(files, capsys):
    found, lines = inspected(capsys, files / "base.safetensors")
    assert (found["kind"], found["format"], found["is_task_vector"]) == ("checkpoint", "safetensors", False)
    assert (found["tensors"], found["parameters"], found["bytes"]) == (3, 17, 64)
    assert found["dtypes"] == {"float32": 2, "float16": 1}
    assert {part["name"]: part["parameters"] for part in found["parts"]} == {"visual.w": 12, "visual.b": 3, "text.w": 2}
    assert found["ledger"] is None
    assert lines[0] == f"{files / 'base.safetensors'}: weights, safetensors"
    assert lines[1].split(", ") == ["  3 tensors", "17 parameters", "0.0 MB", "2 float32", "1 float16"]


def test_a_merged_file_shows_its_ledger(files, capsys):
    base, m1, m2, out = (str(files / f"{name}.safetensors") for name in ("base", "m1", "m2", "out"))
    assert main(["merge", "--base", base, "--models", m1, m2, "--merger", "TIES", "--out", out]) == 0
    capsys.readouterr()
    found, lines = inspected(capsys, out)
    assert found["ledger"]["merger"]["class_path"] == "TIES"
    assert any(line.startswith("  merged by clmerge ") and "TIES(density=0.2" in line for line in lines)
    assert f"    base    {base}" in lines
    assert [line for line in lines if line.startswith("    model")] == [f"    model   {m1}", f"    model   {m2}"]


def test_a_merged_folder_shows_its_ledger(files, capsys):
    base, m1, out = (str(files / name) for name in ("base.safetensors", "m1.safetensors", "out"))
    assert (
        main(["merge", "--base", base, "--models", m1, "--merger", "MagMax", "--out", out, "--shard-size", "1KB"]) == 0
    )
    capsys.readouterr()
    found, lines = inspected(capsys, out)
    assert found["ledger"]["merger"]["class_path"] == "MagMax"
    assert "shards" in found["format"] or found["tensors"] == 3
    assert any("merged by clmerge" in line for line in lines)


def test_a_training_checkpoint_is_not_unpickled(files, capsys):
    class Trap:
        def __reduce__(self):
            return (open, (str(files / "canary"), "w"))

    weights = {"w": torch.zeros(2)}
    torch.save({"state_dict": weights, "state_dict_ema": weights, "args": Trap()}, files / "last.pt")
    found, lines = inspected(capsys, files / "last.pt")
    assert not (files / "canary").exists()
    assert (found["sets"], found["weights"]) == (["state_dict", "state_dict_ema"], "state_dict_ema")
    assert found["left_out"]
    assert any("which were not built" in line for line in lines)
    found, _ = inspected(capsys, files / "last.pt", "--weights", "state_dict")
    assert found["weights"] == "state_dict"


def test_a_bank_and_one_vector_of_it(tmp_path, capsys):
    bank = TaskVectorBank(tmp_path / "bank")
    for task, name in enumerate(["cats", "dogs"]):
        bank.append(task, {"w": torch.full((3,), float(task))}, name=name, base="ab" * 32)
    found, lines = inspected(capsys, tmp_path / "bank")
    assert found["tasks"] == [{"task": 0, "name": "cats"}, {"task": 1, "name": "dogs"}]
    assert lines[0].startswith(f"{tmp_path / 'bank'}: 2 task vectors of base abababababab..., 1 tensors each")
    found, lines = inspected(capsys, tmp_path / "bank" / "task_001.safetensors")
    assert (found["task"], found["is_task_vector"]) == ("dogs", True)
    assert lines[0].endswith(": task vector of dogs")


def test_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run, finished=2)
    results = record(run)
    config = "name: own\nseed: 3\nmodel: {backbone: {class_path: clmerge.models.OpenClip, init_args: {name: nano}}}\n"
    manifest = Manifest(2, 2, "state/task_001", results=results, config=config)
    (run / "manifest.json").write_text(json.dumps(asdict(manifest)))
    found, lines = inspected(capsys, run)
    assert (found["kind"], found["seed"], found["trained"], found["finished"]) == ("run", 3, 2, False)
    expected = results["models"]["magmax"]["task_agnostic"]["average_accuracy"][1]
    assert found["average_accuracy"]["magmax"] == expected
    assert lines[0].startswith(f"{run}: run own, seed 3, 2 of 3 tasks trained")
    assert "  backbone  OpenClip(name='nano')" in lines
    assert f"  accuracy  {100 * expected:6.1f} %  magmax" in lines
    assert len([line for line in lines if line.startswith("  task")]) == 3
    assert lines[-1] == f"  resume    clmerge fit --resume {run}"


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps({"a": 1}), b"{"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".txt"])
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, content, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(content)
    assert main(["inspect", str(file)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("clmerge inspect: ")
    assert len(message.splitlines()) == 1


def test_what_is_not_there_names_the_nearest(files, capsys):
    assert main(["inspect", str(files / "bse.safetensors")]) == 1
    assert "does not exist; the nearest there is " in capsys.readouterr().err


def test_names_are_shown_without_control_characters(tmp_path, capsys):
    save_tensors(tmp_path / "x.safetensors", {"a\x1b[31m": torch.zeros(1)})
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert "\x1b" not in capsys.readouterr().out
