"""End a resumed fit where it had ended: Lightning's checkpoints do not hold that a callback stopped the fit."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

_KEY = "clmerge_stopped"


class StopsAgain(Callback):
    """Stop a fit that is resumed from a checkpoint written after a callback, such as EarlyStopping, had stopped it.

    Without it the resumed fit trains one epoch more than the one that was not interrupted.
    """

    def __init__(self) -> None:
        self._stopped = False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = bool(trainer.should_stop)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._stopped = checkpoint.get(_KEY, False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stopped:
            trainer.should_stop = True
