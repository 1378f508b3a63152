"""Average the weights along a fit, and leave the average as what the fit has trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from clmerge.callbacks.best_weights import BestWeights
from clmerge.callbacks.frozen import announces_unfreezing
from clmerge.lightning_compat import callbacks_of, is_lightning
from clmerge.names import tell
from clmerge.statistics.provided import training_images
from clmerge.training.trajectory import TrajectoryRule, Weights
from clmerge.weights.batch_norm import check_callable, estimated_statistics, has_running_statistics
from clmerge.weights.modes import on_device
from clmerge.weights.selection import is_included
from clmerge.weights.swap import assign, own_tensors, swapped


class TrajectoryAverage(Callback):
    """Average the trained weights along every fit by a rule; at its end the average replaces the last weights.

    With ``MergeCallback``, in any order, the expert of a task is then the average, and so is its task vector. Only
    trained parameters are averaged, under the module's own names (LoRA's factors as factors), and floating buffers;
    frozen parts need no memory. The rule is emptied when a fit begins, so that one instance can serve any number of
    Trainers. A fit that collects nothing warns and leaves its last weights. The state is saved in Lightning's
    checkpoints, which hold the training weights; a fit that was killed at any time, also between its last checkpoint
    and its end, resumes to the same bits.

    Args:
        rule: What is averaged: ``Mean``, ``EMA``, ``Latest``, ``LossValley``, ``Accepting`` or ``Horizons``.
        include: Glob patterns of the parameters to average; default all that are trained.
        score: Returns how good the module's current weights are on held-out images, the higher the better, equal on all
            ranks; for a rule that keeps several averages.

    Raises:
        ValueError: During a fit, for a rule whose ``monitor`` is not logged, a share of a fit without end, or another
            callback that puts weights back at the end.

    Example:
        >>> from clmerge.training.trajectory import EMA
        >>> TrajectoryAverage(EMA(0.99)).rule.decay
        0.99
    """

    def __init__(
        self,
        rule: TrajectoryRule,
        *,
        include: Sequence[str] | None = None,
        score: Callable[[LightningModule], float] | None = None,
    ) -> None:
        if rule.requires_score and score is None:
            raise ValueError(f"expected score=, by which {rule} chooses one of its averages, got none")
        self.rule = rule
        self.score = score
        self.include = None if include is None else list(include)
        self._swap = ExitStack()
        self._forget()

    def _forget(self) -> None:
        self.rule.reset()
        self._step = 0  # the optimizer steps at the last collection
        self._done = False

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the rule keeps."""
        return self.rule.nbytes

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._forget()  # before Lightning restores a checkpoint
        for other in callbacks_of(trainer):
            averages = is_lightning(other, "WeightAveraging", "StochasticWeightAveraging")
            if (
                averages
                or isinstance(other, BestWeights)
                or (isinstance(other, TrajectoryAverage) and other is not self)
            ):
                raise ValueError(
                    f"expected one callback that puts weights in place when a fit ends, got TrajectoryAverage and "
                    f"{type(other).__name__}; remove one of them"
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rule.buffers == "recompute" and has_running_statistics(pl_module):
            check_callable(pl_module, "buffers='recompute'", "'average' or 'latest'")
        if self.rule.start > 0 and not math.isfinite(_total_steps(trainer)):
            raise ValueError(
                f"expected max_epochs or max_steps for {self.rule}, whose start is a share of the fit, got a fit "
                "without end; set start to 0"
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, every = trainer.global_step, self.rule.every
        # The last batch of an epoch is followed by its validation, before the hook of the epoch's end.
        due = trainer.is_last_batch if every == "epoch" else steps - self._step >= every
        if due:
            self._collect(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rule.every == "epoch":  # an epoch that max_steps cut short has no last batch
            self._collect(trainer, pl_module)

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.global_step
        if steps > self._step and (not self.rule.start or steps >= self.rule.start * _total_steps(trainer)):
            self.rule.collect(self._weights(trainer, pl_module))
            self._step = steps

    def _weights(self, trainer: Trainer, pl_module: LightningModule) -> Weights:
        frozen = announces_unfreezing(trainer)
        own = own_tensors(pl_module)
        buffers = {name for name, _ in pl_module.named_buffers()} if self.rule.buffers == "average" else set()
        return {
            name: tensor
            for name, tensor in own.items()
            if tensor.is_floating_point()
            and (name in buffers or ((frozen or tensor.requires_grad) and is_included(name, self.include)))
        }

    # Validation ----------------------------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.rule.validates != "average":
            return
        if candidate := self.rule.candidate():
            self._swap.enter_context(swapped(pl_module, candidate, origin="the average of the fit"))
            statistics = self._statistics(pl_module)
            self._swap.enter_context(swapped(pl_module, statistics, origin="the average's running statistics"))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.rule.monitor is not None:
            self.rule.judge(self._score(trainer, self.rule.monitor))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap.close()

    def _score(self, trainer: Trainer, monitor: str) -> float:
        if monitor not in trainer.callback_metrics:
            raise ValueError(
                f"expected a value {monitor!r} for {type(self.rule).__name__}, got none in epoch "
                f"{trainer.current_epoch + 1}: log it, hold validation images out, or set monitor to one of "
                f"{sorted(trainer.callback_metrics)}"
            )
        return float(trainer.strategy.broadcast(float(trainer.callback_metrics[monitor])))

    def _statistics(self, pl_module: LightningModule) -> dict[str, Tensor]:
        if self.rule.buffers != "recompute" or not has_running_statistics(pl_module):
            return {}
        loader: Any = pl_module.trainer.train_dataloader
        if not self._done and getattr(loader, "persistent_workers", False) and not pl_module.trainer.is_last_batch:
            raise ValueError(
                f"expected {self.rule} to be validated at the end of epochs, got a validation within one, whose "
                "persistent workers cannot read images for running statistics; set buffers to 'latest' or 'average'"
            )
        return estimated_statistics(pl_module, training_images(pl_module))

    # The end ---------------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in_place(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit killed after its last checkpoint has nothing left to train when it resumes, and Lightning does not call
        # on_train_end then. MergeCallback, which is last in a fit, merges after this.
        if not self._done and self._step and trainer.fit_loop.done:
            with on_device(pl_module, trainer.strategy.root_device):
                self._put_in_place(trainer, pl_module)

    def _put_in_place(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._done = True
        own = own_tensors(pl_module)
        if self.score is not None and (choices := self.rule.choices()):
            self._choose(choices, self.score, trainer, pl_module)
        average = self.rule.compute()
        if not average:
            warnings.warn(
                f"the fit ended before {self.rule} took in any weights, so its last weights stay: lower start or "
                "every, or train longer",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        whole = {name: _whole(tensor) for name, tensor in average.items()}
        assign({name: own[name] for name in whole}, whole)
        statistics = self._statistics(pl_module)
        assign({name: own[name] for name in statistics}, statistics)
        if trainer.is_global_zero:
            tell(f"the weights are replaced by their average: {type(self.rule).__name__}, {self.rule.count} collected")

    def _choose(
        self,
        choices: dict[str, Weights],
        score: Callable[[LightningModule], float],
        trainer: Trainer,
        pl_module: LightningModule,
    ) -> None:
        scores: dict[str, float] = {}
        for name, weights in choices.items():
            whole = {key: _whole(tensor) for key, tensor in weights.items()}
            with swapped(pl_module, whole, origin=f"the average {name}"), ExitStack() as inside:
                statistics = self._statistics(pl_module)
                inside.enter_context(swapped(pl_module, statistics, origin="the average's running statistics"))
                scores[name] = score(pl_module)
        self.rule.choose(scores)
        if trainer.is_global_zero:
            tell(f"{type(self.rule).__name__}: {', '.join(f'{name}: {value:.4f}' for name, value in scores.items())}")

    # State -------------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "rule": _stored(self.rule.state_dict())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = int(state_dict["step"])
        self.rule.load_state_dict(state_dict["rule"])


def _total_steps(trainer: Trainer) -> float:
    """Return the optimizer steps of a fit, infinite where nothing but the data ends it."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if steps >= 0 else math.inf


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _stored(value: Any) -> Any:
    """Return copies on the CPU of all tensors; sharded ones are gathered, so every process must call."""
    if isinstance(value, Tensor):
        return _whole(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _stored(item) for key, item in value.items()}
    return [_stored(item) for item in value] if isinstance(value, list) else value
