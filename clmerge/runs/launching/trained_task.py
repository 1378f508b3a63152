"""What a job that trained one task hands over: one file that appears when the task is trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clmerge.weights import save_torch


@dataclass(frozen=True)
class TrainedTask:
    """A task that was trained, and is not merged yet.

    Attributes:
        task: Index of the task.
        base: Fingerprint of theta_0.
        weights: The module's training weights by name, buffers included.
        statistics: Statistics of the task that the run's mergers require.
        steps: Optimizer steps.
        logged: Steps that the loggers count.
        epochs: Epochs.
        seconds: Duration of the training.
    """

    task: int
    base: str
    weights: dict[str, Tensor]
    statistics: Mapping[str, Any]
    steps: int
    logged: int
    epochs: int
    seconds: float

    def save(self, file: Path) -> None:
        """Write the file; it is either whole or not there."""
        save_torch(file, asdict(self))

    @classmethod
    def load(cls, file: Path, device: torch.device) -> "TrainedTask":
        """Read the file.

        Args:
            file: The file.
            device: Where the statistics are put; the weights are loaded into a module.
        """
        return cls(**torch.load(file, map_location=device, weights_only=True))
