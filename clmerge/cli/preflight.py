"""Checks of a run that need its objects but no data: what would otherwise fail after its folder exists."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from clmerge.cli.option_table import nearest
from clmerge.lightning_compat import is_lightning, quiet_lightning, refuse_unsupported_strategy
from clmerge.streams.augmentation import Augmentation

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from clmerge.runs.learner import Learner
    from clmerge.training.module import ContinualClassifier


def check_run(learner: "Learner", build: Any) -> None:
    """Refuse what cannot be trained: no epochs, an accelerator that is not there, a rate below 0, an unknown metric.

    Args:
        learner: The learner.
        build: The function that builds Trainers.

    Raises:
        ValueError: If Lightning or the optimizer refuses a setting, nothing would be trained, or a callback monitors a
            metric that is not logged.
    """
    quiet_lightning()
    options = {"logger": False, "callbacks": [], "plugins": [], "enable_model_summary": False}
    trainer: Trainer = build(**options)
    check_strategy(trainer)
    if learner.mergers:
        _check_length(trainer, learner.epochs)
    # A head that grows has no parameters yet.
    own = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
    learner.module.build_optimizer(own or [nn.Parameter(torch.zeros(1, 1))])
    for augmentation in (learner.data.augmentation, *(learner.branch_augmentations or ())):
        if augmentation is not None:
            Augmentation(augmentation, None)(Image.new("RGB", (64, 64)))
    has_val = all(len(learner.stream.dataset(task.index, "val")) for task in learner.tasks)
    _check_monitors(trainer.callbacks, logged_metrics(learner.module, has_val=has_val), has_val=has_val)  # type: ignore[attr-defined]


def logged_metrics(module: "ContinualClassifier", *, has_val: bool) -> list[str]:
    """Return the names of what a module logs while it is trained."""
    terms = [f"train/{regularizer.name}" for regularizer in module.regularizers]
    return [
        "train/loss",
        "train/accuracy",
        "train/lr",
        *terms,
        *(["val/loss", "val/accuracy"] if has_val else []),
        "epoch",
        "step",
    ]


def check_strategy(trainer: "Trainer") -> None:
    """Refuse strategies under which a run could not evaluate merged models.

    Args:
        trainer: The run's Trainer.

    Raises:
        RuntimeError: For strategies that train in other processes, or shard weights out of reach.
        ValueError: For FSDP2.
    """
    refuse_unsupported_strategy(trainer)
    if is_lightning(trainer.strategy, "ModelParallelStrategy"):
        raise ValueError(
            "expected whole weights in every process, got ModelParallelStrategy: clmerge fit evaluates merged models "
            "in the classifier that it trains, which is not sharded; use trainer.strategy=ddp, or FSDP2 with "
            "MergeCallback in a project of your own"
        )


def _check_length(trainer: "Trainer", epochs: list[int] | None) -> None:
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"expected trainer.{name} of 1 or more, got 0")
    for name, value in (("trainer.max_epochs", trainer.max_epochs), ("trainer.max_steps", trainer.max_steps)):
        if value == 0:
            raise ValueError(f"expected {name} of 1 or more, or -1 for no limit, got 0, which trains nothing")
    if epochs is not None and (wrong := [number for number in epochs if number < 1]):
        raise ValueError(f"expected learner.epochs of 1 or more for every task, got {wrong[0]}")


def _check_monitors(callbacks: "Iterable[Callback]", metrics: list[str], *, has_val: bool) -> None:
    """Refuse a metric that nothing logs; where a callback comes from elsewhere, it may log it."""
    callbacks = [*callbacks]
    if not all(type(callback).__module__.startswith(("lightning.", "clmerge.")) for callback in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in metrics:
            continue
        near = nearest(monitor, metrics)
        hint = f"; did you mean {near!r}?" if near else ""
        if monitor.startswith("val/") and not has_val:
            hint = "; the stream holds no validation images out: set stream.val_fraction above 0"
        raise ValueError(
            f"expected a metric for {type(callback).__name__} to monitor ({', '.join(metrics)}), got {monitor!r}{hint}"
        )
