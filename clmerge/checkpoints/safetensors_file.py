"""Safetensors files as checkpoints: tensors are views of a memory map."""

import json
import mmap
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from clmerge.checkpoints.class_names import names_in
from clmerge.checkpoints.reader import DTYPES, Checkpoint, Entry
from clmerge.files import parse_json
from clmerge.results.model_facts import ModelFacts
from clmerge.weights.bank import is_bank_header
from clmerge.weights.factored import Product, factor_names, product_shape


class _Place(NamedTuple):
    """Location of a tensor in a memory map."""

    memory: mmap.mmap
    begin: int
    end: int
    entry: Entry

    def flat(self, piece: slice = slice(None), end: int | None = None) -> Tensor:
        """Return a view of some entries of the tensor, or of the tensor and those after it up to ``end``."""
        dtype = self.entry.dtype
        start, stop, _ = piece.indices(((end or self.end) - self.begin) // dtype.itemsize)
        if start >= stop:
            return torch.empty(0, dtype=dtype)
        # The view may begin at any byte, because entries need not be aligned in the file.
        begin = self.begin + start * dtype.itemsize
        return torch.frombuffer(self.memory, dtype=dtype, count=stop - start, offset=begin)


class SafetensorsCheckpoint(Checkpoint):
    """One or several safetensors files.

    Args:
        source: The file or folder given by the user.
        files: The safetensors files; a name may be in one of them only.
        kind: Description of the format.

    Raises:
        ValueError: If a file is damaged, or two files hold the same name.
    """

    def __init__(self, source: Path, files: Sequence[Path], kind: str = "safetensors") -> None:
        entries: dict[str, Entry] = {}
        self._places: dict[str, _Place] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                holder: Any = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"expected a whole safetensors file, got {file}: {error}; copy or download it again"
                ) from error
            header, data_start = _read_header(file)
            self.metadata |= header.get("__metadata__") or {}
            with file.open("rb") as opened:
                # A private map, so that writes cannot reach the file; tensors that are views of it keep it alive.
                memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            for name in holder.offset_keys():
                if name in entries:
                    raise ValueError(
                        f"expected every tensor in one file of {source}, got {name!r} twice, also in {file}"
                    )
                said = header[name]
                entries[name] = Entry(tuple(said["shape"]), _dtype(said["dtype"], name, file))
                begin, end = said["data_offsets"]
                self._places[name] = _Place(memory, data_start + begin, data_start + end, entries[name])
        self._factors: dict[str, tuple[str, str, float]] = {}
        if is_bank := is_bank_header(self.metadata):
            self._factors = factor_names(
                self.metadata, lambda name: entries[name].shape if name in entries else None, str(source)
            )
        for name, (a, b, _) in self._factors.items():
            factors = entries.pop(a), entries.pop(b)
            dtype = torch.float64 if torch.float64 in {factor.dtype for factor in factors} else torch.float32
            entries[name] = Entry(product_shape(factors[0].shape, factors[1].shape), dtype)
        super().__init__(source, kind, files, entries)
        if is_bank:
            self.is_task_vector = True
            self.kind = "task vector"
            self.task = self.metadata["name"]
            self.base = self.metadata["base"] or None
            self.identity = self.metadata["sha256"]
            self.counts = {
                name: float(count)
                for name in ("samples", "steps")
                if (count := self.metadata.get(name, "")).isdecimal() and count.isascii()
            }
        self.classes = _classes(self.metadata, str(source))
        # save_model of the safetensors package writes the names of omitted duplicates into the header.
        self.aliases = {name: kept for name, kept in self.metadata.items() if kept in entries and name not in entries}

    @override
    def _read(self, name: str) -> Tensor:
        if name in self._factors:  # of a task vector that is stored as factors
            a, b, scale = self._factors[name]
            return Product(self._read(a), self._read(b), scale).dense()
        place = self._places[name]
        return place.flat().view(place.entry.shape)

    @override
    def _read_piece(self, name: str, piece: slice) -> Tensor:
        if name in self._factors:
            return super()._read_piece(name, piece)
        return self._places[name].flat(piece)

    @override
    def joined(self, names: Sequence[str], piece: slice | None = None) -> Tensor:
        places = [place for place in map(self._place, names) if place is not None]
        if len(places) < len(names):
            return super().joined(names, piece)
        # Tensors that are adjacent in a file are read as one.
        follows = (a.memory is b.memory and a.end == b.begin for a, b in pairwise(places))
        starts = [0, *(index for index, is_next in enumerate(follows, 1) if not is_next), len(places)]
        runs = [(places[start], places[stop - 1].end) for start, stop in pairwise(starts)]
        piece = piece or slice(None)
        if len(runs) == 1:
            return runs[0][0].flat(piece, runs[0][1])
        return torch.cat([first.flat(end=end) for first, end in runs])[piece]

    @override
    def ends(self, name: str, size: int) -> bytes:
        if (place := self._place(name)) is None:
            return super().ends(name, size)
        memory, begin, end, _ = place
        return memory[begin : min(begin + size, end)] + memory[max(end - size, begin) : end]

    def _place(self, name: str) -> _Place | None:
        """Return the location of a tensor; None if it is stored as factors or was replaced."""
        return None if name in self._replaced else self._places.get(self.stored(name))


def _classes(metadata: dict[str, str], source: str) -> list[str]:
    """Return the names of classes in a header: a JSON list under ``classes``, or what a run's model file says."""
    if facts := ModelFacts.from_metadata(metadata, source):
        return facts.classes
    if not (text := metadata.get("classes", "")).startswith("["):
        return []
    return names_in({"classes": parse_json(text, f"'classes' in the header of {source}")})


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header and the offset of the data.

    A header with two entries for one tensor is refused; the safetensors package uses the last one.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        text = opened.read(size)

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"expected every tensor once in {file}, got {name[:80]!r} twice in its header")
        return found

    try:
        return json.loads(text, object_pairs_hook=once), 8 + size
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"expected a header in JSON, got {file}: {error}; copy or download it again") from error


def _dtype(name: str, tensor: str, file: Path) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(
            f"expected a dtype of {', '.join(DTYPES)}, got {name} for {tensor!r} in {file}; convert the file first"
        )
    return DTYPES[name]
