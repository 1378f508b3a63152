"""Build the Trainers of a run: a new one with new callbacks for every fit and every evaluation."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from clmerge.callbacks.finite_loss import FiniteLoss
from clmerge.callbacks.progress import EpochLines, EpochSeed, EveryEpoch
from clmerge.callbacks.stops_again import StopsAgain
from clmerge.lightning_compat import TaskProgressBar, leave_requeueing, logger_step, set_step_offset
from clmerge.names import tell
from clmerge.results.checkpoint_files import AtomicCheckpointIO
from clmerge.results.run_folder import RunFolder

TrainerFactory = Callable[..., Trainer]
# Trainer options that would reduce the images behind a run's figures, with the value that uses all images.
_WHOLE: Mapping[str, tuple[float, str]] = {
    "fast_dev_run": (
        0.0,
        "it trains and tests on one batch and keeps neither checkpoints nor logs",
    ),  # first: it sets the others
    "limit_test_batches": (1.0, "all tasks are tested in one pass, so the last of them would lose images unnoticed"),
    "limit_predict_batches": (1.0, "all tasks are predicted in one pass, so the last of them would lose images"),
    "overfit_batches": (0.0, "it trains and validates on the same few images of every task"),
}


def require_whole(options: Mapping[str, Any]) -> None:
    """Raise a ValueError if an option in ``_WHOLE`` has a value that would leave images out.

    Args:
        options: Arguments or attributes of a Trainer by name; None or absent means the default.
    """
    for name, (whole, reason) in _WHOLE.items():
        value = options.get(name)
        # For Lightning, an int is a number of batches and a float is a share: 1 is one batch, 1.0 all of them.
        if value is not None and (value != whole or (whole == 1.0 and isinstance(value, int))):
            raise ValueError(
                f"expected no trainer.{name}, got {value}: {reason}; for a short run set trainer.max_steps"
            )


def partial_lines(trainer: Trainer) -> list[str]:
    """Describe, one line each, limits that train or validate on only a part of the images."""
    verbs = {"limit_train_batches": "trains", "limit_val_batches": "validates"}
    limits = {name: getattr(trainer, name) for name in verbs}
    return [
        f"trainer.{name}={limit}: an epoch {verbs[name]} on "
        + (f"{limit} batches at most" if isinstance(limit, int) else f"{limit:.0%} of the batches")
        for name, limit in limits.items()
        if limit and (limit != 1.0 or isinstance(limit, int))
    ]


class Trainers:
    """Build Trainers for one run.

    Args:
        factory: Builds a new Trainer with new callbacks from keyword arguments.
        run: The run folder.
        loggers: Lightning loggers for the whole stream.
        progress: Whether to show progress bars instead of a line per epoch.
    """

    def __init__(self, factory: TrainerFactory, run: RunFolder, loggers: Sequence[Logger], *, progress: bool) -> None:
        self.factory = factory
        self.run = run
        self.loggers = loggers
        self.progress = progress
        self._told = False

    @cached_property
    def device(self) -> torch.device:
        """Device on which this process trains and evaluates."""
        return self.for_evaluation("").strategy.root_device

    def for_evaluation(self, label: str, *, gradients: bool = False) -> Trainer:
        """Return a Trainer that tests and logs nothing.

        Args:
            label: Text for the progress display.
            gradients: Whether something differentiates through the model.
        """
        options = {"inference_mode": False} if gradients else {}
        return self._build(label, logger=False, callbacks=[], **options)

    def for_fit(
        self, label: str, seed: int, checkpoint: Path, callbacks: Sequence[Callback], **options: Any
    ) -> Trainer:
        """Return a Trainer that checkpoints every epoch, and seed all global random generators.

        Args:
            label: Text for the progress display.
            seed: Seed of the fit.
            checkpoint: Lightning's checkpoint of the last epoch.
            callbacks: Callbacks placed before the learner's own.
            options: More arguments of the Trainer.
        """
        seed = seed % 2**32  # NumPy's generator takes 32 bits
        seed_everything(seed, workers=True, verbose=False)
        saving = ModelCheckpoint(
            dirpath=checkpoint.parent,
            filename=checkpoint.stem,
            save_top_k=1,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        own = [*callbacks, EpochSeed(seed), EveryEpoch(), EpochLines(label), FiniteLoss(label), StopsAgain(), saving]
        trainer = self._build(label, logger=list(self.loggers) or False, callbacks=own, **options)
        if self.run.writes and not self._told:
            for line in partial_lines(trainer):
                tell(line)
        self._told = True
        return trainer

    def fit(self, trainer: Trainer, module: LightningModule, data: LightningDataModule, checkpoint: Path) -> None:
        """Fit, from the last epoch's checkpoint if there is an intact one, and count steps and epochs in the manifest.

        A damaged checkpoint is reported and ignored: training from the start yields the same weights.

        Args:
            trainer: The Trainer that ``for_fit`` built.
            module: The module.
            data: Its data.
            checkpoint: The checkpoint that was given to ``for_fit``.
        """
        manifest = self.run.manifest
        module.train()
        set_step_offset(trainer, manifest.step)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if self.run.has_whole(checkpoint) else None)
        manifest.step = logger_step(trainer)
        manifest.epochs += trainer.current_epoch

    def _build(
        self, label: str, *, logger: list[Logger] | Literal[False], callbacks: list[Callback], **options: Any
    ) -> Trainer:
        trainer = self.factory(
            logger=logger,
            callbacks=[*callbacks, *([TaskProgressBar(label)] if self.progress else [])],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=self.run.path,
            enable_checkpointing=bool(callbacks),
            enable_model_summary=False,
            enable_progress_bar=self.progress,
            num_sanity_val_steps=0,
            **options,
        )
        leave_requeueing(trainer)
        require_whole({name: getattr(trainer, name) for name in _WHOLE})
        return trainer
