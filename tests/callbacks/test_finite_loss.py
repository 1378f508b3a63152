import pytest
import torch
from lightning.pytorch import Trainer
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks.finite_loss import FiniteLoss


class Diverging(ForeignModule):
    """Its loss is no number from the fifth step on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.bad if self.global_step == 4 else loss


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_fit_at_once(tmp_path, bad):
    model = Diverging()
    model.bad = bad
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=9,
        callbacks=[FiniteLoss("task 1/2 a")],
        default_root_dir=tmp_path,
        enable_model_summary=False,
        **options,
    )
    with pytest.raises(
        RuntimeError, match=rf"in task 1/2 a, got {bad} in epoch 2, step 5 of the task; lower the learn"
    ):
        trainer.fit(model, toy_loader(0))
    assert trainer.global_step == 4
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
