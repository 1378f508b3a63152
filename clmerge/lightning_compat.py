"""The only file that touches private attributes of Lightning; every use has a test that notices a change."""

import logging
import warnings
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

_given: WeakKeyDictionary[Trainer, list[Callback]] = WeakKeyDictionary()
_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")


def is_lightning(thing: object, *names: str) -> bool:
    """Return whether ``thing`` is an instance of one of Lightning's classes of these names, or of a subclass.

    Lightning is published as two packages, ``lightning`` and ``pytorch_lightning``, each with its own classes;
    ``isinstance`` would recognise those of one package only.

    Args:
        thing: A strategy, launcher, callback and so on.
        names: Names of classes without their modules.
    """
    return any(kind.__name__ in names and kind.__module__.split(".")[0] in _PACKAGES for kind in type(thing).__mro__)


def callbacks_of(trainer: Any) -> list[Callback]:
    """Return a Trainer's callbacks in the order of their hook calls; Lightning's annotations lack the attribute."""
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def refuse_used_average(trainer: Trainer) -> None:
    """Refuse, when training starts, an average of weights by Lightning that counts the steps of an earlier fit.

    Raises:
        RuntimeError: For a ``WeightAveraging`` that would average nothing and put the initial weights back.
    """
    other: Any
    for other in callbacks_of(trainer):
        if is_lightning(other, "WeightAveraging") and (
            other._latest_update_step > trainer.global_step
            or other._latest_update_epoch >= max(trainer.current_epoch, 0)
        ):
            raise RuntimeError(
                f"expected a new {type(other).__name__} for every fit, got one that was used in an earlier fit: it "
                "would average nothing and put the weights of the start back; build a new one for every Trainer, or "
                "use clmerge.callbacks.TrajectoryAverage"
            )


def refuse_empty_average(trainer: Trainer, *, trained: bool) -> None:
    """Refuse, when a fit ends, what an average of weights by Lightning has left that is not its average.

    Args:
        trainer: The Trainer.
        trained: Whether the fit has trained; if not, it was resumed after its last epoch.

    Raises:
        RuntimeError: For a ``WeightAveraging`` that has taken in no weights and has put those of the start back, or
            whose fit is resumed after its last epoch, which does not put the average in place.
    """
    other: Any
    for other in callbacks_of(trainer):
        if not is_lightning(other, "WeightAveraging"):
            continue
        never = other._latest_update_step == 0 and other._latest_update_epoch < 0
        if trained and never:
            raise RuntimeError(
                f"expected {type(other).__name__} to take in weights, got a fit that ended before: it has put the "
                "weights of the start back, and nothing can be merged; average from an earlier step on, or use "
                "clmerge.callbacks.TrajectoryAverage"
            )
        if not trained:
            raise RuntimeError(
                f"expected a fit with {type(other).__name__} to end without interruption, got one that is resumed "
                "after its last epoch: Lightning does not put the average in place then; resume from an earlier "
                "checkpoint, or use clmerge.callbacks.TrajectoryAverage"
            )


def put_callback(trainer: Any, callback: Callback, *, first: bool) -> None:
    """Move a Trainer's callback to the first or the last place; takes effect from the next hook on."""
    _given.setdefault(trainer, trainer.callbacks)
    others = [other for other in trainer.callbacks if other is not callback]
    trainer.callbacks = [callback, *others] if first else [*others, callback]


def restore_callbacks(trainer: Any) -> None:
    """Put a Trainer's callbacks back into the order they had before ``put_callback``."""
    trainer.callbacks = _given.pop(trainer, trainer.callbacks)


def set_step_offset(trainer: Trainer, offset: int) -> None:
    """Make ``trainer`` count the logger's step from ``offset`` instead of 0.

    Without it, the new Trainer of every task would plot the training curves of all tasks on top of each other. The
    counter is saved in Lightning's checkpoints, so a resumed fit continues at the checkpoint's step.

    Args:
        trainer: A Trainer that has not been fitted yet.
        offset: Optimizer steps taken before this Trainer.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = offset


def log_every_epoch(trainer: Any) -> None:
    """Let a Trainer log at least once per epoch; Lightning's annotations lack the attribute.

    The logger's step counts from the first task on, so an interval of more batches than an epoch has could leave out
    a whole task.

    Args:
        trainer: A Trainer whose training data is loaded.
    """
    batches = trainer.num_training_batches
    if isinstance(batches, int) and trainer.log_every_n_steps > max(batches, 1):
        trainer.log_every_n_steps = max(batches, 1)


def logs_this_step(trainer: Any) -> bool:
    """Return whether the Trainer gives its loggers what the current training step logs."""
    logs: bool = trainer._logger_connector.should_update_logs
    return logs


def logger_step(trainer: Trainer) -> int:
    """Return the step that ``trainer``'s loggers have reached, offset included."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def leave_requeueing(trainer: Any) -> None:
    """Switch off that Lightning requeues a SLURM job on SIGUSR1.

    It would write a checkpoint into the run folder that every later Trainer there loads, evaluations included. A run
    resumes from its own checkpoints, and ``clmerge fit --auto_resume`` requeues its job itself.

    Args:
        trainer: A Trainer that has not started.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if is_lightning(environment, "SLURMEnvironment"):
        environment.auto_requeue = False


def refuse_unsupported_strategy(trainer: Trainer) -> None:
    """Refuse strategies under which callbacks in this process cannot access the trained weights.

    Raises:
        RuntimeError: For launchers that train in spawned or forked children, for FSDP1 and for DeepSpeed; the
            message names the strategy to use instead.
    """
    strategy = trainer.strategy
    if is_lightning(strategy.launcher, "_MultiProcessingLauncher"):
        raise RuntimeError(
            f"expected a strategy that trains in this process, got {type(strategy).__name__} with a spawn or "
            "fork launcher: its children's merge state would be lost; use strategy='ddp'"
        )
    if is_lightning(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise RuntimeError(
            f"expected whole or DTensor parameters, got {type(strategy).__name__}, which shards them out of "
            "reach; use strategy='ddp', or ModelParallelStrategy with fully_shard (FSDP2)"
        )


class TaskProgressBar(RichProgressBar):
    """Lightning's progress bar on stderr, with a label for what is trained or evaluated.

    Args:
        label: Shown before epochs and while testing.
    """

    def __init__(self, label: str) -> None:
        super().__init__(console_kwargs={"stderr": True})
        self.label = label

    @property
    @override
    def test_description(self) -> str:
        return self.label

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics shown beside the bar, without the loggers' version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return f"{self.label}: epoch {current_epoch + 1}/{self.trainer.max_epochs}"


def quiet_lightning() -> None:
    """Let Lightning log warnings and errors only, since its start-up lines would repeat for every task.

    Also ignores warnings that Lightning 2.6 itself causes under newer versions of torch, and its advice on the number
    of workers and on the logging interval, which would repeat for every task. A logger with a higher level keeps it.
    """
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"The '\w+' does not have many workers",
        r"The number of training batches \(\d+\) is smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Once the package pytorch_lightning is imported, both packages use its logger names.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(max(logger.level, logging.WARNING))
    # Says, and nothing else, that a process of the run died, before it ends the others.
    for package in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(f"{package}.strategies.launchers.subprocess_script").setLevel(logging.INFO)
