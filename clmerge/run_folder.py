"""The run folder: one atomic manifest is the truth, everything else can be made again from it or is a view of it."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

import clmerge
from clmerge.weights import atomic_path, load_tensors, save_tensors, write_json_atomic

SCHEMA = 1


@dataclass
class Manifest:
    """What a run has committed.

    Attributes:
        trained: Tasks whose training and merge are committed.
        evaluated: Tasks whose evaluation is committed; ``trained`` or one less.
        state: Folder of the committed state, relative to the run folder, or None before the first task.
        step: Optimizer steps taken so far, over all tasks.
        epochs: Epochs trained so far, over all tasks.
        wandb_id: Identity of the run in W&B, kept over a resume.
        results: The results so far, in the form of ``results.json``.
        finished: Whether the run is complete.
    """

    trained: int = 0
    evaluated: int = 0
    state: str | None = None
    step: int = 0
    epochs: int = 0
    wandb_id: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    schema: int = SCHEMA
    clmerge: str = clmerge.__version__


class RunFolder:
    """Paths of a run and its commits.

    A commit writes new files beside the old ones and then replaces the manifest in one step, so that a run killed at
    any instant finds either the state before or the state after, never a mixture.

    Args:
        path: The folder.
        writes: Whether this process writes (rank zero) or only reads.

    Raises:
        FileNotFoundError: From ``open`` where there is no run.
        FileExistsError: From ``create`` where there is one.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.manifest = Manifest()

    @classmethod
    def create(cls, path: str | Path, *, writes: bool = True) -> "RunFolder":
        """Start a run in a new or empty folder."""
        run = cls(path, writes=writes)
        if writes:
            if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
                raise FileExistsError(
                    f"expected a new run folder, got {run.path}, which exists: name another with --run_dir, "
                    f"or continue that run with --resume {run.path}"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            run.commit()
        return run

    @classmethod
    def open(cls, path: str | Path, *, writes: bool = True) -> "RunFolder":
        """Open a run that exists."""
        run = cls(path, writes=writes)
        file = run.path / "manifest.json"
        if not file.is_file():
            raise FileNotFoundError(f"expected a run folder with a manifest.json, got {run.path}")
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("schema") != SCHEMA:
            raise ValueError(f"expected manifest schema {SCHEMA} in {file}, got {found.get('schema')!r}")
        run.manifest = Manifest(**found)
        if writes:
            run._remove_leftovers()
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

    @property
    def plots(self) -> Path:
        """Pictures of the results."""
        return self.path / "plots"

    @property
    def logs(self) -> Path:
        """What the loggers write."""
        return self.path / "logs"

    def checkpoint(self, task: int) -> Path:
        """Lightning's checkpoint of the last completed epoch of a task in training."""
        return self.path / "checkpoints" / f"task_{task:03d}.ckpt"

    def model(self, name: str) -> Path:
        """Final weights of one merger."""
        return self.path / "model" / f"{name}.safetensors"

    def commit(self) -> None:
        """Make the manifest as it is in memory the truth."""
        if self.writes:
            write_json_atomic(self.path / "manifest.json", asdict(self.manifest))
            if self.manifest.results:
                write_json_atomic(self.results, self.manifest.results)

    def commit_state(self, task: int, module: Mapping[str, Tensor], accumulators: Mapping[str, Any]) -> None:
        """Commit a task that was trained and merged: the model's training weights and the mergers' accumulators."""
        folder = Path("state") / f"task_{task:03d}"
        if self.writes:
            target = self.path / folder
            target.mkdir(parents=True, exist_ok=True)
            save_tensors(target / "module.safetensors", module)
            with atomic_path(target / "accumulators.pt") as temporary:
                torch.save(dict(accumulators), temporary)
        self.manifest.state = folder.as_posix()
        self.manifest.trained = task + 1
        self.commit()
        if self.writes:
            self._remove_leftovers()

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the last ``commit_state`` took: the module's weights and the accumulators."""
        if self.manifest.state is None:
            raise RuntimeError(f"expected a committed task in {self.path}, got none")
        folder = self.path / self.manifest.state
        accumulators = torch.load(folder / "accumulators.pt", map_location="cpu", weights_only=True)
        return load_tensors(folder / "module.safetensors"), accumulators

    def _remove_leftovers(self) -> None:
        """Remove states and checkpoints that the manifest has left behind."""
        keep = None if self.manifest.state is None else self.path / self.manifest.state
        for folder in sorted((self.path / "state").glob("task_*")):
            if folder != keep:
                shutil.rmtree(folder)
        for file in sorted((self.path / "checkpoints").glob("*")):
            if self.manifest.finished or file != self.checkpoint(self.manifest.trained):
                file.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write Lightning's checkpoints to a temporary file in the same folder, flush it, and rename it.

    Lightning's own atomic save goes through the system's temporary folder, where the final move can be a copy that a
    kill leaves half done, and it does not flush.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` to ``path``, or leave what was there."""
        if storage_options is not None:
            raise TypeError(f"expected no storage_options for {type(self).__name__}, got {storage_options!r}")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
