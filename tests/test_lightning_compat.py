import csv
import logging
import warnings

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks.progress import EveryEpoch
from clmerge.lightning_compat import (
    TaskProgressBar,
    callbacks_of,
    leave_requeueing,
    logger_step,
    logs_this_step,
    put_callback,
    quiet_lightning,
    refuse_unsupported_strategy,
    restore_callbacks,
    set_step_offset,
)


class Logging(ForeignModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/zero", 0.0)


class StopAt(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise KeyError("killed")


def fit(folder, version, *callbacks, offset=0, ckpt_path=None):
    """Fit two epochs of three steps; return the Trainer and the steps that its logger was told."""
    logger = CSVLogger(folder, name="csv", version=version)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    set_step_offset(trainer, offset)
    try:
        trainer.fit(Logging(), toy_loader(0), toy_loader(1), ckpt_path=ckpt_path)
    except KeyError:
        logger.save()
    return trainer


def logged(folder, version, column):
    with (folder / "csv" / f"version_{version}" / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row[column]]


# Steps --------------------------------------------------------------------------------------------------------


def test_loggers_count_on_over_two_trainers(tmp_path):
    first = fit(tmp_path, 0)
    assert logged(tmp_path, 0, "train/loss") == [0, 1, 2, 3, 4, 5]
    assert logger_step(first) == 6
    second = fit(tmp_path, 1, offset=logger_step(first))
    assert logged(tmp_path, 1, "train/loss") == [6, 7, 8, 9, 10, 11]
    assert logged(tmp_path, 1, "val/zero") == [8, 11]
    assert logger_step(second) == 12
    assert second.global_step == 6, "Lightning's own count of this fit stays as it is"


def test_the_offset_survives_a_resume_from_a_checkpoint(tmp_path):
    checkpoint = {"dirpath": tmp_path, "filename": "last", "enable_version_counter": False}
    fit(tmp_path, 0, ModelCheckpoint(**checkpoint), StopAt(1), offset=6)
    assert logged(tmp_path, 0, "train/loss") == [6, 7, 8]
    resumed = fit(tmp_path, 1, ModelCheckpoint(**checkpoint), offset=0, ckpt_path=tmp_path / "last.ckpt")
    assert logged(tmp_path, 1, "train/loss") == [9, 10, 11]
    assert logger_step(resumed) == 12


# Callbacks ----------------------------------------------------------------------------------------------------


class Told(Callback):
    def __init__(self, name, told):
        self.name, self.told = name, told

    def on_fit_start(self, trainer, pl_module):
        self.told.append(f"start {self.name}")

    def on_fit_end(self, trainer, pl_module):
        self.told.append(f"end {self.name}")


class Moving(Told):
    """The last one at first, and from then on the first one."""

    def setup(self, trainer, pl_module, stage):
        put_callback(trainer, self, first=False)

    def on_train_start(self, trainer, pl_module):
        put_callback(trainer, self, first=True)

    def teardown(self, trainer, pl_module, stage):
        restore_callbacks(trainer)


def test_hooks_are_called_in_the_order_that_callbacks_were_moved_to_and_back():
    told = []
    given = [Told("a", told), Moving("b", told), Moving("c", told), Told("d", told)]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=given,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ForeignModule(), toy_loader(0))
    assert told == [*(f"start {name}" for name in "adbc"), *(f"end {name}" for name in "cbad")]
    assert callbacks_of(trainer) == given


# Strategies ---------------------------------------------------------------------------------------------------


def stand_in(strategy):
    """A Trainer with this strategy; the real ones of some cannot be built on a CPU."""
    trainer = Trainer.__new__(Trainer)
    trainer._accelerator_connector = type("Connector", (), {"strategy": strategy})()
    return trainer


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_whose_children_train_are_refused(strategy):
    trainer = Trainer(accelerator="cpu", strategy=strategy, devices=2, logger=False)
    with pytest.raises(RuntimeError, match=r"got DDPStrategy with a spawn or fork launcher.*'ddp'"):
        refuse_unsupported_strategy(trainer)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_are_refused_under_the_other_name_of_the_package(strategy):
    trainer = pytorch_lightning.Trainer(accelerator="cpu", strategy=strategy, devices=2, logger=False)
    with pytest.raises(RuntimeError, match=r"got DDPStrategy with a spawn or fork launcher.*'ddp'"):
        refuse_unsupported_strategy(trainer)


@pytest.mark.parametrize(
    "kind",
    [
        FSDPStrategy,
        DeepSpeedStrategy,
        pytorch_lightning.strategies.FSDPStrategy,
        pytorch_lightning.strategies.DeepSpeedStrategy,
    ],
)
def test_strategies_that_shard_out_of_reach_are_refused(kind):
    strategy = object.__new__(kind)  # both ask for a GPU when they are built
    strategy._launcher = None
    with pytest.raises(RuntimeError, match=f"got {kind.__name__}.*ModelParallelStrategy with fully_shard"):
        refuse_unsupported_strategy(stand_in(strategy))


@pytest.mark.parametrize("strategy", ["auto", "ddp", DDPStrategy(), ModelParallelStrategy()])
def test_strategies_that_train_in_this_process_pass(strategy):
    devices = 1 if strategy == "auto" else 2
    refuse_unsupported_strategy(Trainer(accelerator="cpu", strategy=strategy, devices=devices, logger=False))


# Output -------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored():
    """Put logging and warnings back as they were."""
    names = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        yield loggers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_quiet_lightning_silences_start_up_lines_and_not_warnings(restored, tmp_path, caplog):
    for logger in restored:
        logger.setLevel(logging.INFO)
    fit(tmp_path, 0)
    assert "GPU available" in caplog.text
    caplog.clear()
    quiet_lightning()
    fit(tmp_path, 1)
    assert not caplog.text
    logging.getLogger("lightning.pytorch").warning("the roof is on fire")
    assert "the roof is on fire" in caplog.text


def test_quiet_lightning_leaves_quieter_loggers_alone(restored):
    restored[0].setLevel(logging.ERROR)
    quiet_lightning()
    assert restored[0].level == logging.ERROR
    assert restored[1].level == logging.WARNING


def test_quiet_lightning_silences_lightnings_advice_and_no_other_warning(restored, tmp_path):
    def advice(version):
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=CSVLogger(tmp_path, version=version),
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        with warnings.catch_warnings(record=True) as seen:
            trainer.fit(Logging(), toy_loader(0), toy_loader(1))
        return " ".join(str(warning.message) for warning in seen)

    warnings.resetwarnings()
    assert "The number of training batches (3) is smaller than the logging interval" in advice(0)
    quiet_lightning()
    assert not advice(1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["mine"]


def test_progress_bars_say_what_is_trained_and_stay_off_stdout(capsys, tmp_path):
    class Slow(LightningModule):
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).sum()

        def test_step(self, batch, batch_idx):
            self.layer(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

    bar = TaskProgressBar("task 2/5 cats")
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[bar],
        logger=CSVLogger(tmp_path, version=7),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Slow()
    trainer.fit(model, toy_loader(0))
    assert bar._get_train_description(0) == "task 2/5 cats: epoch 1/2"
    assert "v_num" not in bar.get_metrics(trainer, model)
    trainer.test(model, toy_loader(0), verbose=False)
    assert bar.test_description == "task 2/5 cats"
    found = capsys.readouterr()
    assert "task 2/5 cats: epoch 2/2" in found.err
    assert "task 2/5 cats" not in found.out


def test_the_steps_that_loggers_get_are_known_within_them(tmp_path):
    known = []

    class Knowing(Logging):
        def training_step(self, batch, batch_idx):
            if logs_this_step(self.trainer):
                known.append(logger_step(self.trainer))
            return super().training_step(batch, batch_idx)

    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="csv", version=0),
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    set_step_offset(trainer, 3)
    trainer.fit(Knowing(), toy_loader(0))
    assert known == logged(tmp_path, 0, "train/loss") == [3, 5, 7]


@pytest.mark.parametrize(("interval", "expected"), [(50, [2, 5]), (2, [1, 3, 5])])
def test_few_batches_are_logged_once_per_epoch(tmp_path, interval, expected):
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[EveryEpoch()],
        logger=CSVLogger(tmp_path, name="csv", version=0),
        log_every_n_steps=interval,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Logging(), toy_loader(0))
    assert logged(tmp_path, 0, "train/loss") == expected


def test_a_trainer_in_a_slurm_job_does_not_requeue_it(monkeypatch):
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    assert trainer._accelerator_connector.cluster_environment.auto_requeue
    leave_requeueing(trainer)
    assert not trainer._accelerator_connector.cluster_environment.auto_requeue
