"""The run folder: an atomic manifest records what is committed; other files are listed in it or derived from it."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clmerge.names import file_name, tell
from clmerge.results.checkpoint_files import damage
from clmerge.results.contract import SCHEMA
from clmerge.results.run_lock import LOCK, hold_lock
from clmerge.results.run_manifest import Manifest, ManifestText, check_config, read_manifest
from clmerge.weights import checksum, load_tensors, save_tensors, save_torch, write_json_atomic, write_text_atomic
from clmerge.weights.checksums import MANIFEST, verify_files

# Folders that only a run makes.
_OWN = ("bank", "checkpoints", "jobs", "logs", "model", "plots", "state", "unmerged")
_OWN_FILES = ("config.yaml", "data_check.json", "results.json", LOCK, MANIFEST)


class RunFolder:
    """Paths of a run and its commits.

    A commit writes new files beside the old ones and then replaces the manifest in one step, so that a run
    killed at any instant finds either the state before or the state after, never a mixture.

    Args:
        path: The folder.
        writes: Whether this process writes (rank zero) or only reads.

    Attributes:
        close: Lets other processes write at once, not only when this object is gone; to be called before the folder
            moves.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.manifest = Manifest()
        self._text = ManifestText()
        self._viewed: Mapping[str, Any] | None = None  # the models in results.json
        self.close: Callable[[], object] = lambda: None

    @classmethod
    def create(cls, path: str | Path, *, config: str = "", unique: bool = False, writes: bool = True) -> "RunFolder":
        """Start a run in a new or empty folder, or in the folder of a run that has trained nothing.

        Args:
            path: The folder; missing parents are made.
            config: The configuration that repeats the run; ``config.yaml`` holds it.
            unique: Whether to use another name (``NAME-2``) if ``path`` is in use.
            writes: Whether this process writes; if not, nothing is checked or made.

        Raises:
            FileExistsError: If ``path`` is in use.
            BlockingIOError: If another process writes there.
        """
        run = cls(path, writes=writes)
        if writes:
            if unique:
                run.path = _new_folder(run.path)
            elif run.path.exists() and not run._is_free():
                resume = f", or continue that run with --resume {run.path}"
                raise FileExistsError(
                    f"expected a new or empty run folder, got {run.path}, which exists: name another with "
                    f"--run_dir{resume if (run.path / MANIFEST).is_file() else ''}"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            run.close = hold_lock(run.path, run)
            if not run._is_free():
                raise FileExistsError(f"expected a new or empty run folder, got {run.path}, where a run just was")
            run._remove_everything()
            run.manifest.config = config
            run.commit()
            run._write_views()
        return run

    @classmethod
    def open(cls, path: str | Path, *, writes: bool = True) -> "RunFolder":
        """Open an existing run: check all of its files, then remove leftovers of a killed process.

        Args:
            path: The folder.
            writes: Whether this process writes; if not, nothing is changed.

        Raises:
            FileNotFoundError: If there is no run at ``path``, or one of its files is missing.
            ValueError: If the manifest is damaged or was written by another version, or a file differs from its
                committed content.
            BlockingIOError: If another process writes there.
        """
        run = cls(path, writes=writes)
        read_manifest(run.path / MANIFEST)
        if writes:
            run.close = hold_lock(run.path, run)
        run.manifest = read_manifest(run.path / MANIFEST)  # the process that held the lock may have changed it
        run.verify()
        if writes:
            run._remove_leftovers()
            run._write_views()
        return run

    def verify(self) -> None:
        """Check that the files of the run have their committed content.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file was changed; the message names it.
        """
        verify_files(self.path, self.manifest.files)
        if self.config.is_file() and self.manifest.config:
            check_config(self.config, self.manifest.config)

    @property
    def is_untrained(self) -> bool:
        """Whether the run has trained nothing: it has neither a committed task nor a checkpoint."""
        return self.tasks_begun == 0

    @property
    def tasks_begun(self) -> int:
        """Number of tasks whose training has begun."""
        begun = (entry for folder in ("checkpoints", "jobs") for entry in (self.path / folder).glob("task_*"))
        began = self.manifest.branch > 0 or any(begun)
        return self.manifest.trained + began

    def change_options(self, options: Sequence[str], *, begin_anew: bool) -> bool:
        """Record options that override ``config.yaml`` from the next trained task on.

        Args:
            options: As on the command line.
            begin_anew: Whether to discard the training of the current task done without them.

        Returns:
            Whether training was discarded.
        """
        manifest = self.manifest
        manifest.options.append({"task": manifest.trained, "options": list(options)})
        checkpoints = list((self.path / "checkpoints").glob("task_*"))
        began = self.tasks_begun > manifest.trained
        if begin_anew and not manifest.finished:
            # Before the commit: a kill in between loses epochs, but never mixes two sets of options.
            for found in [*checkpoints, *(self.path / "jobs").glob("task_*")] if self.writes else ():
                shutil.rmtree(found) if found.is_dir() else found.unlink()
            manifest.branch = 0
            manifest.step, manifest.epochs = manifest.task_step, manifest.task_epochs
            manifest.files = {name: value for name, value in manifest.files.items() if "_branch_" not in name}
        self.commit()
        if self.writes:
            self._remove_leftovers()
        return began and begin_anew

    def discard(self) -> None:
        """Remove a run that has trained nothing, and its folder if that is then empty."""
        if self.writes and self.is_untrained:
            self._remove_everything()
            (self.path / LOCK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    @property
    def config(self) -> Path:
        """File of the resolved configuration, which repeats the run."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """File of the results, for scripts."""
        return self.path / "results.json"

    @property
    def bank(self) -> Path:
        """Folder of the run's task vectors."""
        return self.path / "bank"

    def unmerged(self, task: int) -> Path:
        """File of the un-merged tensors that belong to a task's vector; missing if the task has none."""
        return self.path / "unmerged" / f"task_{task:03d}.safetensors"

    @property
    def plots(self) -> Path:
        """Folder of the pictures of the results."""
        return self.path / "plots"

    @property
    def logs(self) -> Path:
        """Folder of the loggers' files."""
        return self.path / "logs"

    def checkpoint(self, task: int, branch: int = 0) -> Path:
        """Lightning's checkpoint of the last completed epoch of a task, or a branch of it, in training."""
        return self.path / "checkpoints" / f"task_{task:03d}{f'_branch_{branch:03d}' * (branch > 0)}.ckpt"

    def job(self, task: int, branch: int | None = None) -> Path:
        """Folder of the job that trains a task, or a branch of it; it is removed when that is merged."""
        return self.path / "jobs" / f"task_{task:03d}{'' if branch is None else f'_branch_{branch:03d}'}"

    def round_start(self, task: int) -> Path:
        """File from which jobs train the branches of the current round of a task."""
        return self.path / "jobs" / f"task_{task:03d}_start.pt"

    def has_whole(self, checkpoint: Path) -> bool:
        """Return whether there is an intact checkpoint; a damaged one is reported and removed.

        Args:
            checkpoint: The path that ``checkpoint`` returned.
        """
        if not checkpoint.exists() or (wrong := damage(checkpoint)) is None:
            return checkpoint.exists()
        if self.writes:
            note = f"clmerge: {checkpoint} is damaged ({wrong}): this fit starts again from its first epoch"
            tell(note)
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
        return False

    def branch(self, task: int, done: int) -> Path:
        """File of the state between two branches of a task."""
        return self.path / "state" / f"task_{task:03d}_branch_{done:03d}.pt"

    def model(self, name: str) -> Path:
        """File of one merger's final weights."""
        return self.path / "model" / f"{file_name(name)}.safetensors"

    def keep_unmerged(self, task: int, state: Mapping[str, Tensor]) -> None:
        """Save the un-merged tensors of a task beside its vector in the bank: head and running statistics, if any."""
        if self.writes and state:
            save_tensors(self.unmerged(task), state)

    def commit(self) -> None:
        """Write the manifest in memory to disk, which commits it."""
        if not self.writes:
            return
        write_text_atomic(self.path / MANIFEST, self._text.of(self.manifest))
        results = self.manifest.results
        if results and results.get("models") is not self._viewed:
            write_json_atomic(self.results, {"schema": SCHEMA, "runs": [results]})
            self._viewed = results.get("models")

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
            save_torch(target / "accumulators.pt", dict(accumulators))
            optional = (self.bank / f"task_{task:03d}.safetensors", self.unmerged(task))
            kept = [file for file in optional if file.is_file()]
            self._record(target / "module.safetensors", target / "accumulators.pt", *kept, instead_of="state/")
        self.manifest.state = folder.as_posix()
        self.manifest.trained = task + 1
        self.manifest.branch = 0
        self.manifest.task_step, self.manifest.task_epochs = self.manifest.step, self.manifest.epochs
        self.commit()
        if self.writes:
            self._remove_superseded()

    def commit_branch(self, task: int, done: int, state: Mapping[str, Any]) -> None:
        """Commit a branch of a task.

        Args:
            task: Index of the task.
            done: Branches of the task that are done.
            state: Tensors and primitives that ``weights_only`` loading accepts.
        """
        if self.writes:
            save_torch(self.branch(task, done), dict(state))
            self._record(self.branch(task, done), instead_of=f"state/task_{task:03d}_branch_")
        self.manifest.branch = done
        self.commit()
        if self.writes:
            self._remove_superseded()

    def load_branch(self) -> dict[str, Any]:
        """Return the state given to the last ``commit_branch`` of the current task, on the CPU."""
        file = self.branch(self.manifest.trained, self.manifest.branch)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state given to the last ``commit_state``: the module's weights and the accumulators, on the CPU.

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

    def _record(self, *files: Path, instead_of: str) -> None:
        """Add checksums of new files to the manifest and drop those of paths that begin with ``instead_of``."""
        kept = {name: value for name, value in self.manifest.files.items() if not name.startswith(instead_of)}
        new = {file.relative_to(self.path).as_posix(): checksum(file) for file in files}
        self.manifest.files = kept | new

    def _write_views(self) -> None:
        """Write configuration and results from the manifest as files, for people and scripts."""
        if self.manifest.config and not self.config.is_file():
            write_text_atomic(self.config, self.manifest.config)
        if self.manifest.results:
            write_json_atomic(self.results, {"schema": SCHEMA, "runs": [self.manifest.results]})

    def _is_free(self) -> bool:
        """Whether a run may start in the folder: it is empty, or holds a run that has trained nothing."""
        if not self.path.is_dir():
            return False
        found = {entry.name for entry in self.path.iterdir()}
        if all(name == LOCK or _is_half_written(name) for name in found):  # left by a start that was killed
            return True
        if not (self.path / MANIFEST).is_file() or not all(_is_own(name) for name in found):
            return False
        there = RunFolder(self.path, writes=False)
        there.manifest = read_manifest(self.path / MANIFEST)
        return there.is_untrained

    def _remove_everything(self) -> None:
        """Remove all files of a run except the lock."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == MANIFEST):
            if entry.is_dir() and _is_own(entry.name):  # a logger of a failed start may still be writing
                shutil.rmtree(entry, ignore_errors=entry.name == "logs")
            elif _is_own(entry.name) and entry.name != LOCK:
                entry.unlink()

    def _remove_superseded(self) -> None:
        """Remove states, checkpoints and jobs that the manifest no longer refers to."""
        keep = {self.path / self.manifest.state} if self.manifest.state is not None else set()
        if not self.manifest.finished:
            task, branch = self.manifest.trained, self.manifest.branch
            keep |= {self.checkpoint(task, branch), self.branch(task, branch)}
        for folder in ("state", "checkpoints"):
            for found in sorted((self.path / folder).glob("task_*")):  # the user's callbacks may write here as well
                if found not in keep:
                    shutil.rmtree(found) if found.is_dir() else found.unlink()
        for found in sorted((self.path / "jobs").glob("task_*")):  # the folder of a job and its log
            number, _, fit = found.name.split(".")[0][5:].partition("_branch_")
            merged = (self.manifest.trained, self.manifest.branch if fit else 0)
            if (int(number.partition("_")[0]), int(fit or 0)) < merged:
                shutil.rmtree(found) if found.is_dir() else found.unlink()

    def _remove_leftovers(self) -> None:
        """Remove all that the manifest does not refer to, half-written files included: what a killed process left."""
        self._remove_superseded()
        for kept in (self.bank, self.path / "unmerged"):  # remove files of a task that was merged but not committed
            for found in sorted(kept.glob("task_*.safetensors")):
                if found.stem[5:].isdecimal() and int(found.stem[5:]) >= self.manifest.trained:
                    found.unlink()
        for found in self._half_written():
            shutil.rmtree(found) if found.is_dir() else found.unlink()

    def _half_written(self) -> Iterator[Path]:
        yield from sorted(self.path.glob(".*.tmp"))
        # Lightning's checkpoint of a requeued job, which every later Trainer of the folder would load.
        yield from sorted(self.path.glob("hpc_ckpt_*.ckpt"))
        for folder in _OWN:
            if folder != "logs":  # the loggers' own files are left alone
                yield from sorted((self.path / folder).rglob(".*.tmp"))


def _is_own(name: str) -> bool:
    return name in _OWN or name in _OWN_FILES or _is_half_written(name)


def _is_half_written(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _new_folder(path: Path) -> Path:
    """Make a new folder: ``path``, or ``path-2`` and so on if that exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError
