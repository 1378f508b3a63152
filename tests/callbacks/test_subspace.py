import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from support.tiny import ForeignModule, toy_loader

from clmerge.callbacks import MergeCallback, Subspace
from clmerge.callbacks.subspace import orthonormal
from clmerge.merging import MagMax
from clmerge.weights import task_vector


class Trace(Callback):
    """Remembers the flat weights after every step, and the gradients before it."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(np.concatenate([p.grad.double().flatten().numpy() for p in pl_module.parameters()]))

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.weights.append(flat(pl_module))


def flat(module):
    return np.concatenate([p.detach().double().flatten().numpy() for p in module.parameters()])


def started(seed=0):
    torch.manual_seed(seed)
    return ForeignModule()


def fit(module, callbacks, *, epochs=4, ckpt_path=None, **options):
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
    trainer.fit(module, toy_loader(0), ckpt_path=ckpt_path)
    return module


def test_descent_in_the_span_of_the_weights_of_the_first_part():
    trace = Trace()
    module = fit(started(), [trace, Subspace(3, start=0.5)])  # 12 steps: collects after 2, 4 and 6
    points = np.stack([trace.weights[step - 1] for step in (2, 4, 6)])
    basis, _ = np.linalg.qr(points.T)
    now = points.mean(axis=0)
    for step in range(6, 12):
        now = now - 0.1 * basis @ (basis.T @ trace.gradients[step])
        np.testing.assert_allclose(trace.weights[step], now, atol=1e-5)
    np.testing.assert_allclose(flat(module), now, atol=1e-5)
    outside = flat(module) - basis @ (basis.T @ flat(module))
    assert np.linalg.norm(outside) < 1e-5


def test_weights_of_one_direction_are_one_direction():
    generator = torch.Generator().manual_seed(0)
    one, other = ({"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)} for _ in "ab")
    twice = {name: 2 * tensor for name, tensor in one.items()}
    basis = orthonormal([one, twice, other])
    assert len(basis) == 2
    table = np.array([[sum(float((a[n].double() * b[n].double()).sum()) for n in a) for a in basis] for b in basis])
    np.testing.assert_allclose(table, np.eye(2), atol=1e-6)


class Kill(Callback):
    def __init__(self, epoch, hook):
        setattr(self, hook, lambda trainer, *_: self.fail(trainer, epoch))

    def fail(self, trainer, epoch):
        if trainer.current_epoch >= epoch:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("epoch", "hook"),
    [(1, "on_train_epoch_start"), (3, "on_train_epoch_start"), (4, "on_train_end"), (4, "on_fit_end")],
)
def test_a_fit_that_was_killed_ends_with_the_same_bits(tmp_path, epoch, hook):
    whole = fit(started(), [Subspace(3)])
    killed = started()
    base = {name: p.detach().clone() for name, p in killed.named_parameters()}

    def callbacks():
        saving = ModelCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False)
        return [MergeCallback(MagMax(scale=1.0), base=base), Subspace(3), saving]

    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, [Kill(epoch, hook), *callbacks()])
    resumed, again = started(), callbacks()
    fit(resumed, again, ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    expected = task_vector(whole.state_dict(), base)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again[0].merged_vector().items())


def test_one_instance_serves_two_fits_and_leaves_nothing_behind():
    callback, module = Subspace(3), started()
    fit(module, [callback])
    before = copy.deepcopy(module.state_dict())
    fit(module, [callback])
    assert not torch.equal(module.net[0].weight, before["net.0.weight"])
    fit(module, [], epochs=1)  # hooks of the callback are gone
    assert callback._hooks == []


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="1 point or more and start between 0 and 1"):
        Subspace(0)
    with pytest.raises(ValueError, match="a fit with 2 optimizer steps or more and an end for Subspace"):
        fit(started(), [Subspace(10)], max_steps=1)


def test_a_fit_of_fewer_steps_collects_every_one():
    trace = Trace()
    module = fit(started(), [trace, Subspace(10)], epochs=2)  # 6 steps
    basis, _ = np.linalg.qr(np.stack(trace.weights[:3]).T)
    assert np.linalg.norm(flat(module) - basis @ (basis.T @ flat(module))) < 1e-5
    assert np.linalg.norm(flat(module) - np.stack(trace.weights[:3]).mean(axis=0)) > 1e-3
