"""The task-vector bank: one safetensors file per task in a folder."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open

from clmerge.weights.io import load_metadata, load_tensors, save_tensors
from clmerge.weights.task_vector import State, TaskVector, check_same_names, check_same_shape

_FILE_NAME = re.compile(r"task_(\d{3,})\.safetensors")


class TaskVectorBank:
    """Keep task vectors on disk, one ``task_000.safetensors`` per task, and read them back one at a time.

    Every file says in its header which task it is, what the task is called, and the fingerprint of the base
    model it was taken from. Files are written atomically.

    Args:
        folder: Where the files are; created by the first ``append``.

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

    @property
    def tasks(self) -> list[int]:
        """Indices of the stored tasks, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_FILE_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
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
        overwrite: bool = False,
    ) -> None:
        """Write the task vector of one task.

        Args:
            task: Index of the task, from 0.
            tau: The task vector.
            name: What the task is called.
            base: Fingerprint of the base model, if known.
            counts: What was counted while the task was trained (``steps``, ``samples``), for rules that weigh tasks
                by it; None for what is not known.
            overwrite: Replace a vector that is already there, as a resumed run does. Default: refuse.

        Raises:
            ValueError: If the task is negative or stored already, or base, names or shapes differ from the
                stored vectors'.
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
            known = self.metadata(other)["base"]
            if base and known and base != known:
                raise ValueError(
                    f"expected task vectors of the base model {known[:12]}... as in {self.path(other)}, got "
                    f"base {base[:12]}... for task {task}; use a new folder for another base model"
                )
        if others:
            self._check_layout(tau, task, others[0])
        known_counts = {key: str(count) for key, count in (counts or {}).items() if count is not None}
        save_tensors(self.path(task), tau, {"task": str(task), "name": name, "base": base or "", **known_counts})

    def metadata(self, task: int) -> dict[str, str]:
        """Header of a stored task vector: task, name, base (empty if unknown), and the counts that were known."""
        self._check_stored(task)
        return {"task": str(task), "name": "", "base": ""} | load_metadata(self.path(task))

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: int) -> TaskVector:
        self._check_stored(task)
        return load_tensors(self.path(task))

    def __iter__(self) -> Iterator[TaskVector]:
        """Read the vectors in task order, one at a time."""
        return (self[task] for task in self.tasks)

    def _check_stored(self, task: int) -> None:
        if not self.path(task).is_file():
            raise IndexError(f"expected one of the tasks {self.tasks} of {self.folder}, got {task}")

    def _check_layout(self, tau: State, task: int, other: int) -> None:
        sources = (f"the task vector of task {task}", str(self.path(other)))
        with safe_open(os.fspath(self.path(other)), framework="pt", device="cpu") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_same_names(tau, stored, sources)
        for name, tensor in tau.items():
            check_same_shape(name, tensor, stored[name], sources)
