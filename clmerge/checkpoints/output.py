"""Write a merge, completely or not at all, as one safetensors file or a folder of shards with an index."""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from clmerge.checkpoints.adapter import CONFIG, WEIGHTS
from clmerge.checkpoints.ledger import ADAPTER, INDEX, KEY, ONE_FILE, Ledger
from clmerge.checkpoints.reader import Entry
from clmerge.checkpoints.writer import SafetensorsWriter, new_safetensors, sha256_of
from clmerge.files import atomic_folder, write_json_atomic
from clmerge.weights.paths import what_it_is

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PLAIN = {"format": "pt"}  # the ledger of shards is in the index
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Output(Protocol):
    """The destination of a merge."""

    def put(self, names: Sequence[str], flat: Tensor) -> None:
        """Write tensors of one dtype from their concatenated entries; tensors may be written again."""

    def finish(self, ledger: Ledger, *, hashes: bool) -> None:
        """Add the hashes of the written data to the ledger, and write it."""


class _OneFile:
    def __init__(self, writer: SafetensorsWriter) -> None:
        self._writer = writer
        self.put = writer.put

    def finish(self, ledger: Ledger, *, hashes: bool) -> None:
        if hashes:
            ledger.result_sha256 = self._writer.data_sha256()
        self._writer.close(ledger.metadata())


class _Shards:
    def __init__(
        self,
        folder: Path,
        entries: Mapping[str, Entry],
        writers: Mapping[str, SafetensorsWriter],
        holders: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._entries = entries
        self._writers = writers
        self._holders = holders

    def put(self, names: Sequence[str], flat: Tensor) -> None:
        done = 0
        for file, group in groupby(names, self._holders.__getitem__):
            inside = list(group)
            stop = done + sum(self._entries[name].numel for name in inside)
            self._writers[file].put(inside, flat[done:stop])
            done = stop

    def finish(self, ledger: Ledger, *, hashes: bool) -> None:
        ledger.result_sha256 = None
        for file, writer in self._writers.items():
            writer.close(_PLAIN)
            ledger.shards[file] = sha256_of(self._folder / file) if hashes else None
        size = sum(writer.nbytes for writer in self._writers.values())
        metadata = {"total_size": size, KEY: asdict(ledger)}
        write_json_atomic(self._folder / INDEX, {"metadata": metadata, "weight_map": dict(self._holders)})


@contextmanager
def new_output(
    path: Path,
    entries: Mapping[str, Entry],
    ledger: Ledger,
    *,
    shard_bytes: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Iterator[Output]:
    """Write a merged model; it exists only if the block ends without an error.

    Args:
        path: The file, or with ``shard_bytes`` or ``config`` the folder.
        entries: Shape and dtype of every tensor.
        ledger: The ledger so far; values added later must have the length of their placeholders.
        shard_bytes: Largest number of tensor bytes per file; if given, write a folder in Hugging Face's layout. A
            larger tensor has a file of its own. Files of an earlier merge there are replaced, others stay.
        config: Configuration of an adapter; if given, write a folder as PEFT does.
    """
    if config is not None:
        with atomic_folder(path, replaces=_is_adapter, last=CONFIG) as folder:
            write_json_atomic(folder / CONFIG, dict(config))
            with new_safetensors(folder / ADAPTER, entries, ledger.metadata()) as writer:
                yield _OneFile(writer)
        return
    if shard_bytes is None:
        with new_safetensors(path, entries, ledger.metadata()) as writer:
            yield _OneFile(writer)
        return
    holders = split(entries, shard_bytes)
    with atomic_folder(path, replaces=_is_weights, last=INDEX) as folder:
        if len(set(holders.values())) == 1:
            with new_safetensors(folder / ONE_FILE, entries, ledger.metadata()) as writer:
                yield _OneFile(writer)
            return
        with ExitStack() as stack:
            writers = {}
            for file in dict.fromkeys(holders.values()):
                inside = {name: entry for name, entry in entries.items() if holders[name] == file}
                writers[file] = SafetensorsWriter(folder / file, inside, _PLAIN)
                stack.callback(writers[file].abandon)
            yield _Shards(folder, entries, writers, holders)


def split(entries: Mapping[str, Entry], shard_bytes: int) -> dict[str, str]:
    """Return the file name of every tensor; files are filled in order.

    Args:
        entries: Shape and dtype of every tensor.
        shard_bytes: Largest number of bytes per file, except for a single larger tensor.

    Example:
        >>> import torch
        >>> entries = {name: Entry((2,), torch.float32) for name in "abc"}
        >>> split(entries, 16)["c"]
        'model-00002-of-00002.safetensors'
    """
    numbers, number, filled = {}, 0, 0
    for name, entry in entries.items():
        if not number or filled + entry.nbytes > shard_bytes:
            number, filled = number + 1, 0
        filled += entry.nbytes
        numbers[name] = number
    return {name: f"model-{number:05}-of-{max(numbers.values()):05}.safetensors" for name, number in numbers.items()}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB`` (10^9) or ``2 GiB`` (2^30).

    Raises:
        ValueError: If ``text`` is not a size.

    Example:
        >>> parse_size("1.5GB"), parse_size("2MiB")
        (1500000000, 2097152)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    exact = float(match[1]) * _UNITS[match[2].upper()] if match and match[2].upper() in _UNITS else 0.0
    size = int(exact) if math.isfinite(exact) else 0
    if size < 1:
        raise ValueError(f"expected a size such as 5GB or 500MiB, got {text[:40]!r}")
    return size


def existing(path: str | os.PathLike[str], kind: Literal["file", "shards", "adapter"]) -> Path | None:
    """Return the existing file that a merge would replace: the file, or the first file of its kind in the folder."""
    path = Path(path)
    if kind == "file":
        return path if path.exists() or path.is_symlink() else None
    is_ours = _is_weights if kind == "shards" else _is_adapter
    return next((file for file in sorted(path.iterdir()) if is_ours(file.name)), None) if path.is_dir() else None


def check_target(path: Path, ledger: Ledger, *, nbytes: int, is_folder: bool) -> None:
    """Raise a ValueError if the output has a wrong name, is among the inputs, or does not fit on the disk."""
    if "\0" in str(path):
        raise ValueError(f"expected the name of an output, got {str(path)!r}, which has a null byte")
    if not is_folder and (path.suffix != ".safetensors" or path.is_dir()):
        raise ValueError(
            f"expected an output that ends in .safetensors, got {path}; pass --shard-size to write a folder"
        )
    if is_folder and (path.suffix == ".safetensors" or path.is_file()):
        raise ValueError(
            f"expected a folder to write to, got {path}; leave --shard-size and --lora-rank out to write one file"
        )
    for file in (Path(file.path).resolve() for file in ledger.files):
        if path.resolve() in (file, file.parent if is_folder else file):
            raise ValueError(f"expected an output beside the inputs, got {path} with the input {file}; name another")
    there = next(place for place in (path, *path.absolute().parents) if what_it_is(place) != "nothing")
    if there != path and not there.is_dir():
        raise ValueError(f"expected a folder to write {path} to, got {there}, which is a {what_it_is(there)}")
    if (free := shutil.disk_usage(there).free) < nbytes:
        raise ValueError(f"expected room for {nbytes:,} bytes of {path} in {there}, got {free:,}; free some")


def _is_adapter(name: str) -> bool:
    return name in (*WEIGHTS, CONFIG)


def _is_weights(name: str) -> bool:
    return name in (ONE_FILE, INDEX) or _SHARD.fullmatch(name) is not None
