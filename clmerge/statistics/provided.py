"""Statistics that a Trainer provides without data, and the images it trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clmerge.statistics.adam import adam_second_moments, require_second_moments
from clmerge.weights.parametrization import dense_weights
from clmerge.weights.swap import full_copy

if TYPE_CHECKING:  # clmerge report, which names mergers, must not import Lightning
    from lightning.pytorch import LightningModule, Trainer

PROVIDED = frozenset({"adam", "weights"})
"""Statistics that every run can provide for its mergers."""


def check_provided(needed: Set[str], trainer: Trainer, module: LightningModule, base: Mapping[str, Tensor]) -> None:
    """Check before a fit that ``provided`` will be able to return the needed statistics; same arguments.

    Raises:
        ValueError: If ``"adam"`` is needed and a parameter is trained by another optimizer, or not directly.
    """
    if "adam" in needed:
        require_second_moments(trainer.optimizers, dense_weights(module, base))


def provided(needed: Set[str], trainer: Trainer, module: LightningModule, base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the needed statistics among ``PROVIDED``.

    Args:
        needed: Names of statistics.
        trainer: The Trainer of the task; ``"adam"`` are the second moments of its optimizers.
        module: The trained module.
        base: theta_0 by name, returned as ``"weights"``.

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
    """Yield the inputs of the Trainer's training batches, on the module's device; random states are restored.

    Args:
        module: The module, attached to the Trainer that trained it.
    """
    trainer = module.trainer
    if trainer.train_dataloader is None:  # a fit without remaining steps has not loaded it
        trainer.fit_loop.setup_data()
    loader: Any = trainer.train_dataloader
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            moved = trainer.strategy.batch_to_device(batch)
            yield moved[0] if isinstance(moved, list | tuple) else moved
