import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks import MergeCallback, OnlineMerging
from clmerge.merging import MagMax


def started(*, lr=0.1, optimizer=None):
    class Module(ForeignModule):
        def configure_optimizers(self):
            return (optimizer or torch.optim.SGD)(self.parameters(), lr=lr)

    torch.manual_seed(0)
    return Module()


def fit(module, callbacks, *, steps=-1, epochs=2, ckpt_path=None):
    trainer = Trainer(
        max_epochs=epochs,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, toy_loader(0), ckpt_path=ckpt_path)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def far(base):
    """A theta_0 from which the model has moved."""
    return {name: tensor - torch.linspace(-1, 1, tensor.numel()).view_as(tensor) for name, tensor in base.items()}


def one_step(rule, *, alpha, reserve, every=1, steps=1):
    module = started()
    before = weights(module)
    fit(module, [OnlineMerging(alpha, reserve=reserve, rule=rule, every=every, base=far(before))], steps=steps)
    plain = started()
    fit(plain, [], steps=steps)
    tau = {name: tensor - far(before)[name] for name, tensor in before.items()}
    delta = {name: tensor - before[name] for name, tensor in weights(plain).items()}
    moved = {name: tensor - before[name] for name, tensor in weights(module).items()}
    return delta, tau, moved


def test_all_entries_kept_is_a_weighted_sum():
    delta, tau, moved = one_step("dare", alpha=0.25, reserve=1.0)
    for name in delta:
        torch.testing.assert_close(moved[name], 0.75 * delta[name] + 0.25 * tau[name], rtol=0, atol=1e-6)


def test_dare_keeps_and_rescales_random_entries_of_both():
    delta, tau, moved = one_step("dare", alpha=0.25, reserve=0.5)
    options = [
        a * 0.75 * 2 * delta["net.0.weight"] + b * 0.25 * 2 * tau["net.0.weight"] for a in (0, 1) for b in (0, 1)
    ]
    nearest = torch.stack([(moved["net.0.weight"] - one).abs() for one in options]).min(0)
    assert nearest.values.max() < 1e-6
    assert len(nearest.indices.unique()) == 4


def test_ties_keeps_the_largest_entries_of_the_elected_sign():
    delta, tau, moved = one_step("ties", alpha=0.25, reserve=0.5)

    def top(vector):
        number = round(0.5 * vector.numel())
        threshold = vector.abs().flatten().sort(descending=True).values[number - 1]
        return torch.where(vector.abs() >= threshold, vector, 0.0)

    for name in delta:
        first, second = 0.75 * top(delta[name]), 0.25 * top(tau[name])
        sign = (first + second).sign()
        expected = torch.where(first.sign() == sign, first, 0.0) + torch.where(second.sign() == sign, second, 0.0)
        torch.testing.assert_close(moved[name], expected, rtol=0, atol=1e-6)


def test_merging_at_every_third_step_moves_all_parameters():
    delta, _, moved = one_step("dare", alpha=0.5, reserve=1.0, every=3, steps=2)
    assert all(torch.equal(moved[name], delta[name]) for name in delta)
    module = started()
    before = weights(module)
    fit(module, [OnlineMerging(0.5, reserve=1.0, every=3, base=far(before))], steps=2)
    third = started()
    fit(third, [OnlineMerging(0.5, reserve=1.0, every=3, base=far(before))], steps=3)
    plain = started()
    fit(plain, [], steps=3)
    for name, earlier in weights(module).items():
        step = weights(plain)[name] - earlier
        expected = earlier + 0.5 * step + 0.5 * (before[name] - far(before)[name])
        torch.testing.assert_close(weights(third)[name], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_nothing_kept_back_is_plain_training_bit_for_bit(optimizer):
    merged, plain = started(optimizer=optimizer), started(optimizer=optimizer)
    fit(merged, [OnlineMerging(0.0, reserve=1.0, base=far(weights(merged)))])
    fit(plain, [])
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(merged).items())


@pytest.mark.parametrize("first", [True, False])
def test_in_a_stream_the_reference_is_what_was_learned_before_the_task(first):
    module, merge = started(), MergeCallback(MagMax())
    base = weights(module)

    def callbacks():
        online = OnlineMerging(0.1, reserve=1.0)
        return [online, merge] if first else [merge, online]

    fit(module, callbacks(), steps=1)
    learned = weights(module)
    plain = started()
    fit(plain, [], steps=1)
    for name in base:  # nothing was learned before the first task
        expected = base[name] + 0.9 * (weights(plain)[name] - base[name])
        torch.testing.assert_close(learned[name], expected, rtol=0, atol=1e-6)
    other = copy.deepcopy(module)
    fit(other, [], steps=1)
    fit(module, callbacks(), steps=1)
    for name in base:
        delta = weights(other)[name] - learned[name]
        expected = learned[name] + 0.9 * delta + 0.1 * (learned[name] - base[name])
        torch.testing.assert_close(weights(module)[name], expected, rtol=0, atol=1e-6)
    assert merge.num_tasks == 2


class Kill(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")


@pytest.mark.parametrize("rule", ["dare", "ties"])
def test_a_fit_that_was_killed_ends_with_the_same_bits(tmp_path, rule):
    base = far(weights(started()))

    def callbacks():
        saving = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        return [OnlineMerging(0.1, rule=rule, base=base), saving]

    whole = started(optimizer=torch.optim.AdamW)
    fit(whole, [OnlineMerging(0.1, rule=rule, base=base)], epochs=3)
    with pytest.raises(RuntimeError, match="killed"):
        fit(started(optimizer=torch.optim.AdamW), [Kill(), *callbacks()], epochs=3)
    resumed = started(optimizer=torch.optim.AdamW)
    fit(resumed, callbacks(), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(resumed).items())


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="alpha from 0 to 1"):
        OnlineMerging(2.0)
    with pytest.raises(ValueError, match="expected base, the weights that OnlineMerging's reference"):
        fit(started(), [OnlineMerging()])
