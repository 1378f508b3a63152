"""Safetensors files as anybody may write them: not aligned, in every dtype, with empty tensors."""

import json

import pytest
import torch
from safetensors import safe_open

from clmerge.checkpoints.reader import DTYPES
from clmerge.checkpoints.safetensors_file import SafetensorsCheckpoint


def write(path, tensors, *, pad=0):
    """Write a header of ``pad`` more bytes than it takes, so that data may begin at any byte."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (pad + -len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return SafetensorsCheckpoint(path, [path])


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


def every_dtype():
    found = {"one byte": torch.ones(1, dtype=torch.uint8)}  # what follows is not aligned
    for code, dtype in DTYPES.items():
        found[f"{code} empty"] = torch.empty(0, 3, dtype=dtype)
        drawn = torch.randint(0, 2, (3, 5 * dtype.itemsize), dtype=torch.uint8)
        found[code] = drawn.view(dtype)
        found[f"{code} scalar"] = drawn.view(dtype)[0, 0].clone()
    return {**found, "last": torch.empty(0)}


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_every_dtype_at_any_byte(tmp_path, pad):
    tensors = every_dtype()
    checkpoint = write(tmp_path / "a.safetensors", tensors, pad=pad)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            found = checkpoint.tensor(name)
            assert found.shape == tensor.shape
            assert found.dtype == tensor.dtype
            assert bits(found) == bits(tensor) == bits(file.get_tensor(name))
            assert bits(checkpoint.tensor(name, slice(2, 7))) == bits(tensor.reshape(-1)[2:7])


@pytest.mark.parametrize("order", ["abcd", "dcba", "acbd", "a", "e", "aeb", "eb"])
def test_tensors_that_are_joined(tmp_path, order):
    tensors = {name: torch.randn(2, number) for number, name in enumerate("abcd", 1)} | {"e": torch.empty(0, 4)}
    checkpoint = write(tmp_path / "a.safetensors", tensors, pad=2)
    expected = torch.cat([tensors[name].reshape(-1) for name in order])
    assert torch.equal(checkpoint.joined(list(order)), expected)
    checkpoint.rename({name: f"m.{name}" for name in tensors}.get)
    assert torch.equal(checkpoint.joined([f"m.{name}" for name in order]), expected)
    checkpoint.replace("m.b", tensors["b"] + 1)
    changed = {**tensors, "b": tensors["b"] + 1}
    expected = torch.cat([changed[name].reshape(-1) for name in order])
    assert torch.equal(checkpoint.joined([f"m.{name}" for name in order]), expected)


def test_tensors_of_several_files_are_joined(tmp_path):
    first, second = ({f"{file}{number}": torch.randn(3) for number in range(2)} for file in "ab")
    write(tmp_path / "a.safetensors", first)
    write(tmp_path / "b.safetensors", second)
    both = SafetensorsCheckpoint(tmp_path, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert torch.equal(both.joined(["a0", "a1", "b0", "b1"]), torch.cat([*first.values(), *second.values()]))


@pytest.mark.parametrize("order", ["abcd", "acbd", "b"])
def test_a_piece_of_joined_tensors(tmp_path, order):
    tensors = {name: torch.randn(2, number) for number, name in enumerate("abcd", 1)}
    checkpoint = write(tmp_path / "a.safetensors", tensors, pad=2)
    expected = torch.cat([tensors[name].reshape(-1) for name in order])[1:7]
    assert torch.equal(checkpoint.joined(list(order), slice(1, 7)), expected)
    checkpoint.replace("b", tensors["b"])
    assert torch.equal(checkpoint.joined(list(order), slice(1, 7)), expected)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_the_ends_of_tensors(tmp_path, size):
    tensors = {"long": torch.randn(3, 5), "short": torch.ones(1), "empty": torch.empty(0, 2), "other": torch.zeros(9)}
    checkpoint = write(tmp_path / "a.safetensors", tensors, pad=4)
    checkpoint.replace("other", torch.arange(9.0))
    tensors["other"] = torch.arange(9.0)
    for name, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        assert checkpoint.ends(name, size) == data[:size] + data[-size:], name


def test_what_is_read_cannot_change_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint = write(path, {"w": torch.zeros(4)})
    before = path.read_bytes()
    checkpoint.tensor("w").fill_(1.0)
    assert path.read_bytes() == before


def test_whether_there_is_a_name_is_known_without_reading(tmp_path, monkeypatch):
    checkpoint = write(tmp_path / "a.safetensors", {"w": torch.zeros(4)})
    monkeypatch.setattr(checkpoint, "_read", None)
    assert "w" in checkpoint
    assert "v" not in checkpoint
