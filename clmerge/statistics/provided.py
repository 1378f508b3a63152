"""What a Trainer knows of the task it has trained: statistics that need no data, and its training images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clmerge.statistics.adam import adam_second_moments, require_second_moments
from clmerge.weights.parametrization import dense_weights
from clmerge.weights.swap import full_copy

if TYPE_CHECKING:  # clmerge report, which names mergers, does without Lightning
    from lightning.pytorch import LightningModule, Trainer

PROVIDED = frozenset({"adam", "weights"})
"""Statistics that every run can give its mergers."""


def check_provided(needed: Set[str], trainer: Trainer, module: LightningModule, base: Mapping[str, Tensor]) -> None:
    """Refuse a fit that could not give what ``provided`` is asked for at its end; arguments as there.

    Raises:
        ValueError: If ``"adam"`` is needed and a parameter is trained by another optimizer, or not itself.
    """
    if "adam" in needed:
        require_second_moments(trainer.optimizers, dense_weights(module, base))


def provided(needed: Set[str], trainer: Trainer, module: LightningModule, base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return those of the ``PROVIDED`` statistics that are needed.

    Args:
        needed: Names of statistics.
        trainer: It trained the task; ``"adam"`` are the second moments of its optimizers.
        module: The module as it was trained.
        base: theta_0 by name, which are the ``"weights"``.

    Raises:
        ValueError: If ``"adam"`` is needed and a parameter was trained by another optimizer.
    """
    statistics: dict[str, Any] = {}
    if "weights" in needed:
        statistics["weights"] = base
    if "adam" in needed:
        moments = adam_second_moments(trainer.optimizers, dense_weights(module, base))
        statistics["adam"] = {name: full_copy(moment, base[name].device) for name, moment in moments.items()}
    return statistics


def training_images(module: LightningModule) -> Iterator[Tensor]:
    """Yield the inputs of a Trainer's training batches, on the module's device; random states stay as they are.

    Args:
        module: The module that its Trainer has trained.
    """
    trainer = module.trainer
    if trainer.train_dataloader is None:  # a fit that had nothing left to train has not asked for it
        trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            moved = trainer.strategy.batch_to_device(batch)
            yield moved[0] if isinstance(moved, list | tuple) else moved
