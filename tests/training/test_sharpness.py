import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.tiny import ForeignModule, tiny_clip, toy_loader
from torch import nn
from torch.nn import functional

from clmerge import ContinualClassifier
from clmerge.models import OpenClip
from clmerge.training.sharpness import ASAM, SAM

SGD = partial(torch.optim.SGD, lr=0.1)


def quadratic(weights, curvature):
    """``1/2 sum of c w^2``, whose gradient is ``c w``."""
    return sum(0.5 * (c * w.square()).sum() for w, c in zip(weights, curvature, strict=True))


def closure_for(optimizer, weights, curvature):
    def closure():
        optimizer.zero_grad()
        loss = quadratic(weights, curvature)
        loss.backward()
        return loss

    return closure


def test_a_step_of_sam_on_a_quadratic():
    """w = (3, 4), c = 1: g = w, |g| = 5, the worse weights are w (1 + rho / 5), the gradient there is the same."""
    weights = [nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))]
    sam = SAM(weights, SGD, rho=0.5)
    loss = sam.step(closure_for(sam, weights, [torch.ones(2, dtype=torch.float64)]))
    assert float(loss.detach()) == 12.5
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64) * (1 - 0.1 * 1.1)
    torch.testing.assert_close(weights[0].data, expected, rtol=1e-6, atol=0)


def test_the_norm_is_that_of_all_parameters_together():
    values, curvature = [[1.0, -2.0], [0.5]], [[2.0, 1.0], [3.0]]
    weights = [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]
    sam = SAM(weights, SGD, rho=0.3)
    sam.step(closure_for(sam, weights, [torch.tensor(c, dtype=torch.float64) for c in curvature]))
    gradients = [[c * w for c, w in zip(cs, ws, strict=True)] for cs, ws in zip(curvature, values, strict=True)]
    norm = math.sqrt(sum(g * g for group in gradients for g in group))
    for weight, ws, cs, gs in zip(weights, values, curvature, gradients, strict=True):
        expected = [w - 0.1 * c * (w + 0.3 * g / norm) for w, c, g in zip(ws, cs, gs, strict=True)]
        assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_step_of_asam_by_hand():
    """T = |w| + eta for the matrix and 1 for the vector; the ascent is rho T^2 g / |T g|."""
    matrix, vector = [[1.0, -2.0]], [0.5]
    weights = [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (matrix, vector)]
    curvature = [torch.tensor([[2.0, 1.0]], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)]
    asam = ASAM(weights, SGD, rho=0.3, eta=0.1)
    asam.step(closure_for(asam, weights, curvature))
    w, c, t = [1.0, -2.0, 0.5], [2.0, 1.0, 3.0], [1.1, 2.1, 1.0]
    g = [a * b for a, b in zip(c, w, strict=True)]
    norm = math.sqrt(sum((a * b) ** 2 for a, b in zip(t, g, strict=True)))
    expected = [w[i] - 0.1 * c[i] * (w[i] + 0.3 * t[i] ** 2 * g[i] / norm) for i in range(3)]
    assert [*weights[0].flatten().tolist(), *weights[1].tolist()] == pytest.approx(expected, rel=1e-6)


def test_asam_does_not_depend_on_the_scale_of_the_weights():
    """w -> k w with a loss of w / k: with eta = 0 the worse weights scale along."""
    worse = []
    for k in (1.0, 10.0):
        weight = nn.Parameter(torch.tensor([[1.0, -2.0]], dtype=torch.float64) * k)
        asam = ASAM([weight], SGD, rho=0.2, eta=0.0)
        seen = []

        def closure(asam=asam, weight=weight, k=k, seen=seen):
            asam.zero_grad()
            seen.append(weight.detach().clone() / k)
            loss = ((weight / k) ** 4).sum()
            loss.backward()
            return loss

        asam.step(closure)
        worse.append(seen[1])
    torch.testing.assert_close(worse[0], worse[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "base", [SGD, partial(torch.optim.AdamW, lr=0.01), partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
@pytest.mark.parametrize("kind", [SAM, ASAM])
def test_without_a_neighbourhood_it_is_the_base_optimizer_bit_for_bit(base, kind):
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    plain, wrapped = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = base([plain]), kind([wrapped], base, rho=0.0)
    for _ in range(3):
        for weight, optimizer in zip((plain, wrapped), optimizers, strict=True):
            optimizer.step(closure_for(optimizer, [weight], [torch.arange(5.0)]))
    assert torch.equal(plain, wrapped)


def test_the_weights_come_back_when_the_second_pass_fails():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    sam = SAM([weight], SGD)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        sam.zero_grad()
        weight.square().sum().backward()

    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert weight.tolist() == [1.0, 2.0]


def test_no_gradient_and_a_zero_gradient_are_no_trouble():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))]
    sam = SAM(weights, SGD)
    sam.step(closure_for(sam, weights[:1], [torch.ones(2)]))
    assert [w.tolist() for w in weights] == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(("kind", "options"), [(SAM, {"rho": -0.1}), (ASAM, {"eta": -1.0}), (SAM, {"rho": math.nan})])
def test_wrong_settings_are_refused(kind, options):
    with pytest.raises(ValueError, match="expected"):
        kind([nn.Parameter(torch.ones(1))], **options)


def test_a_step_without_a_closure_names_the_precision():
    with pytest.raises(RuntimeError, match="bf16-mixed"):
        SAM([nn.Parameter(torch.ones(1))]).step()


# In a Trainer --------------------------------------------------------------------------------------------------


class Sharp(ForeignModule):
    def configure_optimizers(self):
        optimizer = SAM(self.parameters(), partial(torch.optim.AdamW, lr=0.05), rho=0.1)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7), "interval": "step"}
        ]


def trainer(*callbacks, **options):
    defaults = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), **defaults | options)


def by_hand(model, loader, epochs, clip=None):
    """SAM and AdamW and StepLR, written out in a loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
    parameters = list(model.parameters())

    def gradients(x, y):
        optimizer.zero_grad()
        functional.cross_entropy(model.net(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)

    for _ in range(epochs):
        for x, y in loader:
            gradients(x, y)
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.1 * p.grad / norm)
            gradients(x, y)
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_trainer_takes_the_steps_of_a_loop_by_hand(clip):
    torch.manual_seed(0)
    model, twin = Sharp(), Sharp()
    twin.load_state_dict(model.state_dict())
    run = trainer(gradient_clip_val=clip)
    run.fit(model, toy_loader(0))
    by_hand(twin, toy_loader(0), 2, clip)
    assert run.global_step == 6
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_a_fit_resumes_to_the_same_bits(tmp_path):
    torch.manual_seed(0)
    whole, part = Sharp(), Sharp()
    part.load_state_dict(whole.state_dict())
    trainer().fit(whole, toy_loader(0))
    options = {"dirpath": tmp_path, "filename": "a", "every_n_epochs": 1, "save_on_train_epoch_end": True}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(ModelCheckpoint(**options), Stop(), enable_checkpointing=True).fit(part, toy_loader(0))
    resumed = trainer(ModelCheckpoint(**options), enable_checkpointing=True)
    resumed.fit(part, toy_loader(0), ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_it_trains_under_bf16_mixed_precision():
    torch.manual_seed(0)
    model = Sharp()
    with torch.no_grad():
        first = float(sum(functional.cross_entropy(model.net(x), y) for x, y in toy_loader(0)))
    trainer(precision="bf16-mixed", gradient_clip_val=1.0, max_epochs=6).fit(model, toy_loader(0))
    with torch.no_grad():
        last = float(sum(functional.cross_entropy(model.net(x), y) for x, y in toy_loader(0)))
    assert last < 0.9 * first
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_gradient_accumulation_is_refused(tmp_path):
    module = ContinualClassifier(OpenClip(tiny_clip(tmp_path)), optimizer=SAM)
    module.begin_stream(2, [["a"], ["b"]])
    module.begin_task([0, 1])
    images = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="accumulate_grad_batches=1 with SAM, got 2"):
        trainer(accumulate_grad_batches=2).fit(module, torch.utils.data.DataLoader(images, batch_size=1))
