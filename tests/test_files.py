import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from clmerge import files
from clmerge.weights import (
    checksum,
    load_metadata,
    load_tensors,
    save_tensors,
    save_torch,
    write_json_atomic,
    write_text_atomic,
)


def test_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {
        "strided": torch.arange(6.0).view(2, 3).t(),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save_tensors(path, tensors, {"task": "3", "name": "digits"})
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert load_metadata(path) == {"task": "3", "name": "digits"}
    assert load_metadata(path).keys() == {"task", "name"}


def test_tensors_that_share_storage_are_written_apart(tmp_path):
    whole = torch.arange(10.0)
    save_tensors(tmp_path / "a.safetensors", {"whole": whole, "again": whole, "part": whole[2:4]})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(loaded["again"], whole)
    assert loaded["part"].tolist() == [2.0, 3.0]
    loaded["whole"].zero_()
    assert loaded["again"].sum() == 45


def test_equal_tensors_give_equal_files(tmp_path):
    metadata = {key: key * 2 for key in "hgfedcba"}
    for name in ("a", "b"):
        save_tensors(tmp_path / name, {"w": torch.ones(3)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_metadata_is_empty_metadata(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    assert load_metadata(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("read", [load_tensors, load_metadata])
def test_a_cut_file_is_an_error_with_its_name(tmp_path, read):
    save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(100)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        read(tmp_path / "cut.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": torch.ones(2)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.safetensors'"):
        save_tensors(path, {"w": torch.zeros(2)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    assert load_tensors(path)["w"].tolist() == [1.0, 1.0]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    program = f"""
import os, signal
from clmerge.weights import atomic_path
with atomic_path({str(path)!r}) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", program], check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    left = [entry.name for entry in tmp_path.iterdir() if entry.name != "a.txt"]
    assert len(left) == 1
    assert left[0].startswith(".a.txt.")
    (tmp_path / left[0].replace("a.txt", "b.txt")).write_text("half of another file")
    write_text_atomic(path, "new")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".a")] == []
    assert len(list(tmp_path.glob(".b.txt.*"))) == 1, "the next one that writes b.txt removes it"


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "a.txt"
    with files.atomic_path(path) as temporary:
        temporary.write_text("mine")
        write_text_atomic(path, "another thread's")
        assert temporary.read_text() == "mine"
    assert path.read_text() == "mine"
    host = temporary.name.split(".")[3][:8]
    parent, other = (tmp_path / f".a.txt.{h}{os.getppid():08x}{'0' * 16}.tmp" for h in (host, "00000000"))
    for file in (parent, other):
        file.write_text("of a process that lives, or of another machine")
    write_text_atomic(path, "new")
    assert parent.exists()
    assert other.exists()
    for file in (parent, other):
        os.utime(file, (0, 0))
    write_text_atomic(path, "new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.txt"], "untouched for a day"


@pytest.mark.parametrize(
    ("write", "content"),
    [
        (save_torch, {"w": torch.ones(100_000)}),
        (save_tensors, {"w": torch.ones(100_000)}),
        (write_text_atomic, "x" * 10**6),
    ],
)
def test_a_full_disk_is_said_in_words_with_the_file(tmp_path, monkeypatch, write, content):
    monkeypatch.setattr(files, "_remove_leftovers", lambda target: None)
    monkeypatch.setattr(files.uuid, "uuid4", lambda: SimpleNamespace(hex="0" * 32))
    name = f".a.{files._host()}{os.getpid():08x}{'0' * 16}.tmp"
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'") as caught:
        write(tmp_path / "a", content)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_is_of_the_whole_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    before = checksum(tmp_path / "a")
    assert len(before) == 32
    with (tmp_path / "a").open("r+b") as file:
        file.seek(2_999_999)
        file.write(b"\1")
    assert checksum(tmp_path / "a") != before


def test_text_and_json(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "line\nGr\u00fc\u00dfe\n")
    assert (tmp_path / "a.txt").read_bytes() == "line\nGr\u00fc\u00dfe\n".encode()
    write_json_atomic(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}


def test_files_are_readable_for_whom_the_umask_allows(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "x")
    save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(1)})
    plain = tmp_path / "plain"
    plain.write_text("x")
    modes = {(tmp_path / name).stat().st_mode for name in ("a.txt", "a.safetensors", "plain")}
    assert modes == {plain.stat().st_mode}
