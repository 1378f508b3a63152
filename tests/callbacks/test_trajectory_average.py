import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from support.tiny import ForeignModule, toy_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clmerge.callbacks import BestWeights, MergeCallback, TrajectoryAverage
from clmerge.merging import MagMax
from clmerge.training.trajectory import EMA, Accepting, Horizons, Latest, LossValley, Mean
from clmerge.weights import task_vector

RULES = {
    "Mean": lambda: Mean(start=0.0),
    "Mean_steps": lambda: Mean(start=0.5, every=2),
    "EMA": lambda: EMA(0.7),
    "EMA_validated": lambda: EMA(0.7, validates="average"),
    "Latest": lambda: Latest(2),
    "LossValley": lambda: LossValley(2, 2),
    "Accepting": lambda: Accepting("val/loss", mode="min"),
    "Horizons": lambda: Horizons([0.2, 0.6, 0.9]),
}


def held_out(module):
    """How well a module answers a batch that it does not train on."""
    x, y = next(iter(toy_loader(1)))
    with torch.no_grad():
        return -float(nn.functional.cross_entropy(module.net.eval()(x), y))


def average_by(name):
    return TrajectoryAverage(RULES[name](), score=held_out if name == "Horizons" else None)


class Recorded(ForeignModule):
    """Remembers its weights after every optimizer step, and what was in place in validations."""

    def __init__(self, **options):
        super().__init__(**options)
        self.history, self.validated = [], []

    def forward(self, inputs):
        return self.net(inputs)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.history.append({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})

    def on_validation_epoch_start(self):
        self.validated.append({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y))


def fit(module, callbacks, *, epochs, ckpt_path=None, train=0, **options):
    trainer = Trainer(
        **{"max_epochs": epochs} | options,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, toy_loader(train), toy_loader(1), ckpt_path=ckpt_path)
    return trainer


def mean(points):
    return {
        name: torch.stack([point[name] for point in points]).mean(0)
        for name, tensor in points[0].items()
        if tensor.is_floating_point()
    }


def close(first, second):
    return all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("first", [True, False])
def test_the_average_is_what_is_merged_whatever_the_order(first):
    module = Recorded()
    base = copy.deepcopy(module.state_dict())
    merge, average = MergeCallback(MagMax(scale=1.0)), TrajectoryAverage(Mean(start=0.0))
    callbacks = [average, merge] if first else [merge, average]
    fit(module, callbacks, epochs=4)
    assert close(module.state_dict(), mean(module.history[2::3]))
    assert same(merge.merged_vector(), task_vector(module.state_dict(), base))
    # The same instance in a second fit averages that one, and moves on from there.
    before, module.history = copy.deepcopy(module.state_dict()), []
    fit(module, callbacks, epochs=2, train=3)
    assert close(module.state_dict(), mean(module.history[2::3]))
    assert not same(module.state_dict(), before)
    assert merge.num_tasks == 2
    assert merge.vectors[0] != merge.vectors[1]


@pytest.mark.parametrize(
    ("rule", "collected"),
    [
        (lambda: Mean(start=0.5), [5, 8, 11]),
        (lambda: Mean(start=0.0, every=5), [4, 9]),
        (lambda: Mean(start=0.75, every=1), [8, 9, 10, 11]),
        (lambda: Latest(2, every=4), [7, 11]),
        (lambda: Latest(1, every=1), [11]),
        (lambda: EMA(0.0), [11]),
    ],
)
def test_what_is_collected(rule, collected):
    module = Recorded()
    fit(module, [TrajectoryAverage(rule())], epochs=4)
    assert close(module.state_dict(), mean([module.history[step] for step in collected]))


def test_accumulated_gradients_count_as_one_step():
    module = Recorded()
    callback = TrajectoryAverage(Mean(start=0.0, every=1))
    fit(module, [callback], epochs=2, accumulate_grad_batches=2)
    assert callback.rule.count == 4
    assert close(module.state_dict(), mean([module.history[batch] for batch in (1, 2, 4, 5)]))


def test_an_epoch_that_max_steps_cut_short():
    module = Recorded()
    callback = TrajectoryAverage(Mean(start=0.0))
    fit(module, [callback], epochs=9, max_steps=5)
    assert close(module.state_dict(), mean([module.history[2], module.history[4]]))


def test_validation_on_training_weights_or_on_the_average():
    module = Recorded()
    fit(module, [TrajectoryAverage(Mean(start=0.0))], epochs=3)
    assert all(same(found, module.history[3 * epoch + 2]) for epoch, found in enumerate(module.validated))
    module = Recorded()
    fit(module, [TrajectoryAverage(Mean(start=0.0, validates="average"))], epochs=3)
    for epoch, found in enumerate(module.validated):
        assert close(found, mean(module.history[2 : 3 * epoch + 3 : 3]))
    # Training went on from its own weights, not from the average.
    torch.manual_seed(0)
    plain = Recorded()
    torch.manual_seed(0)
    averaged = Recorded()
    fit(plain, [], epochs=2)
    fit(averaged, [TrajectoryAverage(Mean(start=0.0, validates="average"))], epochs=2)
    assert same(plain.history[-1], averaged.history[-1])


def test_a_validation_that_fails_leaves_the_training_weights():
    class Fails(Recorded):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise RuntimeError("no such image")
            super().validation_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="no such image"):
        fit(module, [TrajectoryAverage(Mean(start=0.0, validates="average"))], epochs=3)
    assert same(module.state_dict(), module.history[5])


@pytest.mark.parametrize("buffers", ["recompute", "average", "latest"])
def test_running_statistics(buffers):
    module = Recorded(batch_norm=True)
    fit(module, [TrajectoryAverage(Mean(start=0.0, buffers=buffers))], epochs=3)
    found = module.net[1].running_mean
    if buffers == "latest":
        expected = module.history[-1]["net.1.running_mean"]
    elif buffers == "average":
        expected = mean(module.history[2::3])["net.1.running_mean"]
    else:
        inputs = [module.net[0](batch[0]) for batch in toy_loader(0)]
        expected = torch.stack([one.mean(0) for one in inputs]).mean(0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(module.net[1].num_batches_tracked, torch.tensor(9))


def test_loss_valley_and_accepting_in_a_fit():
    class Scripted(Recorded):
        losses = (3.0, 1.0, 1.1, 1.2, 9.0, 9.0)

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))

    module = Scripted()
    fit(module, [TrajectoryAverage(LossValley(2, 2))], epochs=6)
    assert close(module.state_dict(), mean(module.history[3:12]))  # epochs 2 to 4; all steps weigh alike
    module = Scripted()
    callback = TrajectoryAverage(Accepting("val/loss", mode="min"))
    fit(module, [callback], epochs=6)
    assert close(module.state_dict(), mean([module.history[2], module.history[5]]))
    assert callback.rule.accepted == 2


def test_the_horizon_that_held_out_images_choose():
    module, seen = Recorded(), []

    def score(one):
        seen.append({name: tensor.detach().clone() for name, tensor in one.state_dict().items()})
        return float(len(seen) == 2)

    callback = TrajectoryAverage(Horizons([0.0, 0.5, 0.9], warmup=False), score=score)
    fit(module, [callback], epochs=3)
    for decay, found in zip((0.0, 0.5, 0.9), seen, strict=True):
        expected = EMA(decay)
        for point in module.history:
            expected.collect({name: tensor for name, tensor in point.items() if tensor.is_floating_point()})
        assert close(found, expected.compute())
    assert same(module.state_dict(), seen[1])
    assert callback.rule.scores == {"0.0": 0.0, "0.5": 1.0, "0.9": 0.0}
    with pytest.raises(ValueError, match=r"expected score=, by which Horizons\(.*chooses one of its averages"):
        TrajectoryAverage(Horizons())


def test_frozen_parts_need_no_memory_and_stay():
    module = Recorded()
    module.net[0].requires_grad_(False)
    frozen = module.net[0].weight.clone()
    callback = TrajectoryAverage(Mean(start=0.0))
    fit(module, [callback], epochs=2)
    assert callback.nbytes == 4 * sum(p.numel() for p in module.net[3].parameters())
    assert torch.equal(module.net[0].weight, frozen)
    some = TrajectoryAverage(Mean(start=0.0), include=["net.3.*"])
    module = Recorded()
    fit(module, [some], epochs=2)
    assert torch.equal(module.net[0].weight, module.history[-1]["net.0.weight"])
    assert close({"w": module.net[3].weight}, {"w": mean(module.history[2::3])["net.3.weight"]})


def test_a_fit_that_collects_nothing_keeps_its_last_weights():
    module = Recorded()
    merge = MergeCallback(MagMax(scale=1.0))
    base = copy.deepcopy(module.state_dict())
    with pytest.warns(RuntimeWarning, match=r"before Mean\(.*took in any weights, so its last weights stay"):
        fit(module, [merge, TrajectoryAverage(Mean(every=100))], epochs=2)
    assert same(module.state_dict(), module.history[-1])
    assert same(merge.merged_vector(), task_vector(module.state_dict(), base))


def test_settings_that_do_not_fit():
    with pytest.raises(TypeError, match=r"which buffers='recompute' calls .* or choose 'average' or 'latest'"):
        fit(ForeignModule(batch_norm=True), [TrajectoryAverage(Mean())], epochs=1)
    with pytest.raises(ValueError, match="got TrajectoryAverage and EMAWeightAveraging"):
        fit(Recorded(), [TrajectoryAverage(Mean()), EMAWeightAveraging()], epochs=1)
    with pytest.raises(ValueError, match="got TrajectoryAverage and BestWeights"):
        fit(Recorded(), [BestWeights(), TrajectoryAverage(Mean())], epochs=1)
    with pytest.raises(ValueError, match="whose start is a share of the fit, got a fit without end"):
        fit(Recorded(), [TrajectoryAverage(Mean())], epochs=-1)
    with pytest.raises(ValueError, match=r"a value 'val/los' for LossValley, got none in epoch 1.*'val/loss'"):
        fit(Recorded(), [TrajectoryAverage(LossValley(monitor="val/los"))], epochs=1)


class Kill(Callback):
    """Ends the process's work at one hook, after the checkpoint of that epoch."""

    def __init__(self, epoch, hook):
        setattr(self, hook, lambda trainer, *_: self.fail(trainer, epoch))

    def fail(self, trainer, epoch):
        if trainer.current_epoch >= epoch:
            raise RuntimeError("killed")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("epoch", "hook"),
    [(1, "on_train_epoch_start"), (3, "on_train_epoch_start"), (4, "on_train_end"), (4, "on_fit_end")],
)
def test_a_fit_that_was_killed_has_the_same_average(tmp_path, name, epoch, hook):
    def started():
        torch.manual_seed(0)
        return Recorded(batch_norm=True)

    whole = started()
    fit(whole, [average_by(name)], epochs=4)
    killed = started()
    base = copy.deepcopy(killed.state_dict())

    def callbacks():
        saving = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        merge = MergeCallback(MagMax(scale=1.0), base={k: v for k, v in base.items() if k.endswith(("weight", "bias"))})
        return [merge, average_by(name), saving]

    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, [Kill(epoch, hook), *callbacks()], epochs=4)
    resumed, again = started(), callbacks()
    fit(resumed, again, epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    parameters = {name: tensor for name, tensor in whole.state_dict().items() if name in again[0].base}
    assert same(again[0].merged_vector(), task_vector(parameters, {name: base[name] for name in parameters}))


def test_persistent_workers_are_not_read_twice_in_an_epoch():
    loader = toy_loader(0)
    loader = DataLoader(loader.dataset, batch_size=8, num_workers=1, persistent_workers=True)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=0.5,
        callbacks=[TrajectoryAverage(EMA(0.5, validates="average"))],
    )
    with pytest.raises(ValueError, match="set buffers to 'latest' or 'average'"):
        trainer.fit(
            Recorded(batch_norm=True), loader, DataLoader(TensorDataset(torch.randn(4, 4), torch.ones(4).long()))
        )
