"""Atomic writing and reading of tensor files: safetensors, and the format of ``torch.save``."""

import json
import os
from collections.abc import Mapping
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clmerge.files import atomic_path
from clmerge.weights.task_vector import State, TaskVector

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def save_tensors(path: str | os.PathLike[str], tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, atomically; equal tensors produce equal files.

    Args:
        path: The file to write.
        tensors: Tensors by name; any device and layout. Tensors that share storage are written one by one.
        metadata: Strings kept in the file's header.

    Raises:
        ValueError: For a dtype that the format does not have.
        OSError: If the file cannot be written, because the disk is full for instance; it names ``path``.
    """
    header: dict[str, object] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # wide first: all are aligned
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"expected a dtype that safetensors has, got {tensor.dtype} for {name!r}; convert it")
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


def load_tensors(path: str | os.PathLike[str]) -> TaskVector:
    """Read all tensors of a safetensors file to the CPU.

    Args:
        path: The file to read.

    Returns:
        Tensors by name.

    Raises:
        ValueError: If the file is not a whole safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(os.fspath(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"expected a safetensors file, got {os.fspath(path)!r}: {error}") from error
    return tensors


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata strings in the header of a safetensors file, without its tensors.

    Args:
        path: The file to read.

    Returns:
        The metadata; empty if the file has none.

    Raises:
        ValueError: If the file is not a whole safetensors file.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got {os.fspath(path)!r}: {error}") from error


def save_torch(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object as ``torch.save`` does, atomically.

    Args:
        path: The file to write.
        obj: The object to save.

    Raises:
        OSError: If the file cannot be written, because the disk is full for instance; it names ``path``.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        remembering = _Remembering(file)
        try:
            torch.save(obj, remembering)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch says "unexpected pos 64 vs 0" to whatever the system said
            if remembering.error is not None:
                raise remembering.error from error
            raise


class _Remembering:
    """A file that remembers the error of a failed write."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: "bytes | memoryview") -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()
