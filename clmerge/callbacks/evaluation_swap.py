"""Swap other weights into a model for test, predict and validate runs, and restore its own afterwards."""

import itertools
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from clmerge.lightning_compat import callbacks_of, put_callback, restore_callbacks
from clmerge.weights.digest import changed, digests
from clmerge.weights.swap import named_tensors, swapped

_ORIGIN = "the merged model"
_clock = itertools.count(1)


class EvaluationSwap(Callback):
    """A callback that puts its weights into the model for test, predict and standalone validate runs.

    Validation inside ``fit`` uses the training weights.

    Lightning calls every hook in the order of the Trainer's callbacks, so that of two callbacks that swap weights the
    first one would also be the first to swap back. Therefore this callback moves to the end of the Trainer's callbacks
    when a run is set up, and to their beginning once its weights are swapped in: it swaps in last and out first. At
    the end of the run the original order of the callbacks is restored.
    """

    _swaps: tuple[AbstractContextManager[None], ...] = ()
    _placed: Mapping[str, int] = {}  # digests of the tensors swapped in
    _left: Mapping[str, Tensor] = {}  # the tensors swapped out, until the run is torn down
    _entered = 0
    _seen = False

    @abstractmethod
    def _evaluation_state(self, trainer: Trainer, pl_module: LightningModule) -> Mapping[str, Tensor] | None:
        """Return the weights to swap in by the module's own names, or None to evaluate the module unchanged."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._left = {}
        put_callback(trainer, self, first=False)

    # Hooks. Tests and predictions are alike; only validation may also be a part of a fit.

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps or (state := self._evaluation_state(trainer, pl_module)) is None:
            return
        self._enter(pl_module, state)
        self._placed = digests(named_tensors(pl_module, state, origin=_ORIGIN))
        self._entered, self._seen = next(_clock), False
        for other in _active(trainer):
            if other is not self and (shared := other._placed.keys() & self._placed.keys()):
                warnings.warn(
                    f"two callbacks of this Trainer put merged weights into the same {len(shared)} tensors; what is "
                    f"evaluated is that of the later one, {self.state_key}; give one MergeCallback several mergers "
                    "instead, and evaluate each of them within merge.merged(model, NAME)",
                    RuntimeWarning,
                    stacklevel=2,
                )

    on_predict_start = on_test_start

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_start(trainer, pl_module)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps:
            self._swap_in_again(trainer, pl_module)
            put_callback(trainer, self, first=True)

    on_predict_epoch_start = on_validation_epoch_start = on_test_epoch_start

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._swaps and not self._seen:
            self._swap_in_again(trainer, pl_module)

    on_predict_batch_start = on_validation_batch_start = on_test_batch_start

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._swaps and not self._seen:  # once: warn if the weights were not the merged ones all the time
            self._seen = True
            if names := self._replaced(trainer, pl_module):
                warnings.warn(
                    f"expected the merged weights in {type(pl_module).__name__} while a batch was evaluated, got other "
                    f"values in {len(names)} of {len(self._placed)} tensors, the first {names[0]!r}: a callback, or "
                    "the module, changes weights from batch to batch; what is evaluated is not the merged model alone",
                    RuntimeWarning,
                    stacklevel=2,
                )

    on_predict_batch_end = on_validation_batch_end = on_test_batch_end

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(keep=1)

    on_predict_epoch_end = on_validation_epoch_end = on_test_epoch_end

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._swaps:
            self._swap_out()
            tensors = named_tensors(pl_module, self._placed, origin=_ORIGIN)
            self._left = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    on_predict_end = on_validation_end = on_test_end

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer)
        self._put_back(pl_module)

    # What they share ----------------------------------------------------------------------------------------------

    def _leave(self, trainer: Trainer) -> None:
        """Clean up at the end of a run, also after an exception."""
        self._swap_out()
        restore_callbacks(trainer)

    def _swap_in_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in again, over weights that another callback has swapped in since."""
        replaced = bool(self._replaced(trainer, pl_module))
        if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            # Each process sees only its shard, and setting whole tensors is a collective, so all processes must agree.
            replaced = trainer.strategy.reduce_boolean_decision(replaced, all=False)
        if replaced and (state := self._evaluation_state(trainer, pl_module)) is not None:
            self._enter(pl_module, {name: state[name] for name in self._own(trainer)})

    def _enter(self, pl_module: LightningModule, state: Mapping[str, Tensor]) -> None:
        swap = swapped(pl_module, state)
        swap.__enter__()
        self._swaps = (*self._swaps, swap)

    def _own(self, trainer: Trainer) -> dict[str, int]:
        """Return the digests of tensors swapped in here that no other such callback has swapped since."""
        above = {name for other in _active(trainer) if other._entered > self._entered for name in other._placed}
        return {name: value for name, value in self._placed.items() if name not in above}

    def _replaced(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        own = self._own(trainer)
        return changed(named_tensors(pl_module, own, origin=_ORIGIN), own)

    def _swap_out(self, *, keep: int = 0) -> None:
        while len(self._swaps) > keep:
            *rest, swap = self._swaps
            self._swaps = tuple(rest)
            swap.__exit__(None, None, None)

    def _put_back(self, pl_module: LightningModule) -> None:
        """Restore tensors that the module's own hooks, which run after callbacks, have set to merged weights again."""
        left, self._left = self._left, {}
        tensors = named_tensors(pl_module, left, origin=_ORIGIN)
        again = left.keys() - changed(tensors, {name: self._placed[name] for name in left})
        with torch.no_grad():
            for name in again:  # each process restores its own shard, if they are sharded
                tensors[name].copy_(left[name])


def _active(trainer: Trainer) -> list[EvaluationSwap]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, EvaluationSwap) and callback._swaps]
