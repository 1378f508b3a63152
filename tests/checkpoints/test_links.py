"""Inputs and outputs that are links, as in Hugging Face's cache, whose files have hashes for names."""

import pytest
import torch
from checkpoints.test_adapter import adapter, factors
from safetensors.torch import load_file, save_file

from clmerge.checkpoints.ledger import read_ledger
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.verify import verify
from clmerge.cli import main
from clmerge.merging import MagMax
from clmerge.weights import TaskVectorBank, fingerprint, task_vector


def cached(state, folder, name="model.safetensors"):
    """Store a model as the cache does; return its snapshot folder."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(state, blobs / "4f6c")
    (snapshot / name).symlink_to("../../blobs/4f6c")
    return snapshot


@pytest.mark.parametrize("named", ["file", "folder", "linked folder"])
def test_a_link_of_the_cache_is_verified(named, theta, models, tmp_path):
    paths = [cached(state, tmp_path / str(index)) for index, state in enumerate([theta, *models])]
    if named == "file":
        paths = [path / "model.safetensors" for path in paths]
    if named == "linked folder":
        for index, path in enumerate(paths):
            (tmp_path / f"link_{index}").symlink_to(path, target_is_directory=True)
        paths = [tmp_path / f"link_{index}" for index in range(len(paths))]
    out = tmp_path / "out.safetensors"
    CheckpointMerge(paths[0], models=paths[1:], merger=MagMax()).run(out)
    ledger = read_ledger(out)
    assert [ledger.base, *ledger.models] == [str(path) for path in paths]
    assert {file.sha256 for file in ledger.files} != {None}
    assert verify(out)[0] == []


def test_linked_adapters_and_runs_are_verified(base, theta, models, tmp_path):
    whole = adapter(tmp_path / "whole", factors("net.0", 8, 5))
    (tmp_path / "linked").mkdir()
    for file in whole.iterdir():
        file.rename(tmp_path / file.stem)
        (tmp_path / "linked" / file.name).symlink_to(f"../{file.stem}")
    TaskVectorBank(tmp_path / "run" / "bank").append(0, task_vector(models[0], theta), base=fingerprint(theta))
    (tmp_path / "run" / "manifest.json").write_text("{}")
    (tmp_path / "latest").symlink_to("run", target_is_directory=True)
    inputs = [tmp_path / "linked" / "adapter_model.safetensors", tmp_path / "latest"]
    CheckpointMerge(base, models=inputs, merger=MagMax()).run(tmp_path / "out.safetensors")
    assert verify(tmp_path / "out.safetensors")[0] == []


def test_a_link_that_points_elsewhere_now_is_a_changed_input(theta, models, base, tmp_path):
    snapshot = cached(models[0], tmp_path / "cache")
    out = tmp_path / "out.safetensors"
    CheckpointMerge(base, models=[snapshot], merger=MagMax()).run(out)
    save_file(models[1], tmp_path / "cache" / "blobs" / "new")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/new")
    assert f"the input {snapshot / 'model.safetensors'} has changed since the merge" in verify(out)[0]


def test_relative_paths_are_verified_from_another_folder(theta, models, base, tmp_path, monkeypatch, capsys):
    (tmp_path / "work").mkdir()
    save_file(models[0], tmp_path / "work" / "a.safetensors")
    monkeypatch.chdir(tmp_path / "work")
    command = ["merge", "--base", "../base.safetensors", "--models", "./a.safetensors", "--merger", "MagMax"]
    assert main([*command, "--out", "out.safetensors"]) == 0
    monkeypatch.chdir("/")
    moved = (tmp_path / "work" / "out.safetensors").rename(tmp_path / "moved.safetensors")
    assert main(["merge", "--verify", str(moved)]) == 0


def test_an_input_is_not_overwritten_through_a_link(theta, models, base, tmp_path, capsys):
    save_file(models[0], tmp_path / "a.safetensors")
    (tmp_path / "out.safetensors").symlink_to("a.safetensors")
    command = ["merge", "--base", str(base), "--models", str(tmp_path / "a.safetensors"), "--merger", "MagMax"]
    assert main([*command, "--out", str(tmp_path / "out.safetensors"), "--overwrite"]) == 1
    assert "an output beside the inputs" in capsys.readouterr().err
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    job = CheckpointMerge(base, models=[tmp_path / "b.safetensors"], merger=MagMax())
    with pytest.raises(ValueError, match="an output beside the inputs"):
        job.run(tmp_path / "a.safetensors")
    assert torch.equal(load_file(tmp_path / "a.safetensors")["net.0.bias"], models[0]["net.0.bias"])


def test_a_link_to_nothing_is_not_replaced_unasked(models, base, tmp_path, capsys):
    save_file(models[0], tmp_path / "a.safetensors")
    (tmp_path / "out.safetensors").symlink_to("unmounted/out.safetensors")
    command = ["merge", "--base", str(base), "--models", str(tmp_path / "a.safetensors"), "--merger", "MagMax"]
    assert main([*command, "--out", str(tmp_path / "out.safetensors")]) == 1
    assert "which exists; name another or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").is_symlink()
