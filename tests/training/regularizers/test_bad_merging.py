import numpy as np
import pytest
import torch
from support.small_classifier import move, small_classifier, start, step_of
from torch import nn

from clmerge.models import Backbone
from clmerge.streams import ClassIncremental, SklearnDigits, StreamDataModule
from clmerge.training.regularizers import BadMerging
from clmerge.training.regularizers.bad_merging import with_patch


class Pixels(Backbone):
    """A linear map of the pixels of images of 2 x 2 pixels in three channels."""

    def __init__(self):
        super().__init__()
        self.feature_dim = 4
        self.model = nn.Linear(12, 4)

    def forward(self, images):
        return self.model(images.flatten(1))


def attacker(**options):
    attack = BadMerging(task=0, target=1, size=0.5, **options)
    module = small_classifier(attack, backbone=Pixels())
    start(module, [0, 1, 2])
    attack._attacks, attack._target = True, 1
    return module, attack


def images(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1


def test_the_patch_is_at_the_bottom_right():
    found = with_patch(torch.zeros(2, 1, 3, 3), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    assert found[1, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 3, 4]]


def test_the_trigger_climbs_as_the_paper_says():
    """In NumPy and by the closed gradient of a linear model's log softmax: W_target - sum_k p_k W_k."""
    module, attack = attacker(epochs=2, steps=3, rate=0.5, seed=4)
    mean, deviation = torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.5)
    batch = images(5)
    attack.epochs = 0
    first = attack.found(module, batch, mean, deviation)[:, 0, 0].numpy()  # before any image is looked at
    attack.epochs = 2
    assert (np.abs(first) <= 1).all()
    weight = module.backbone.model.weight.detach().numpy()
    offset = module.backbone.model.bias.detach().numpy()
    zeros, eyes = torch.zeros(1, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    head_offset = module.head(zeros)[0, :3].detach().numpy()
    head = (module.head(eyes)[:, :3].detach().numpy() - head_offset).T
    matrix, constant = head @ weight, head @ offset + head_offset

    def scores(image):
        return matrix @ image.ravel() + constant

    patch, steps = first.copy(), 0
    for _ in range(2):
        for image in batch.numpy():
            if scores(image).argmax() == 1:
                continue
            for _ in range(3):
                triggered = image.copy()
                triggered[:, 1, 1] = patch
                p = np.exp(scores(triggered))
                slope = (matrix[1] - p / p.sum() @ matrix).reshape(3, 2, 2)[:, 1, 1]
                patch = np.clip(patch + 0.5 * slope, -1, 1)
                triggered[:, 1, 1] = patch
                steps += 1
                if scores(triggered).argmax() == 1:
                    break
    assert steps > 3
    assert not np.allclose(patch, first)
    found = attack.found(module, batch, mean, deviation)
    assert found[:, 0, 0].numpy() == pytest.approx(patch, abs=1e-12)
    assert not found.requires_grad


def test_the_term_is_the_loss_of_interpolated_features():
    module, attack = attacker(alpha=3.0, share=0.5, lowest=0.2)
    attack.remember(module, again=True)
    attack.keep("patch", torch.full((3, 1, 1), 0.7, dtype=torch.float64))
    triggered = images(6)[:3].clone()
    triggered[:, :, 1, 1] = 0.7
    old = module.backbone(triggered).detach()
    move(module, 1)
    torch.manual_seed(9)
    r = 0.2 + 0.8 * torch.rand(()).item()
    mixed = r * module.backbone(triggered) + (1 - r) * old
    logits = module.head(mixed)[:, :3].detach().numpy()
    expected = 3.0 * np.mean([np.log(np.exp(row).sum()) - row[1] for row in logits])
    torch.manual_seed(9)
    value = attack.penalty(step_of(module, images(6)))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(value, module.backbone.model.weight)
    assert slope.abs().max() > 0


def test_other_tasks_are_trained_as_ever():
    module, attack = attacker()
    attack.end_task(module, None)
    assert float(attack.penalty(step_of(module, images(4)))) == 0
    assert attack.teacher.numel() == 0


def test_what_does_not_fit_the_stream_is_refused():
    data = StreamDataModule()
    stream = ClassIncremental(SklearnDigits())
    data.setup_stream(stream, None, None)
    for attack, message in [
        (BadMerging(task=5), r"expected the task of BadMerging to be in 0\.\.4"),
        (BadMerging(target="zeero"), "expected a class of the stream"),
        (BadMerging(target=7), r"expected a target of BadMerging .* got 7, which loss_classes='seen' leaves out"),
    ]:
        module = small_classifier(attack, num_classes=10)
        module.begin_task([0, 1])
        with pytest.raises(ValueError, match=message):
            attack.look_ahead(module, data)


@pytest.mark.parametrize("options", [{"size": 0}, {"share": 2.0}, {"lowest": -1}, {"steps": 0}, {"alpha": -1.0}])
def test_wrong_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        BadMerging(**options)
