"""The run folder: one atomic manifest is the truth, everything else can be made from it or is a view of it."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

import clmerge
from clmerge.names import file_name
from clmerge.weights import atomic_path, load_tensors, save_tensors, write_json_atomic

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass
class Manifest:
    """What a run has committed.

    Attributes:
        trained: Tasks whose training and merge are committed.
        evaluated: Tasks whose evaluation is committed; ``trained`` or one less.
        state: Folder of the committed state, relative to the run folder, or None before the first task.
        step: Optimizer steps taken so far, over all tasks.
        epochs: Epochs trained so far, over all tasks.
        branch: Fits of the current task that are committed, where a task is trained in branches.
        wandb_id: Identity of the run in W&B, kept over a resume.
        results: The results so far, in the form of ``results.json``.
        finished: Whether the run is complete.
    """

    trained: int = 0
    evaluated: int = 0
    state: str | None = None
    step: int = 0
    epochs: int = 0
    branch: int = 0
    wandb_id: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    schema: int = SCHEMA
    clmerge: str = clmerge.__version__


class RunFolder:
    """Paths of a run and its commits.

    A commit writes new files beside the old ones and then replaces the manifest in one step, so that a run
    killed at any instant finds either the state before or the state after, never a mixture.

    Args:
        path: The folder.
        writes: Whether this process writes (rank zero) or only reads.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.manifest = Manifest()

    @classmethod
    def create(cls, path: str | Path, *, writes: bool = True) -> "RunFolder":
        """Start a run in a new or empty folder.

        Args:
            path: The folder; missing parents are made.
            writes: Whether this process writes; if not, nothing is checked or made.

        Raises:
            FileExistsError: If there is something at ``path`` already.
        """
        run = cls(path, writes=writes)
        if writes:
            if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
                resume = f", or continue that run with --resume {run.path}"
                raise FileExistsError(
                    f"expected a new or empty run folder, got {run.path}, which exists: name another with "
                    f"--run_dir{resume if (run.path / MANIFEST).is_file() else ''}"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            run.commit()
        return run

    @classmethod
    def open(cls, path: str | Path, *, writes: bool = True) -> "RunFolder":
        """Open a run that exists, and tidy up after it if it was killed.

        Args:
            path: The folder.
            writes: Whether this process writes; if not, nothing is changed.

        Raises:
            FileNotFoundError: If there is no run at ``path``.
            ValueError: If the manifest is damaged or was written by another version.
        """
        run = cls(path, writes=writes)
        file = run.path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"expected a run folder with a {MANIFEST}, got {run.path}")
        run.manifest = _read_manifest(file)
        if writes:
            run._remove_leftovers()
            run._write_results()
        return run

    @property
    def config(self) -> Path:
        """The resolved configuration that re-runs the run."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """The results, for scripts."""
        return self.path / "results.json"

    @property
    def bank(self) -> Path:
        """The task vectors of the run."""
        return self.path / "bank"

    def unmerged(self, task: int) -> Path:
        """What belongs to a task's vector and is not merged; not there where a task has nothing of the kind."""
        return self.path / "unmerged" / f"task_{task:03d}.safetensors"

    @property
    def plots(self) -> Path:
        """Pictures of the results."""
        return self.path / "plots"

    @property
    def logs(self) -> Path:
        """What the loggers write."""
        return self.path / "logs"

    def checkpoint(self, task: int, branch: int = 0) -> Path:
        """Lightning's checkpoint of the last completed epoch of a task, or a branch of it, in training."""
        return self.path / "checkpoints" / f"task_{task:03d}{f'_branch_{branch:03d}' * (branch > 0)}.ckpt"

    def branch(self, task: int, done: int) -> Path:
        """State between two branches of a task."""
        return self.path / "state" / f"task_{task:03d}_branch_{done:03d}.pt"

    def model(self, name: str) -> Path:
        """Final weights of one merger."""
        return self.path / "model" / f"{file_name(name)}.safetensors"

    def keep_unmerged(self, task: int, state: Mapping[str, Tensor]) -> None:
        """Keep what goes with a task's vector in the bank: its head and running statistics, where there are any."""
        if self.writes and state:
            self.unmerged(task).parent.mkdir(exist_ok=True)
            save_tensors(self.unmerged(task), state)

    def commit(self) -> None:
        """Make the manifest as it is in memory the truth."""
        if self.writes:
            write_json_atomic(self.path / MANIFEST, asdict(self.manifest))
            self._write_results()

    def commit_state(self, task: int, module: Mapping[str, Tensor], accumulators: Mapping[str, Any]) -> None:
        """Commit a task that was trained and merged.

        Args:
            task: Index of the task.
            module: The model's training weights by name, buffers included.
            accumulators: State of the mergers; tensors and primitives that ``weights_only`` loading accepts.
        """
        folder = Path("state") / f"task_{task:03d}"
        if self.writes:
            target = self.path / folder
            target.mkdir(parents=True, exist_ok=True)
            save_tensors(target / "module.safetensors", module)
            with atomic_path(target / "accumulators.pt") as temporary:
                torch.save(dict(accumulators), temporary)
        self.manifest.state = folder.as_posix()
        self.manifest.trained = task + 1
        self.manifest.branch = 0
        self.commit()
        if self.writes:
            self._remove_leftovers()

    def commit_branch(self, task: int, done: int, state: Mapping[str, Any]) -> None:
        """Commit a branch of a task.

        Args:
            task: Index of the task.
            done: Branches of the task that are done.
            state: Tensors and primitives that ``weights_only`` loading accepts.
        """
        if self.writes:
            self.branch(task, done).parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.branch(task, done)) as temporary:
                torch.save(dict(state), temporary)
        self.manifest.branch = done
        self.commit()
        if self.writes:
            self._remove_leftovers()

    def load_branch(self) -> dict[str, Any]:
        """Return what the last ``commit_branch`` of the current task took, on the CPU."""
        file = self.branch(self.manifest.trained, self.manifest.branch)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the last ``commit_state`` took: the module's weights and the accumulators, on the CPU.

        Raises:
            RuntimeError: Before the first ``commit_state``.
        """
        accumulators = torch.load(self._state / "accumulators.pt", map_location="cpu", weights_only=True)
        return load_tensors(self._state / "module.safetensors"), accumulators

    def load_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the module's weights and theta_0, on the CPU; accumulators are not read.

        Raises:
            RuntimeError: Before the first ``commit_state``.
        """
        state = torch.load(self._state / "accumulators.pt", map_location="cpu", weights_only=True, mmap=True)
        return load_tensors(self._state / "module.safetensors"), {k: v.clone() for k, v in state["base"].items()}

    @property
    def _state(self) -> Path:
        if self.manifest.state is None:
            raise RuntimeError(f"expected a committed task in {self.path}, got none")
        return self.path / self.manifest.state

    def _write_results(self) -> None:
        if self.manifest.results:
            write_json_atomic(self.results, self.manifest.results)

    def _remove_leftovers(self) -> None:
        """Remove states and checkpoints that the manifest has left behind, and half-written files."""
        keep = {self.path / self.manifest.state} if self.manifest.state is not None else set()
        if not self.manifest.finished:
            task, branch = self.manifest.trained, self.manifest.branch
            keep |= {self.checkpoint(task, branch), self.branch(task, branch)}
        for folder in ("state", "checkpoints"):
            for pattern in ("task_*", ".task_*.tmp"):  # a checkpoint callback of the user may write here, too
                for found in sorted((self.path / folder).glob(pattern)):
                    if found not in keep:
                        shutil.rmtree(found) if found.is_dir() else found.unlink()
        for found in sorted(self.path.glob(".*.tmp")):
            found.unlink()


def _read_manifest(file: Path) -> Manifest:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a manifest in JSON, got {file}, which is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ValueError(
            f"expected manifest schema {SCHEMA} in {file}, got {schema!r}; "
            "resume with the version of clmerge that wrote it"
        )
    if unknown := sorted(set(found) - {f.name for f in fields(Manifest)}):
        raise ValueError(
            f"expected a manifest of clmerge {clmerge.__version__}, got unknown entries {unknown} in {file}; "
            f"resume with the version that wrote it ({found.get('clmerge', 'not recorded')})"
        )
    return Manifest(**found)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints to a temporary file in the same folder, flush it, and rename it.

    Lightning's own atomic save goes through the system's temporary folder, where the final move can be a copy
    that a kill leaves half done, and it does not flush.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` to ``path``, or leave what was there.

        Raises:
            TypeError: For ``storage_options``, which a local file does not have.
        """
        if storage_options is not None:
            raise TypeError(f"expected no storage_options for {type(self).__name__}, got {storage_options!r}")
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
