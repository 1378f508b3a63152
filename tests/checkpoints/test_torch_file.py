import argparse
import collections
import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy
import pytest
import torch

from clmerge.checkpoints.formats import open_checkpoint
from clmerge.checkpoints.pickled import Global, StandIn, StoredTensor, unpickled
from clmerge.checkpoints.reader import raw_bytes
from clmerge.checkpoints.torch_file import TorchFile
from clmerge.cli import main
from clmerge.weights import save_tensors


def tensors():
    shared = torch.randn(6, 4)
    return {
        "f32": torch.randn(3, 5),
        "f64": torch.randn(4, dtype=torch.float64),
        "f16": torch.randn(2, 3).half(),
        "bf16": torch.randn(7).bfloat16(),
        "f8": torch.randn(4).to(torch.float8_e5m2),
        "i64": torch.arange(5),
        "u16": torch.arange(3).to(torch.uint16),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).t(),
        "strided": torch.randn(10)[1::3],
        "part": shared[2:4, 1:],
        "tied": shared,
        "again": shared,
        "repeated": torch.randn(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_tensors_are_those_that_torch_reads(tmp_path, zipped, protocol):
    path = tmp_path / "a.pt"
    saved = tensors()
    if not zipped:  # those that torch does not read in its older format
        del saved["f8"], saved["u16"]
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    file = TorchFile(path)
    expected = torch.load(path, weights_only=False)
    assert list(file.content) == list(expected)
    assert file.ignored == []
    for name, tensor in expected.items():
        found = file.tensor(file.content[name])
        assert found.dtype == tensor.dtype, name
        assert found.shape == tensor.shape, name
        assert found.stride() == tensor.stride() or not found.numel(), name
        assert raw_bytes(found) == raw_bytes(tensor), name
    assert file.tensor(file.content["tied"]).data_ptr() == file.tensor(file.content["again"]).data_ptr()


class Settings:
    """An object whose class nobody but this file has."""

    def __init__(self):
        self.values = {"lr": 0.1}

    def __call__(self):
        raise AssertionError


class Bad(dict):
    """A dictionary that does something when it is made again."""

    def __setitem__(self, key, value):
        raise AssertionError

    def __setstate__(self, state):
        raise AssertionError


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def side_data(canary):
    bad = Bad()
    dict.__setitem__(bad, "x", 1)
    return {
        "best": numpy.float64(0.5),
        "array": numpy.arange(3),
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace()),
        "path": Path("runs"),
        "settings": Settings(),
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"a": [1]}),
        "set": {1, 2},
        "bytes": b"abc",
        "bad": bad,
        "evil": Evil(f"touch {canary}"),
        "function": torch.nn.functional.relu,
        "module": torch.nn.Linear(2, 2),
        "nest": [[(1, 2)], {"a": (None, True, 1.5, 2**80, "text")}],
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_side_data_is_named_and_never_run(tmp_path, zipped, capsys):
    state, canary = {"w": torch.randn(2, 3)}, tmp_path / "canary"
    content = {"state_dict": state, "pytorch-lightning_version": "2.6.0", "hyper_parameters": side_data(canary)}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    save_tensors(tmp_path / "base.safetensors", {"w": torch.zeros(2, 3)})
    checkpoint = open_checkpoint(tmp_path / "m.ckpt")
    assert checkpoint["w"].equal(state["w"])
    for name in ("argparse.Namespace", "Settings", "posix.system", "torch.nn.modules.linear.Linear", "scalar"):
        assert any(name in path for path in checkpoint.ignored), (name, checkpoint.ignored)
    assert not any("Counter" in path or path.endswith("set") for path in checkpoint.ignored)
    arguments = ["merge", "--base", str(tmp_path / "base.safetensors"), "--models", str(tmp_path / "m.ckpt")]
    assert main([*arguments, "--merger", "MagMax", "--dry-run"]) == 0
    assert "ignored objects of numpy" in capsys.readouterr().out
    assert not canary.exists()


def test_whatever_a_pickle_asks_for_is_not_called(tmp_path):
    """Every way of the pickle protocol to have something called or changed."""
    canary = tmp_path / "canary"
    command = f"touch {canary}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    for program in (
        b"cos\nsystem\n(" + text + b"tR.",
        b"(" + text + b"ios\nsystem\n.",
        b"(cos\nsystem\n" + text + b"o.",
        b"cos\nsystem\n(" + text + b"t\x81.",
        b"\x8c\x02os\x8c\x06system\x93(" + text + b"t}\x92.",
        b"cbuiltins\ngetattr\n(cos\npath\nX\x06\0\0\0systemtR(" + text + b"tR.",
        b"cbuiltins\neval\n(X\x0a\0\0\0__import__tR(" + text + b"tR.",
        b"ccollections\nOrderedDict\n)R(cos\nsystem\n" + text + b"tb.",
        b"\x82\x01.",
    ):
        found = unpickled(program).value
        assert isinstance(found, StandIn | Global | dict)
        assert not canary.exists()
    assert unpickled(b"cos\nsystem\n(" + text + b"tR.").ignored == ["os.system"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"}",
        b"h\0.",
        b"0.",
        b"a.",
        b"(" * 1000 + b".",
        b"]a.",
        b"}(X\x01\0\0\0au.",
        b"\x85.",
        b"K",
        b"X\xff\xff\xff\x7fa.",
        b"\x8e" + struct.pack("<Q", 2**62) + b".",
        b"R.",
        b"Q.",
        b"}Q.",
        b"\x80\xff.",
        b"I9" + b"9" * 5000 + b"\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\1K\1K\1K\1K\1K\1tR.",
    ],
)
def test_damaged_pickles(data):
    with pytest.raises(ValueError, match="a damaged pickle"):
        unpickled(data)


def test_pickles_that_explode_when_they_are_hashed_or_walked():
    started = time.process_time()
    laughs = b"X\x01\0\0\0a" + b"2\x86" * 60  # a pair of pairs of pairs ...
    found = unpickled(b"}(" + laughs + b"K\1X\x01\0\0\0bK\2u.").value
    assert found == {"b": 2}
    assert isinstance(unpickled(b"]" * 100_000 + b"a" * 99_999 + b".").value, list)
    assert time.process_time() - started < 5


def rezipped(path, change, **options):
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", **options) as new:
        for info in old.infolist():
            for name, content in change(info.filename, old.read(info)):
                new.writestr(name, content)
    path.write_bytes(out.getvalue())


CHANGES = {
    "expected 96 bytes of data in .*, got a record of 95": lambda n, c: [(n, c[:-1] if n.endswith("data/0") else c)],
    "expected 192 bytes of data in .*, got a record of 96": lambda n, c: [(n, c.replace(b"FloatS", b"DoubleS"))],
    "got no record '0'": lambda n, c: [] if n.endswith("data/0") else [(n, c)],
    "is there twice": lambda n, c: [(n, c), (n, c)] if n.endswith("data.pkl") else [(n, c)],
    "without data.pkl": lambda n, c: [] if n.endswith("data.pkl") else [(n, c)],
    "in another folder": lambda n, c: [(f"../{n}" if n.endswith("data/0") else n, c)],
    "a damaged pickle": lambda n, c: [(n, c[:-5] if n.endswith("data.pkl") else c)],
    "largest byte first": lambda n, c: [(n, b"big" if n.endswith("byteorder") else c)],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("message", CHANGES)
def test_archives_that_do_not_fit_together(tmp_path, message):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.randn(6, 4)}, path)
    rezipped(path, CHANGES[message])
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"w": torch.zeros(6, 4)}, tmp_path / "a.pt")
    rezipped(tmp_path / "a.pt", lambda n, c: [(n, c)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.pt: the record .* compressed"):
        open_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(3).to_sparse(), "'w', which is kept as sparse tensor"),
        (torch.empty(3, device="meta"), "'w', which is kept as meta tensor no storage"),
        (torch.randn(3, dtype=torch.complex64).conj(), "'w', which is kept as conjugated or negated"),
        (torch.zeros(1).expand(10**5, 10**5), "which repeats what is stored; save a contiguous copy .of 'w'"),
    ],
)
def test_tensors_that_are_kept_in_another_way(tmp_path, value, message):
    torch.save({"state_dict": {"w": value}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path / "a.pt")
    assert "a.pt" in str(error.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("<html>404</html>"), "neither a zip archive nor the older format of torch.save"),
        (lambda path: path.write_bytes(b""), "neither a zip archive nor the older format of torch.save"),
        (lambda path: path.write_bytes(b"PK\3\4"), "File is not a zip file"),
        (lambda path: path.write_bytes(pickle.dumps({"w": 1})), "something else"),
        (lambda path: torch.save(Settings(), path), "an object of .*Settings"),
        (lambda path: torch.save([torch.ones(2)], path), "expected a state dict in .*, got list"),
    ],
)
def test_other_files(tmp_path, write, message):
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path / "a.pt")
    assert "a.pt" in str(error.value)
    assert "weights_only" not in str(error.value)


def test_older_files_that_end_early(tmp_path):
    torch.save({"w": torch.randn(40), "v": torch.randn(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    for size in range(0, len(data), 7):
        (tmp_path / "b.pt").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"b\.pt"):
            open_checkpoint(tmp_path / "b.pt")


def test_bits_that_were_flipped_in_a_file_are_refused_or_change_nothing(tmp_path):
    saved = {"w": torch.arange(40.0), "v": torch.arange(3.0)}
    torch.save(saved, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    refused = 0
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (tmp_path / "b.pt").write_bytes(changed)
        try:
            opened = open_checkpoint(tmp_path / "b.pt")
            found = {name: opened.tensor(name) for name in opened.entries}
        except ValueError as error:
            assert "b.pt" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert found.keys() == saved.keys(), position
            assert all(torch.equal(found[name], tensor) for name, tensor in saved.items()), position
    assert refused > 100


def test_records_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(4)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert open_checkpoint(tmp_path / "a.pt")["w"].equal(torch.ones(4))


def test_data_is_verified_when_it_is_read_and_not_before(tmp_path):
    torch.save({"w": torch.ones(400), "v": torch.zeros(3)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data.replace(torch.ones(400).numpy().tobytes(), torch.zeros(400).numpy().tobytes()))
    opened = open_checkpoint(tmp_path / "a.pt")
    assert opened["v"].equal(torch.zeros(3))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"in .*a\.pt, got a record '0' that its checksum does not fit"):
            opened.tensor("w", slice(0, 2))


def test_a_dictionary_of_an_unknown_class_is_one(tmp_path):
    state = Bad()
    dict.__setitem__(state, "w", torch.ones(2))
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    found = TorchFile(tmp_path / "a.pt").content["state_dict"]
    assert isinstance(found, StandIn)
    assert isinstance(found["w"], StoredTensor)
