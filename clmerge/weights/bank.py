"""The task-vector bank: one safetensors file per task in a folder."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from clmerge.weights.factored import SCALES, Product, TensorFile, factored
from clmerge.weights.task_vector import (
    LazyVector,
    State,
    TaskVector,
    check_same_names,
    check_same_shape,
    fingerprint,
)
from clmerge.weights.tensor_files import load_metadata, save_tensors

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"task_(\d{3,})\.safetensors")


def is_bank_header(metadata: Mapping[str, str]) -> bool:
    """Return whether a file's header was written by ``TaskVectorBank``.

    Args:
        metadata: Strings of the header; other programs may use some of the same names for something else.
    """
    return {"task", "name", "base"} <= metadata.keys() and bool(_SHA256.fullmatch(metadata.get("sha256", "")))


class TaskVectorBank:
    """Keep task vectors on disk, one ``task_000.safetensors`` per task, and read them back one at a time.

    The header of every file holds the task's index and name, the fingerprint of the vector, and that of its base
    model. Files are written atomically.

    Args:
        folder: Folder of the files; created by the first ``append``.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = TaskVectorBank(folder)
        ...     bank.append(0, {"w": torch.ones(2)}, name="digits 0-1", base="abc")
        ...     (len(bank), bank[0], bank.metadata(0)["name"])
        (1, {'w': tensor([1., 1.])}, 'digits 0-1')
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._verified: dict[int, tuple[int, int]] = {}
        self._headers: dict[int, tuple[tuple[int, int, int], dict[str, str]]] = {}

    @property
    def tasks(self) -> list[int]:
        """Indices of the stored tasks, ascending."""
        try:
            with os.scandir(self.folder) as entries:  # names alone: of a long stream there are thousands
                matches = [_FILE_NAME.fullmatch(entry.name) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in matches if match)

    @property
    def base(self) -> str | None:
        """Fingerprint of the base model of the stored vectors; None while unknown."""
        for task in self.tasks:
            if base := self.metadata(task)["base"]:
                return base
        return None

    def path(self, task: int) -> Path:
        """File of a task, written or not."""
        return self.folder / f"task_{task:03d}.safetensors"

    def append(
        self,
        task: int,
        tau: State,
        *,
        name: str = "",
        base: str | None = None,
        counts: Mapping[str, int | None] | None = None,
        factors: Mapping[str, Product] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the task vector of one task.

        Args:
            task: Index of the task, from 0.
            tau: The task vector.
            name: Name of the task.
            base: Fingerprint of the base model, if known.
            counts: Counts of the task's training (``steps``, ``samples``), for rules that weigh tasks by them; None
                for an unknown count.
            factors: Thin factors of matrices of ``tau``, as LoRA trains them; they are written in place of the matrix
                if they are smaller and their product is bitwise equal.
            overwrite: Replace a stored vector of the task, as a resumed run does. Default: raise an error.

        Raises:
            ValueError: If the task is negative or already stored, or base, names or shapes differ from those of the
                stored vectors.
        """
        if task < 0:
            raise ValueError(f"expected a task index of 0 or more, got {task}")
        tasks = self.tasks
        if task in tasks and not overwrite:
            raise ValueError(
                f"expected a task that is not stored yet, got task {task}, which {self.path(task)} holds; "
                "pass overwrite=True to replace it"
            )
        others = [other for other in tasks if other != task]
        for other in others:
            known = self._first_header(other)["base"]
            if base and known and base != known:
                raise ValueError(
                    f"expected task vectors of the base model {known[:12]}... as in {self.path(other)}, got "
                    f"base {base[:12]}... for task {task}; use a new folder for another base model"
                )
        if others:
            self._check_layout(tau, task, others[0])
        header = {"task": str(task), "name": name, "base": base or "", "sha256": fingerprint(tau)}
        known_counts = {key: str(count) for key, count in (counts or {}).items() if count is not None}
        tensors, scales = factored(tau, factors or {})
        save_tensors(self.path(task), tensors, header | known_counts | scales)
        self._headers.pop(task, None)

    def check_next(self, vectors: Sequence[str], *, base: str | None, again: bool) -> None:
        """Check, before a task is trained, that its vector can be appended.

        The header of a file is read once: one that is exchanged later is noticed when it is read.

        Args:
            vectors: Fingerprints of the task vectors merged so far, in order.
            base: Fingerprint of the base model.
            again: Whether the task's own vector may already be stored, after an interruption.

        Raises:
            RuntimeError: If the bank holds more tasks than were merged, other vectors, or vectors of another base.
        """
        advice = (
            "use a new folder, or go on with the tasks it holds: merge.load_checkpoint(...) of the last one, or "
            "fit(ckpt_path=...) to resume"
        )
        headers = {task: self._first_header(task) for task in self.tasks}
        if more := [task for task in headers if task >= len(vectors) + again]:
            raise RuntimeError(
                f"expected no vector of a task that is not merged yet, got {self.path(more[0])} after {len(vectors)} "
                f"merged tasks; {advice}"
            )
        if base and (known := next((header["base"] for header in headers.values() if header["base"]), base)) != base:
            raise RuntimeError(
                f"expected task vectors of the base model {base[:12]}..., got {self.folder} with some of "
                f"{known[:12]}...; {advice}"
            )
        for task, header in headers.items():
            found = header.get("sha256")
            if task < len(vectors) and found and vectors[task] not in ("unknown", found):
                raise RuntimeError(
                    f"expected the vector that was merged as task {task}, got another in {self.path(task)}; {advice}"
                )

    def metadata(self, task: int) -> dict[str, str]:
        """Header of a stored task vector: task, name, base (empty if unknown), its own sha256, and known counts."""
        self._check_stored(task)
        status = self.path(task).stat()
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        known, header = self._headers.get(task, (None, {}))
        if known != state:
            header = {"task": str(task), "name": "", "base": ""} | load_metadata(self.path(task))
            self._headers[task] = (state, header)
        return dict(header)

    def _first_header(self, task: int) -> Mapping[str, str]:
        """Return the header as it was when it was first read: every task looks at those of all earlier ones."""
        return self._headers[task][1] if task in self._headers else self.metadata(task)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: int) -> TaskVector:
        """Read one task vector.

        Raises:
            IndexError: If the task is not stored.
            ValueError: If the vector does not match its fingerprint.
        """
        self._check_stored(task)
        with TensorFile(self.path(task)) as file:
            tau = {name: file.read(name) for name in file.names()}
            expected, has_products = file.metadata.get("sha256"), SCALES in file.metadata
        status = self.path(task).stat()
        known = (status.st_mtime_ns, status.st_size)
        # Products may differ in the last bits on another machine.
        if expected is not None and not has_products and self._verified.get(task) != known:
            if fingerprint(tau) != expected:
                raise ValueError(
                    f"expected the task vector {expected[:12]}... in {self.path(task)}, as its header says, got "
                    "another: the file was damaged or changed; put the file back"
                )
            self._verified[task] = known
        return tau

    def __iter__(self) -> Iterator[TaskVector]:
        """Read the vectors in task order, one at a time."""
        return (self[task] for task in self.tasks)

    def _check_stored(self, task: int) -> None:
        if not self.path(task).is_file():
            raise IndexError(f"expected one of the tasks {self.tasks} of {self.folder}, got {task}")

    def _check_layout(self, tau: State, task: int, other: int) -> None:
        sources = (f"the task vector of task {task}", str(self.path(other)))
        with TensorFile(self.path(other)) as file:
            shapes = {name: torch.empty(file.shape(name), device="meta") for name in file.names()}
        check_same_names(tau, shapes, sources)
        for name, tensor in tau.items():
            check_same_shape(name, tensor, shapes[name], sources)


class BankVector(LazyVector):
    """A reference to a stored task vector; its tensors are views of the file, which take no memory of their own.

    Matrices that are stored as factors are computed on access.

    Args:
        bank: The bank that holds the vector when it is read.
        task: Index of the task.
        sha256: Fingerprint of the vector, by which a replaced vector is detected. Default: that of the stored one.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bank = TaskVectorBank(folder)
        ...     bank.append(0, {"w": torch.ones(2)})
        ...     BankVector(bank, 0)["w"]
        tensor([1., 1.])
    """

    def __init__(self, bank: TaskVectorBank, task: int, sha256: str | None = None) -> None:
        self.bank = bank
        self.task = task
        self.sha256 = bank.metadata(task)["sha256"] if sha256 is None else sha256

    @override
    def names(self) -> list[str]:
        with self._open() as file:
            return file.names()

    @override
    def __getitem__(self, name: str) -> Tensor:
        """Read one parameter.

        Raises:
            FileNotFoundError: If the vector is not in the bank.
            ValueError: If the stored vector has another fingerprint.
            KeyError: If the vector has no such parameter.
        """
        with self._open() as file:
            if name not in file.names():
                raise KeyError(name)
            return file.read(name)

    def _open(self) -> TensorFile:
        path = self.bank.path(self.task)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected the task vector of task {self.task} in {path}, where a merger reads it, got no file; put "
                "it back, or merge anew"
            )
        file = TensorFile(path)
        found = file.metadata.get("sha256", "none")
        if found != self.sha256:
            raise ValueError(
                f"expected the task vector {self.sha256[:12]}... in {path}, as it was merged, got {found[:12]}...; put "
                "it back, or merge anew"
            )
        return file
