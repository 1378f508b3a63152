"""Write a safetensors file one tensor at a time: the header first, then each tensor's data at its offset."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from clmerge.checkpoints.reader import DTYPES, Entry, raw_bytes
from clmerge.files import atomic_path

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes to which the data is aligned, as in files of the safetensors package


class SafetensorsWriter:
    """A safetensors file being written; ``put`` writes tensors at their offsets, and may write them again.

    Args:
        path: The file, which must not exist yet.
        entries: Shape and dtype of every tensor. Wider dtypes are stored first; otherwise the order is kept.
        metadata: Strings of the header. ``close`` may replace them by others of the same length.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self._entries = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
        self._offsets: dict[str, int] = {}
        for name, entry in entries.items():
            if entry.dtype not in _NAMES:
                raise ValueError(
                    f"expected a dtype that safetensors has, got {entry.dtype} for {name!r}; convert it first"
                )
        position = 0
        for name, entry in self._entries.items():
            self._offsets[name] = position
            position += entry.nbytes
        self.nbytes = position
        self._tensors = self._described()
        header = self._header(metadata)
        self._data_start = len(header)
        self._path = path
        self._missing = set(entries)
        self._file = path.open("w+b")
        self._file.write(header)
        self._position = 0  # offset in the data

    def put(self, names: Sequence[str], flat: Tensor) -> None:
        """Write tensors.

        Args:
            names: Some of the entries.
            flat: Their data, concatenated, of the same dtype and size.

        Raises:
            ValueError: If dtype or size differ from those of the entries.
        """
        entries = [self._entries[name] for name in names]
        numel = sum(entry.numel for entry in entries)
        if {entry.dtype for entry in entries} != {flat.dtype} or numel != flat.numel():
            raise ValueError(
                f"expected {numel} entries of {entries[0].dtype} for {names[0]!r}, got {flat.numel()} of {flat.dtype}"
            )
        data, done = raw_bytes(flat), 0
        for name, entry in zip(names, entries, strict=True):
            start, stop = self._offsets[name], done + entry.nbytes
            if start != self._position:  # seek only if needed: it flushes the buffer of small tensors
                self._file.seek(self._data_start + start)
            self._file.write(data[done:stop])
            self._position = start + entry.nbytes
            done = stop
        self._missing.difference_update(names)

    def data_sha256(self) -> str:
        """Return the SHA-256 of everything after the header."""
        self._file.flush()
        return sha256_of(self._path, skip=self._data_start)

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write the final header and close the file.

        Args:
            metadata: Strings of the header, with the same total length as those given at the start.

        Raises:
            RuntimeError: If a tensor is missing, or the header has another length.
        """
        header = self._header(metadata)
        if self._missing or len(header) != self._data_start:
            raise RuntimeError(
                f"expected all tensors and a header of the same length, got {sorted(self._missing)[:3]} missing"
            )
        self._file.seek(0)
        self._file.write(header)
        self._file.close()

    def abandon(self) -> None:
        """Close the file unfinished."""
        self._file.close()

    def _described(self) -> bytes:
        """Return the part of the header that describes the tensors."""
        described = {
            name: {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": (start, start + entry.nbytes)}
            for (name, entry), start in zip(self._entries.items(), self._offsets.values(), strict=True)
        }
        return _as_json(described)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        # Join two JSON objects: the metadata may change until the file is closed; the large description is reused.
        text = _as_json({"__metadata__": dict(sorted(metadata.items()))})
        text = text[:-1] + b"," + self._tensors[1:] if self._entries else text
        text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


@contextmanager
def new_safetensors(
    path: str | os.PathLike[str], entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Iterator[SafetensorsWriter]:
    """Write ``path`` tensor by tensor; it exists only if the block ends without an error and the writer was closed.

    Args:
        path: The finished file.
        entries: Shape and dtype of every tensor.
        metadata: Strings of the header.
    """
    with atomic_path(path) as temporary:
        writer = SafetensorsWriter(temporary, entries, metadata)
        try:
            yield writer
        finally:
            writer.abandon()


def _as_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_of(path: str | os.PathLike[str], *, skip: int = 0) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        path: The file.
        skip: Number of bytes to leave out at the beginning.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with Path(path).open("rb", buffering=0) as file:
        file.seek(skip)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def data_start(path: str | os.PathLike[str]) -> int:
    """Return the offset of the data in a safetensors file."""
    with Path(path).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
