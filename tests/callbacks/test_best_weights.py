import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, EarlyStopping, ModelCheckpoint
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks import BestWeights, MergeCallback
from clmerge.merging import MagMax
from clmerge.weights import task_vector


class Scripted(ForeignModule):
    """Logs the given losses, one per epoch, and remembers the weights of every epoch."""

    def __init__(self, losses, **options):
        super().__init__(**options)
        self.losses = losses
        self.history = []

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))

    def on_train_epoch_end(self):
        self.history.append({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})


def fit(module, callbacks, *, epochs, ckpt_path=None, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, toy_loader(0), toy_loader(1), ckpt_path=ckpt_path)
    return trainer


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("losses", "mode", "best"),
    [
        ([3.0, 1.0, 2.0], "min", 1),
        ([3.0, 1.0, 2.0], "max", 0),
        ([1.0, 1.0, 1.0], "min", 0),
        ([math.nan, 2.0, math.inf], "min", 1),
        ([3.0, 2.0, 1.0], "min", 2),
    ],
)
def test_the_weights_of_the_best_epoch_are_put_back(losses, mode, best, capsys):
    module = Scripted(losses, batch_norm=True)
    callback = BestWeights(mode=mode)
    fit(module, [callback], epochs=3)
    assert same(module.state_dict(), module.history[best])
    assert not same(module.history[0], module.history[2])
    assert (callback.best, callback.epoch) == (losses[best], best)
    assert f"weights of epoch {best + 1}, the best by val/loss" in capsys.readouterr().err


@pytest.mark.parametrize("first", [True, False])
def test_what_is_merged_is_the_best_epoch_whatever_the_order(first):
    module = Scripted([3.0, 1.0, 2.0])
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    merge = MergeCallback(MagMax(scale=1.0))
    callbacks = [BestWeights(), merge] if first else [merge, BestWeights()]
    fit(module, callbacks, epochs=3)
    assert same(merge.merged_vector(), task_vector(module.history[1], base))
    module.losses = [1.0, 2.0, 3.0]
    fit(module, callbacks, epochs=3)  # the same callbacks in a second fit: nothing of the first is left
    assert same(module.state_dict(), module.history[3])
    assert merge.num_tasks == 2


def test_with_early_stopping():
    module = Scripted([3.0, 1.0, 2.0, 2.5, 0.5])
    trainer = fit(module, [EarlyStopping("val/loss", patience=2), BestWeights()], epochs=5)
    assert trainer.current_epoch == 4
    assert same(module.state_dict(), module.history[1])


def test_validation_in_the_middle_of_an_epoch():
    class AfterEveryBatch(Scripted):
        def on_validation_end(self):
            self.history.append({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})

        def on_train_epoch_end(self):
            pass

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(self.losses[len(self.history)]))

    module = AfterEveryBatch([3.0, 1.0, 0.5, 2.0, 2.0, 2.0])
    fit(module, [BestWeights()], epochs=2, val_check_interval=0.5, num_sanity_val_steps=0)
    assert len(module.history) == 6
    assert same(module.state_dict(), module.history[2])


def test_layers_that_were_still_frozen_in_the_best_epoch():
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)

    class Trained(Scripted):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    module = Trained([1.0, 2.0, 3.0])
    fit(module, [Thaw(), BestWeights()], epochs=3)
    assert not torch.equal(module.history[0]["net.0.weight"], module.history[2]["net.0.weight"])
    assert same(module.state_dict(), module.history[0])


class Kill(Callback):
    """Ends the process's work at one hook, after the checkpoint of that epoch."""

    def __init__(self, epoch, hook):
        setattr(self, hook, lambda trainer, *_: self.fail(trainer, epoch))

    def fail(self, trainer, epoch):
        if trainer.current_epoch >= epoch:
            raise RuntimeError("killed")


@pytest.mark.parametrize(("epoch", "hook"), [(2, "on_train_epoch_start"), (3, "on_fit_end")])
def test_a_fit_that_was_killed_has_the_same_best_epoch(tmp_path, epoch, hook):
    losses = [3.0, 1.0, 2.0]
    torch.manual_seed(0)
    whole = Scripted(losses)
    fit(whole, [BestWeights()], epochs=3)
    torch.manual_seed(0)
    killed = Scripted(losses)
    base = {name: tensor.clone() for name, tensor in killed.state_dict().items()}

    def callbacks():
        saving = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        return [MergeCallback(MagMax(scale=1.0), base=base), BestWeights(), saving]

    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, [Kill(epoch, hook), *callbacks()], epochs=3)
    resumed, again = Scripted(losses), callbacks()
    fit(resumed, again, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(again[0].merged_vector(), task_vector(whole.state_dict(), base))


def test_values_that_are_not_there():
    with pytest.raises(ValueError, match=r"a value 'val/los' for BestWeights, got none in epoch 1: .*\['val/loss'\]"):
        fit(Scripted([1.0]), [BestWeights("val/los")], epochs=1)
    with pytest.raises(ValueError, match="a finite value of 'val/loss' in some epoch for BestWeights, got none"):
        fit(Scripted([math.nan]), [BestWeights()], epochs=1)
    with pytest.raises(ValueError, match="mode to be 'min' or 'max', got 'least'"):
        BestWeights(mode="least")
