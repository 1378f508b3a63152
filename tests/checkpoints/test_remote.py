"""Checkpoints that URLs name: copies of them give the merge of the files, and are made once for each content."""

from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.merge import CheckpointMerge
from clmerge.checkpoints.remote import local_path
from clmerge.cli import main
from clmerge.merging import TIES


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The memory of fsspec, empty before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def upload(system, name, state):
    system.pipe_file(f"/bucket/{name}", save(state))
    return f"memory://bucket/{name}"


def test_models_of_urls_are_merged_like_files(remote, theta, models, base, tmp_path):
    urls = [upload(remote, f"model_{index}.safetensors", model) for index, model in enumerate(models)]
    files = [tmp_path / f"model_{index}.safetensors" for index in range(len(models))]
    for file, model in zip(files, models, strict=True):
        file.write_bytes(save(model))
    CheckpointMerge(upload(remote, "base.safetensors", theta), models=urls, merger=TIES()).run(
        tmp_path / "a.safetensors"
    )
    CheckpointMerge(base, models=files, merger=TIES()).run(tmp_path / "b.safetensors")
    ours, expected = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_copy_is_made_once_and_again_when_the_content_changes(remote, theta, models, capsys):
    url = upload(remote, "model.safetensors", theta)
    first = local_path(url)
    assert local_path(url) == first
    assert capsys.readouterr().err.count("copying memory://bucket/model.safetensors to ") == 1
    upload(remote, "model.safetensors", models[0])
    assert local_path(url) != first
    found = open_checkpoint(url)
    assert torch.equal(found.tensor("net.0.weight"), models[0]["net.0.weight"])


def test_a_folder_is_copied_as_a_whole(remote, theta):
    upload(remote, "folder/model.safetensors", theta)
    remote.pipe_file("/bucket/folder/config.json", b"{}")
    copy = local_path("memory://bucket/folder/")
    assert {file.name for file in copy.iterdir()} == {"model.safetensors", "config.json"}
    assert torch.equal(open_checkpoint("memory://bucket/folder").tensor("net.0.bias"), theta["net.0.bias"])


def test_a_copy_that_is_broken_off_leaves_nothing(remote, theta, monkeypatch, tmp_path):
    url = upload(remote, "model.safetensors", theta)

    def broken(*args, **kwargs):
        raise OSError("the line is dead")

    monkeypatch.setattr(type(remote), "get", broken)
    with pytest.raises(OSError, match="the line is dead"):
        local_path(url)
    assert not [*(tmp_path / "cache" / "clmerge" / "fetched").iterdir()]


def test_what_cannot_be_read_is_said(remote, theta):
    upload(remote, "base.safetensors", theta)
    with pytest.raises(FileNotFoundError, match="got memory://bucket/none, which does not exist"):
        local_path("memory://bucket/none")
    with pytest.raises(ValueError, match="a URL that fsspec can read, got nowhere://a"):
        local_path("nowhere://a")


@pytest.mark.parametrize(
    "command",
    [
        "merge --base a.safetensors --models b.safetensors --merger TIES --out=URL",
        "merge --base a.safetensors --models b.safetensors --merger TIES --out URL",
        "report runs/a --out URL",
        "compare runs/a --out URL",
        "evaluate runs/a --out URL",
        "export runs/a --out URL",
        "fit --config configs/quickstart.yaml --run_dir URL",
        "sweep --config configs/quickstart.yaml --out URL",
        "predict runs/a images --csv URL",
        "sign a.safetensors --key k.pem --out URL",
        "fit --config run.yaml",
    ],
)
def test_no_command_writes_to_a_url(command, tmp_path, monkeypatch, capsys):
    configs = Path(__file__).parents[2] / "configs"
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("run_dir: s3://bucket/report.html\n")
    words = command.replace("URL", "s3://bucket/report.html").replace("configs", str(configs)).split()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "expected a path of the file system for " in (told := capsys.readouterr().err)
    assert "got s3://bucket/report.html: write to a folder and copy it there" in told
    assert [*tmp_path.iterdir()] == [tmp_path / "run.yaml"], "no folder s3:"
