"""The losses and the mask of unlearning against independent statements."""

import math

import pytest
import torch
from torch.nn import functional

from clmerge.callbacks import SalienceMask
from clmerge.training.unlearning import ascent_loss, mask_by_salience, memorising_loss


def test_salience_is_over_all_gradients_together():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator).exp() - 1 for size in ((7, 3), (11,), ())]
    entries = torch.cat([gradient.flatten() for gradient in gradients]).double().abs()
    threshold = entries.mean() + 0.5 * entries.std(correction=0)
    expected = [torch.where(gradient.abs() >= threshold, gradient, 0.0) for gradient in gradients]
    mask_by_salience(gradients, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert 0 < sum(int(gradient.count_nonzero()) for gradient in gradients) < len(entries)


def test_equal_gradients_all_stay():
    gradients = [torch.full((3,), 2.0)]
    mask_by_salience(gradients)
    assert gradients[0].tolist() == [2.0] * 3


@pytest.mark.parametrize("classes", [None, [3, 1, 2]])
def test_ascent_is_the_negative_cross_entropy_over_the_competing_classes(classes):
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 1, 2])
    expected = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        among = range(4) if classes is None else classes
        expected += float(row[label]) - math.log(sum(math.exp(row[one]) for one in among))
    assert float(ascent_loss(classes)(logits, labels)) == pytest.approx(expected / 5, rel=1e-5)


def test_random_labels_are_never_the_true_one_and_known():
    """With one other known class, every draw is that class: the loss is known."""
    logits, labels = torch.tensor([[0.3, -math.inf, 1.0], [0.1, -math.inf, -1.0]]), torch.tensor([0, 2])
    loss = memorising_loss(None, random_labels=0.5, generator=torch.Generator().manual_seed(0))
    wrong = functional.cross_entropy(logits, torch.tensor([2, 0]))
    assert float(loss(logits, labels)) == pytest.approx(float(functional.cross_entropy(logits, labels) + 0.5 * wrong))
    plain = memorising_loss([0, 2], generator=torch.Generator())
    assert float(plain(logits, labels)) == pytest.approx(float(functional.cross_entropy(logits, labels)))


def masked(mask, task, monkeypatch):
    from clmerge.streams import StreamDataModule

    data = StreamDataModule()
    monkeypatch.setattr(StreamDataModule, "task", property(lambda self: task))
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([1.0, 1.0, 1.0, 9.0])
    trainer = type("Trainer", (), {"datamodule": data})()
    mask.on_before_optimizer_step(trainer, None, torch.optim.SGD([parameter], lr=1.0))
    return parameter.grad.tolist()


def test_the_callback_masks_the_gradients_of_its_tasks(monkeypatch):
    assert masked(SalienceMask(tasks=[1]), 1, monkeypatch) == [0, 0, 0, 9]
    assert masked(SalienceMask(tasks=[1]), 0, monkeypatch) == [1, 1, 1, 9]
    assert masked(SalienceMask(), 0, monkeypatch) == [0, 0, 0, 9]
    with pytest.raises(ValueError, match="expected deviations of 0 or more, got -1"):
        SalienceMask(deviations=-1)
