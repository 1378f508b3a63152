"""Open checkpoints: names, shapes and dtypes are known at once, tensors are read one at a time from a memory map."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

# Dtypes by their names in the headers of safetensors files.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize


class Stand(ABC):
    """A tensor that takes the place of one in a file.

    Attributes:
        entry: Its shape and dtype.
    """

    entry: Entry

    @abstractmethod
    def read(self, piece: slice | None = None) -> Tensor:
        """Return the tensor, or some entries of the flat one; it must not be written to."""


class _Given(Stand):
    """A tensor in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.entry = Entry(tuple(tensor.shape), tensor.dtype)

    @override
    def read(self, piece: slice | None = None) -> Tensor:
        return self._tensor if piece is None else self._tensor.reshape(-1)[piece]


class _Held(Stand):
    """A tensor of a file, under the name that it has there."""

    def __init__(self, owner: "Checkpoint", stored: str, entry: Entry) -> None:
        self._owner = owner
        self._stored = stored
        self.entry = entry

    @override
    def read(self, piece: slice | None = None) -> Tensor:
        return self._owner.read_stored(self._stored, piece)


class Checkpoint(ABC, Mapping[str, Tensor]):
    """A checkpoint as a mapping of names to tensors, which are read on access.

    Tensors are views of a memory map if the format allows it: they must not be written to.

    Attributes:
        source: The path, as its name in messages.
        kind: Description of the format.
        files: The files of the checkpoint.
        entries: Shape and dtype by name, in the order of the file.
        is_task_vector: Whether the tensors are differences to a base model, not weights.
        rest_is_zero: Whether a task vector is zero for tensors that it lacks, as for an adapter.
        task: Name of the task, if the file holds it.
        base: Fingerprint of the base model of a task vector, if the file holds it.
        identity: By which the same file, or the same vector in another bank, is recognised.
        counts: Counts in the header of a task vector: ``samples`` and ``steps``.
        weights: Name of the set of weights that is read, if the file names it.
        sets: Names of all sets of weights in the file.
        ignored: Classes whose objects in the file were left out, and not executed.
        aliases: Further names of tensors listed in the file, each with the name under which the tensor is stored.
        renamed: Descriptions of how the names differ from those in the file.
        classes: Names of classes in the file, in the order of a head's rows.
        left_out: Tensors removed by renaming, by their names in the file.
        is_flat: Whether the names have underscores in place of dots, after their first part.
    """

    def __init__(self, source: Path, kind: str, files: Sequence[Path], entries: dict[str, Entry]) -> None:
        self.source = str(source)
        self.kind = kind
        self.files = list(files)
        self.entries = entries
        self.is_task_vector = False
        self.rest_is_zero = False
        self.task = ""
        self.base: str | None = None
        self.identity = str(source.resolve())
        self.counts: dict[str, float] = {}
        self.weights = ""
        self.sets: list[str] = []
        self.classes: list[str] = []
        self.ignored: list[str] = []
        self.aliases: dict[str, str] = {}
        self.renamed: list[str] = []
        self.left_out: list[str] = []
        self.is_flat = False
        self._in_file: dict[str, str] = {}
        self._replaced: dict[str, Stand] = {}

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Return a stored tensor by its name in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def tensor(self, name: str, piece: slice | None = None) -> Tensor:
        """Return one tensor, on the CPU; it must not be written to.

        Args:
            name: Its name.
            piece: The wanted entries of the flat tensor. Default: all, in the tensor's shape.
        """
        if name in self._replaced:
            return self._replaced[name].read(piece)
        return self.read_stored(self.stored(name), piece)

    def read_stored(self, stored: str, piece: slice | None = None) -> Tensor:
        """Return one tensor by its name in the file, as ``tensor`` does."""
        return self._read(stored) if piece is None else self._read_piece(stored, piece)

    def joined(self, names: Sequence[str], piece: slice | None = None) -> Tensor:
        """Return tensors of one dtype, flat and concatenated; the result must not be written to.

        Args:
            names: Their names.
            piece: The wanted entries of the concatenation. Default: all.
        """
        if len(names) == 1:
            return self.tensor(names[0], piece).reshape(-1)
        return torch.cat([self.tensor(name).reshape(-1) for name in names])[piece or slice(None)]

    def ends(self, name: str, size: int) -> bytes:
        """Return the first and the last bytes of a tensor, or all of them if there are fewer.

        Args:
            name: Its name.
            size: Number of bytes at either end.
        """
        data = raw_bytes(self.tensor(name))
        return bytes(data[:size]) + bytes(data[-size:])

    def stored(self, name: str) -> str:
        """Return the name that a tensor has in the file."""
        return self._in_file.get(name, name)

    def memory(self, name: str) -> object | None:
        """Return a key that is equal for names of one tensor in the file; None if the format has none."""
        return None

    def add_name(self, name: str, present: str) -> None:
        """Add a further name for a tensor.

        Args:
            name: The new name.
            present: An existing name of the tensor.
        """
        self.entries[name] = self.entries[present]
        self._in_file[name] = self.stored(present)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Replace the tensor of a name, without changing the file.

        Args:
            name: The name.
            tensor: The new tensor, on the CPU.
        """
        self.put(name, _Given(tensor))

    def put(self, name: str, stand: Stand) -> None:
        """Replace the tensor of a name, or add one, without changing the file."""
        self.entries[name] = stand.entry
        self._replaced[name] = stand

    def hold(self, name: str) -> Stand:
        """Return the tensor that a name has now, which can be read when the name has another."""
        return self._replaced.get(name) or _Held(self, self.stored(name), self.entries[name])

    def remove(self, name: str) -> None:
        """Remove a name, if it is there, without changing the file."""
        self.entries.pop(name, None)
        self._replaced.pop(name, None)

    def attach(self, base: "Checkpoint") -> None:
        """Give a task vector the base that it belongs to; one that depends on the base's weights needs it to be read.

        Args:
            base: The base model; the names are aligned with it.
        """

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Rename every tensor; those whose new name is None are left out.

        Args:
            new_name: Returns the new name of an old one; new names must be unique.
        """
        names = {name: new_name(name) for name in self.entries}
        self.left_out += [self.stored(name) for name, new in names.items() if new is None]
        self._in_file = {new: self.stored(name) for name, new in names.items() if new is not None}
        self.entries = {new: self.entries[name] for name, new in names.items() if new is not None}
        aliases = ((new_name(name), names.get(kept)) for name, kept in self.aliases.items())
        self.aliases = {name: kept for name, kept in aliases if name is not None and kept is not None}

    def is_difference(self, name: str) -> bool:
        """Return whether a tensor is a difference to the base, not a weight."""
        return self.is_task_vector

    def _read_piece(self, name: str, piece: slice) -> Tensor:
        """Return a flat piece of a stored tensor by its name in the file."""
        return self._read(name).reshape(-1)[piece]

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.entries  # without reading the tensor

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @override
    def __len__(self) -> int:
        return len(self.entries)


class TorchCheckpoint(Checkpoint):
    """The state dict of files that ``torch.save`` wrote.

    Args:
        source: The file or folder given by the user.
        files: The files.
        states: The state dict of every file.
        kind: Description of the format.
        ignored: Classes whose objects in the files were left out.

    Attributes:
        verifiers: Functions by name in the file, called before a tensor is read; they raise if the data is damaged.
    """

    def __init__(
        self,
        source: Path,
        files: Sequence[Path],
        states: Sequence[Mapping[str, Tensor]],
        kind: str,
        ignored: Sequence[str] = (),
    ) -> None:
        self._tensors = {name: tensor.detach() for state in states for name, tensor in state.items()}
        entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        super().__init__(source, kind, files, entries)
        self.ignored = list(dict.fromkeys(ignored))
        self.verifiers: Mapping[str, Callable[[], None]] = {}

    @override
    def memory(self, name: str) -> object | None:
        if name in self._replaced:
            return None
        tensor = self._tensors[self.stored(name)]
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else None

    @override
    def _read(self, name: str) -> Tensor:
        if verify := self.verifiers.get(name):
            verify()
        return self._tensors[name]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    return data


def describe(checkpoint: Checkpoint) -> str:
    """Describe a checkpoint in one line: path, format, weights, number and names of tensors."""
    task = f", {checkpoint.task}" if checkpoint.task else ""
    names = "".join(f", names {how}" for how in checkpoint.renamed)
    size = f"{len(checkpoint)} tensors, {checkpoint.nbytes / 1e6:,.1f} MB"
    return f"{checkpoint.source} ({checkpoint.kind}{task}: {size}{names})"


def float_dtype(name: str) -> torch.dtype:
    """Return a floating-point dtype by its name in PyTorch.

    Raises:
        ValueError: If there is no such dtype, or safetensors does not support it.

    Example:
        >>> float_dtype("bfloat16")
        torch.bfloat16
    """
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
    if name not in known:
        raise ValueError(f"expected a dtype of {', '.join(known)}, got {name!r}")
    return known[name]
