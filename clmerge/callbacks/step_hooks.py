"""Do something around every optimizer step of a fit, and stop when the fit ends or fails."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override


class StepHooks(Callback, ABC):
    """Base of callbacks that change optimizer steps from outside, whatever the optimizer."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``_around_steps``, once the fit is known to suit."""

    def _around_steps(
        self,
        trainer: Trainer,
        *,
        before: Callable[[Optimizer], Any] | None = None,
        after: Callable[[Optimizer], Any],
    ) -> None:
        """Call these before and after every step of every optimizer until the fit is over."""
        for optimizer in trainer.optimizers:
            if before is not None:
                self._hooks.append(optimizer.register_step_pre_hook(lambda one, *_: before(one)))
            self._hooks.append(optimizer.register_step_post_hook(lambda one, *_: after(one)))

    def _leave(self) -> None:
        """Leave the optimizers alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()
