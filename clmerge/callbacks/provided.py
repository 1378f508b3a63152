"""Statistics of a task that need none of its data."""

from collections.abc import Mapping, Set
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from clmerge.callbacks.swap import full_copy
from clmerge.merging.adam import adam_second_moments

PROVIDED = frozenset({"adam", "weights"})
"""Statistics that every run can give its mergers."""


def provided(
    needed: Set[str], trainer: Trainer, theta: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return those of the ``PROVIDED`` statistics that are needed.

    Args:
        needed: Names of statistics.
        trainer: It trained the task; ``"adam"`` are the second moments of its optimizers.
        theta: The live parameters by name.
        base: theta_0 by name, which are the ``"weights"``.

    Raises:
        ValueError: If ``"adam"`` is needed and a parameter was trained by another optimizer.
    """
    statistics: dict[str, Any] = {}
    if "weights" in needed:
        statistics["weights"] = base
    if "adam" in needed:
        moments = adam_second_moments(trainer.optimizers, theta)
        statistics["adam"] = {name: full_copy(moment, base[name].device) for name, moment in moments.items()}
    return statistics
