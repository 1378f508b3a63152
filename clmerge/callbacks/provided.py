"""Statistics of a task that need none of its data."""

from collections.abc import Mapping, Set
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from clmerge.merging.adam import adam_second_moments
from clmerge.weights.parametrization import dense_weights
from clmerge.weights.swap import full_copy

PROVIDED = frozenset({"adam", "weights"})
"""Statistics that every run can give its mergers."""


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
