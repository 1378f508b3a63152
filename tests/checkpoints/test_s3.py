"""Checkpoints on S3, read from a local server; runs where moto and s3fs are installed."""

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from clmerge.checkpoints import open_checkpoint
from clmerge.checkpoints.remote import local_path
from clmerge.cli import main

pytestmark = [pytest.mark.peers, pytest.mark.slow]
pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a server of this machine; s3fs finds it by the environment, as for any other server."""
    import s3fs

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem()
        system.mkdir("models")
        yield system
        s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture
def states():
    torch.manual_seed(0)
    return [{"a.weight": torch.randn(8, 4), "b": torch.randn(5)} for _ in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_checkpoints_of_a_bucket_are_merged_like_files(bucket, states, tmp_path):
    names = ("base", "first", "second")
    for name, state in zip(names, states, strict=True):
        bucket.pipe_file(f"models/{name}.safetensors", save(state))
        save_file(state, tmp_path / f"{name}.safetensors")
    found = []
    for place in ("s3://models", str(tmp_path)):
        base, *others = (f"{place}/{name}.safetensors" for name in names)
        out = tmp_path / f"out{len(found)}.safetensors"
        assert main(["merge", "--base", base, "--models", *others, "--merger", "TIES", "--out", str(out)]) == 0
        found.append(load_file(out))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_a_copy_is_made_once_and_again_when_the_object_changes(bucket, states, capsys):
    url = "s3://models/changing.safetensors"
    bucket.pipe_file("models/changing.safetensors", save(states[0]))
    first = local_path(url)
    assert local_path(url) == first
    assert capsys.readouterr().err.count(f"copying {url} to ") == 1
    bucket.pipe_file("models/changing.safetensors", save(states[1]))
    assert torch.equal(open_checkpoint(url).tensor("b"), states[1]["b"])
    assert local_path(url) != first


def test_a_folder_of_a_bucket_is_copied_as_a_whole(bucket, states):
    bucket.pipe_file("models/folder/model.safetensors", save(states[0]))
    bucket.pipe_file("models/folder/config.json", b"{}")
    assert {file.name for file in local_path("s3://models/folder/").iterdir()} == {"model.safetensors", "config.json"}
    assert torch.equal(open_checkpoint("s3://models/folder").tensor("b"), states[0]["b"])


def test_what_is_not_there_is_said(bucket):
    with pytest.raises(FileNotFoundError, match=r"got s3://models/none\.safetensors, which does not exist"):
        local_path("s3://models/none.safetensors")
