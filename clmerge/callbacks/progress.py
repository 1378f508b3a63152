"""Small callbacks of the learner: a fixed random state per epoch, and progress lines when there is no terminal."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from clmerge.lightning_compat import log_every_epoch
from clmerge.merging import Merger
from clmerge.models import Classifier
from clmerge.names import duration, tell
from clmerge.weights.parametrization import merged_parameters


class EpochSeed(Callback):
    """Seed torch at the start of every epoch, so that dropout in a resumed run draws the same numbers.

    The seed is set at the first batch because Lightning skips ``on_train_epoch_start`` in the first epoch after a
    resume. Seeds the generators of the CPU and of the GPUs.

    Args:
        seed: Seed of the task; the epoch is added to it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            # Ranks draw different masks for their different images.
            torch.manual_seed((self.seed + trainer.current_epoch + (trainer.global_rank << 32)) % 2**63)


class EveryEpoch(Callback):
    """Log training metrics at least once per epoch, however few batches a task has."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_every_epoch(trainer)


class EpochLines(Callback):
    """Print one line per epoch to stderr when no progress bar is shown.

    Args:
        label: Name of the task in the lines.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self._started = 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.progress_bar_callback is None and trainer.is_global_zero:
            figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k in ("train/loss", "val/accuracy")}
            shown = "".join(f"  {name} {value:.3f}" for name, value in figures.items())
            seconds = time.perf_counter() - self._started
            total = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            line = f"{self.label}: epoch {trainer.current_epoch + 1}{total}{shown}  {seconds:.1f} s"
            tell(line)


class Pace:
    """Say after every task how long it took, and how long the rest of the stream may take.

    Args:
        num_tasks: Number of tasks of the stream.
        spent: Seconds by activity before the first of the tasks to come.

    Example:
        >>> Pace(5, {"train": 10.0}).line(1, {"train": 40.0, "evaluate": 30.0})
        'task 2/5: train 30 s, evaluate 30 s; about 3 min left'
    """

    def __init__(self, num_tasks: int, spent: Mapping[str, float]) -> None:
        self.num_tasks = num_tasks
        self._before = dict(spent)
        self._totals: list[float] = []

    def line(self, task: int, spent: Mapping[str, float]) -> str:
        """Return one line about a task that has just ended.

        Args:
            task: Index of the task.
            spent: Seconds by activity so far.
        """
        took = {name: seconds - self._before.get(name, 0.0) for name, seconds in spent.items()}
        self._before = dict(spent)
        self._totals.append(sum(took.values()))
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in took.items() if seconds >= 0.5)
        left = (self.num_tasks - task - 1) * sum(self._totals) / len(self._totals)
        rest = f"; about {duration(left)} left" if left else ""
        return f"task {task + 1}/{self.num_tasks}: {parts or 'less than a second'}{rest}"


def trainable_line(module: Classifier) -> str:
    """Describe in one line the trained parameters and their number."""
    own = dict(module.backbone.named_parameters())
    trained = sum(parameter.numel() for parameter in own.values() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in own.values())
    share = f"{trained:,} of {total:,} parameters of the backbone ({trained / total:.2%})"
    return f"{module.tuning}: training {share}, merging {len(module.trained_names)} tensors"


def matrix_lines(module: Classifier, mergers: Mapping[str, Merger]) -> list[str]:
    """Describe, one line per merger, the parameters that it decomposes as matrices; without mergers that have none."""
    merged = merged_parameters(module, module.trained_names)
    shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
    found = {name: merger.matrices(shapes) for name, merger in mergers.items()}
    return [f"{name}: decomposes {'; '.join(lines)}" for name, lines in found.items() if lines]
