"""The Trainers of a run: a new one with fresh callbacks for every fit and every evaluation."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger

from clmerge.callbacks.progress import EpochLines, EpochSeed
from clmerge.lightning_compat import TaskProgressBar, logger_step, set_step_offset
from clmerge.run_folder import AtomicCheckpointIO, RunFolder

TrainerFactory = Callable[..., Trainer]


class Trainers:
    """Build Trainers for one run.

    Args:
        factory: Builds a new Trainer with fresh callbacks from the keyword arguments it is given.
        run: The run folder.
        loggers: Lightning loggers for the whole stream.
        progress: Whether to show progress bars instead of a line per epoch.
    """

    def __init__(self, factory: TrainerFactory, run: RunFolder, loggers: Sequence[Logger], *, progress: bool) -> None:
        self.factory = factory
        self.run = run
        self.loggers = loggers
        self.progress = progress

    @cached_property
    def device(self) -> torch.device:
        """Where this process trains and evaluates."""
        return self.for_evaluation("").strategy.root_device

    def for_evaluation(self, label: str) -> Trainer:
        """Return a Trainer that tests and logs nothing.

        Args:
            label: What is being evaluated.
        """
        return self._build(label, logger=False, callbacks=[])

    def for_fit(
        self, label: str, seed: int, checkpoint: Path, callbacks: Sequence[Callback], **options: Any
    ) -> Trainer:
        """Return a Trainer that checkpoints every epoch, and fix the seed of everything random from here on.

        Args:
            label: What is being trained.
            seed: Seed of the fit.
            checkpoint: Lightning's checkpoint of the last epoch.
            callbacks: What comes before the learner's own callbacks.
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
        own = [*callbacks, EpochSeed(seed), EpochLines(label), saving]
        return self._build(label, logger=list(self.loggers) or False, callbacks=own, **options)

    def fit(self, trainer: Trainer, module: LightningModule, data: LightningDataModule, checkpoint: Path) -> None:
        """Fit, from the checkpoint of the last epoch if there is one, and count steps and epochs in the manifest.

        Args:
            trainer: What ``for_fit`` built.
            module: The module.
            data: Its data.
            checkpoint: The checkpoint that was given to ``for_fit``.
        """
        manifest = self.run.manifest
        module.train()
        set_step_offset(trainer, manifest.step)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.is_file() else None)
        manifest.step = logger_step(trainer)
        manifest.epochs += trainer.current_epoch

    def _build(
        self, label: str, *, logger: list[Logger] | Literal[False], callbacks: list[Callback], **options: Any
    ) -> Trainer:
        return self.factory(
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
