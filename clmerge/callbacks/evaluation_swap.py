"""Other weights during evaluation: swapped in when a test, predict or validate run starts, and always out again."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from clmerge.weights.swap import swapped


class EvaluationSwap(Callback):
    """A callback whose weights are in the model while it is tested, validated by itself, or predicts.

    Validation inside ``fit`` stays on the training weights.
    """

    _swap: AbstractContextManager[None] | None = None

    @abstractmethod
    def _evaluation_state(self, pl_module: LightningModule) -> Mapping[str, Tensor] | None:
        """Return the weights to swap in by the module's own names, or None to evaluate the module as it is."""

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._swap_in(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._swap_out()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._swap_out()

    def _swap_in(self, pl_module: LightningModule) -> None:
        if self._swap is None and (state := self._evaluation_state(pl_module)) is not None:
            swap = swapped(pl_module, state)
            swap.__enter__()
            self._swap = swap

    def _swap_out(self) -> None:
        if self._swap is not None:
            swap, self._swap = self._swap, None
            swap.__exit__(None, None, None)
