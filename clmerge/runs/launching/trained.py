"""What a job that trained a task, or a branch of one, hands over: one file that appears when it is trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clmerge.weights import save_torch

FILE = "trained.pt"


@dataclass(frozen=True)
class Trained:
    """A task or a branch that was trained, and is not merged yet.

    Attributes:
        task: Index of the task.
        branch: Number of fits of the task before this one; None if the job trained the whole task.
        start: Fingerprint of what it started from: theta_0, or the vector at which the branch's round starts.
        weights: The module's training weights by name, buffers included.
        statistics: Statistics that mergers require: of the task those of the run, of the branch that of its round.
        steps: Optimizer steps.
        logged: Steps that the loggers count.
        epochs: Epochs.
        seconds: Duration of the training.
        trajectory: Bytes that the average along the last fit kept, 0 without one.
    """

    task: int
    branch: int | None
    start: str
    weights: dict[str, Tensor]
    statistics: Mapping[str, Any]
    steps: int
    logged: int
    epochs: int
    seconds: float
    trajectory: int

    def save(self, folder: Path) -> None:
        """Write the file into a job's folder; it is either whole or not there."""
        save_torch(folder / FILE, asdict(self))

    @classmethod
    def load(cls, file: Path, device: torch.device, *, task: int, branch: int | None, start: str | None) -> "Trained":
        """Read the file.

        Args:
            file: The file.
            device: Where the statistics are put; the weights are loaded into a module.
            task: The task that it must hold.
            branch: The branch that it must hold.
            start: What it must have started from.

        Raises:
            ValueError: If it holds something else.
        """
        found = cls(**torch.load(file, map_location=device, weights_only=True))
        if (found.task, found.branch, found.start) != (task, branch, start):
            raise ValueError(
                f"expected {_named(task, branch)}, trained from {str(start)[:12]}, in {file}, got "
                f"{_named(found.task, found.branch)} from {found.start[:12]}: remove "
                f"{file.parent}, and it is trained again"
            )
        return found


def _named(task: int, branch: int | None) -> str:
    return f"task {task}" + ("" if branch is None else f", branch {branch}")
