"""Mask the gradients of requests to unlearn by their salience."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from clmerge.streams import StreamDataModule
from clmerge.training.unlearning import mask_by_salience


class SalienceMask(Callback):
    """Train on some tasks with those entries of the gradient alone that are far larger than the rest (SSU).

    In every optimizer step, entries stay whose magnitude is at least the mean plus ``deviations`` standard deviations
    of the magnitudes of all entries (arXiv 2406.10952). It is the last thing before the step: gradients are unscaled
    and, without clipping by the Trainer, final.

    Args:
        tasks: Indices of the tasks; default all.
        deviations: How many standard deviations.

    Raises:
        ValueError: If ``deviations`` is negative.
    """

    def __init__(self, tasks: list[int] | None = None, deviations: float = 1.0) -> None:
        if deviations < 0:
            raise ValueError(f"expected deviations of 0 or more, got {deviations}")
        self.tasks, self.deviations = tasks, deviations

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        data = getattr(trainer, "datamodule", None)
        if self.tasks is not None and not (isinstance(data, StreamDataModule) and data.task in self.tasks):
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            mask_by_salience(gradients, self.deviations)
