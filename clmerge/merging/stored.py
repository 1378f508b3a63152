"""Rules whose state grows with the number of tasks: every task vector is kept, in memory or as a reference."""

import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.merging.accumulators import Slots, copied
from clmerge.merging.checks import Shapes, num_entries
from clmerge.merging.merger import Merger
from clmerge.merging.sparsify.quantise import Quantise
from clmerge.merging.sparsify.sparsifier import Sparsified, Sparsifier
from clmerge.merging.step import Step
from clmerge.weights.bank import BankVector, TaskVectorBank
from clmerge.weights.task_vector import CheckedVector, LazyVector, State


class _Kept(NamedTuple):
    """One kept task vector: tensors in memory, plain or packed, or a reference that reads them on access."""

    task: int
    parts: dict[str, Slots] | None
    reference: State | None = None


class Stored(Merger):
    """Keep every task vector, in order of arrival, and read them parameter by parameter.

    The vectors stay in memory, packed after ``Quantise``. Of a vector that knows where it lies, a ``LazyVector`` or a
    ``CheckedVector`` that is ``stored``, the rule keeps that reference and sparsifies the vector again at every read.
    A task that is taken out leaves nothing behind.
    """

    exact_online = False
    removable = True
    keeps_vectors = True

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[_Kept] = []
        self._wide: frozenset[str] = frozenset()  # names of float64 parameters
        self._sparsifiers: list[Sparsifier] = []

    # What rules use

    def _position(self, task: int) -> int:
        """Return the position of a task in the order of arrival."""
        if task not in self.tasks:
            raise ValueError(f"expected one of the merged tasks {list(self.tasks)}, got {task}")
        return self.tasks.index(task)

    def _taus(self, slots: Slots) -> list[Tensor]:
        """Return the task vectors in a parameter's slots, or in a piece of them, in order of arrival."""
        return [slots[f"task{position}"] for position in range(len(slots))]

    def _tau(self, position: int, name: str) -> Tensor:
        """Return a parameter of the task vector at this position; callers must not change it."""
        kept = self._kept[position]
        if kept.reference is not None:
            return self._cast(name, kept.reference[name])
        assert kept.parts is not None
        parts, packing = kept.parts[name], self._packing
        return parts["tau"] if packing is None else packing.unpack(parts, self._shapes[name])

    @override
    def _held(self) -> Mapping[str, Slots]:
        return _Shelves(self)

    # How vectors are kept

    @override
    def to(self, device: torch.device | str) -> Self:
        super().to(device)
        self._kept = [self._moved(kept) for kept in self._kept]
        return self

    @override
    def state_size(self, shapes: Shapes, num_tasks: int) -> int:
        """Return the bytes that the kept vectors take in memory; references count as none.

        Args:
            shapes: Shapes of the merged parameters by name.
            num_tasks: Number of merged task vectors.
        """
        if any(kept.reference is not None for kept in self._kept):
            return 0
        packing = self._packing
        if packing is None:
            return 4 * num_entries(shapes) * num_tasks
        return num_tasks * sum(packing.packed_bytes(prod(shape)) for shape in shapes.values())

    @property
    def _packing(self) -> Quantise | None:
        """Return the quantiser that packs vectors kept in memory, if any."""
        last = self._sparsifiers[-1] if self._sparsifiers else None
        return last if isinstance(last, Quantise) else None

    @override
    def _sparsify_with(self, sparsifiers: list[Sparsifier]) -> bool:
        self._sparsifiers = sparsifiers
        return True

    @override
    def _float_dtypes(self) -> dict[str, torch.dtype]:
        return {name: torch.float64 if name in self._wide else torch.float32 for name in self._shapes}

    @override
    def _fold_in(self, vector: State, shapes: Shapes, step: Step) -> Any:
        plan = self._plan(vector, step)
        if step.sign < 0:
            self._kept = [kept for kept in self._kept if kept.task != step.task]
            return plan
        if not self._kept:
            self._wide = frozenset(name for name in vector if vector[name].dtype == torch.float64)
        stored = vector.stored if isinstance(vector, CheckedVector) else vector
        if isinstance(stored, LazyVector):
            kept = _Kept(step.task, None, self._sparsified(stored, step.task))
        else:
            kept = _Kept(step.task, self._parts(vector, step.task))
        self._kept = [*self._kept, kept]
        return plan

    def _sparsified(self, vector: State, task: int) -> State:
        for sparsifier in self._sparsifiers:
            vector = Sparsified(vector, sparsifier, task)
        return vector

    def _parts(self, vector: State, task: int) -> dict[str, Slots]:
        """Return copies of a task vector, sparsified, and packed if the rule quantises."""
        packing = self._packing
        for sparsifier in self._sparsifiers if packing is None else self._sparsifiers[:-1]:
            vector = Sparsified(vector, sparsifier, task)
        taus = ((name, self._cast(name, vector[name])) for name in vector)
        return {name: {"tau": tau.clone()} if packing is None else packing.pack(tau) for name, tau in taus}

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        dtype = torch.float64 if name in self._wide else torch.float32
        return tensor.detach().to(self._device or tensor.device, dtype).contiguous()

    def _moved(self, kept: _Kept) -> _Kept:
        """Return a copy on the rule's device; a reference is returned unchanged."""
        return kept if kept.parts is None else _Kept(kept.task, copied(kept.parts, self._device))

    @override
    def _join(self, other: Self) -> None:
        if not self.num_tasks:
            self._wide = other._wide
        self._kept = self._kept + [self._moved(kept) for kept in other._kept]

    # State

    @override
    def _extras(self) -> dict[str, Any]:
        # Numbered instead of listed, so that tensors are found in the state like all others.
        kept = {str(position): self._described(kept) for position, kept in enumerate(self._kept)}
        return super()._extras() | {"wide": sorted(self._wide), "kept": kept}

    def _described(self, kept: _Kept) -> dict[str, Any]:
        """Return the saved form of one task: copies of its tensors, or its bank and fingerprint."""
        if kept.parts is not None:
            return {"task": kept.task, "parts": copied(kept.parts)}
        vector = kept.reference
        while isinstance(vector, Sparsified):
            vector = vector.vector
        if not isinstance(vector, BankVector):
            raise TypeError(
                f"expected task vectors in memory or in a bank to save {self!r}, got {type(vector).__name__}"
            )
        folder = str(vector.bank.folder.resolve())
        return {"task": kept.task, "folder": folder, "stored": vector.task, "sha256": vector.sha256}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by ``state_dict``; further merging is bitwise the same as without interruption.

        Args:
            state: State from ``state_dict`` of a merger of the same class and settings.

        Raises:
            ValueError: If it belongs to another rule or other settings, tensors are missing, or it does not say where
                its task vectors lie; ``relocated`` says it. The state is then unchanged.
        """
        packing = self._packing
        wanted = {
            name: {"tau": tuple(shape)} if packing is None else packing.packed_shapes(tuple(shape))
            for name, shape in state.get("shapes", {}).items()
        }
        for kept in state.get("extras", {}).get("kept", {}).values():
            parts = kept.get("parts")
            if parts is None:
                if not kept["folder"]:
                    raise ValueError(
                        f"expected the folder of the bank with the task vectors in the state of {self!r}, got none, as "
                        "it was saved beside them; name it: MergeCallback(bank=...), or relocated(state, '', folder)"
                    )
            elif {name: {part: tuple(t.shape) for part, t in slots.items()} for name, slots in parts.items()} != wanted:
                raise ValueError(
                    f"expected accumulators of the parameters of task {kept['task']} in the state of {self!r}, got "
                    "other names or shapes; the checkpoint is damaged or of another version"
                )
        super().load_state_dict(state)

    @override
    def _load_extras(self, extras: dict[str, Any]) -> None:
        super()._load_extras(extras)
        described = extras.get("kept", {})
        self._wide = frozenset(extras.get("wide", ()))
        self._kept = [self._restored(described[str(position)]) for position in range(len(described))]

    def _restored(self, described: dict[str, Any]) -> _Kept:
        task = described["task"]
        if "parts" in described:
            with torch.inference_mode(False):
                return _Kept(task, copied(described["parts"], self._device))
        vector = BankVector(TaskVectorBank(described["folder"]), described["stored"], described["sha256"])
        return _Kept(task, None, self._sparsified(vector, task))


def relocated(state: Any, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> Any:
    """Return a saved state with its kept task vectors in another folder: the bank was moved.

    Args:
        state: State of one merger, or of several in dictionaries; it is not changed.
        old: Folder that the state names: an absolute path, or ``""`` for the bank it was saved beside.
        new: Folder of the bank now.

    Example:
        >>> relocated({"kept": {"0": {"task": 0, "folder": "/old", "stored": 0, "sha256": "ab"}}}, "/old", "/new")
        {'kept': {'0': {'task': 0, 'folder': '/new', 'stored': 0, 'sha256': 'ab'}}}
    """
    if not isinstance(state, dict):
        return state
    if state.keys() == {"task", "folder", "stored", "sha256"}:
        return state | {"folder": str(new)} if state["folder"] == str(old) else state
    return {key: relocated(value, old, new) for key, value in state.items()}


class _Shelves(Mapping[str, Slots]):
    """The kept vectors by parameter; a parameter is read on access and not cached."""

    def __init__(self, merger: Stored) -> None:
        self._merger = merger

    @override
    def __getitem__(self, name: str) -> Slots:
        return {f"task{position}": self._merger._tau(position, name) for position in range(self._merger.num_tasks)}

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._merger._shapes)

    @override
    def __len__(self) -> int:
        return len(self._merger._shapes)
