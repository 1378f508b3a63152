"""TRADES against its closed form on a logistic model, and in training."""

import pytest
import torch
from support.small_classifier import SmallBackbone, end, small_classifier, start
from torch import nn
from torch.nn import functional

from clmerge.models.adversary import Ball
from clmerge.training.regularizers import TRADES, LossStep

PIXELS = (3, 2, 2)


class FlatBackbone(SmallBackbone):
    """A linear map of 3 x 2 x 2 pixels; logits are its outputs."""

    eval_transform = None

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False))


class Passed(nn.Module):
    """A head that passes the features on."""

    open_vocabulary = False
    wants_prototypes = False

    def build(self, backbone, num_classes, prompts): ...

    def add_classes(self, classes, prototypes=None): ...

    def train_blocks(self, classes): ...

    def forward(self, features):
        return features


def penalty(regularizer, module, images):
    features = module.backbone(images)
    return regularizer.penalty(LossStep(module, images, features, module.head(features)))


@pytest.fixture
def module():
    found = small_classifier(backbone=FlatBackbone(), head=Passed(), loss_classes="current")
    start(found, [0, 1])
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_term_is_the_worst_divergence_of_a_logistic_model(module, norm):
    """Of two classes with margin m, the worst image moves m by eps * dual norm of w, up or down, whichever is worse."""
    images = 0.3 + 0.4 * torch.rand(6, *PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = 0.05
    found = penalty(TRADES(2.0, threats=[Ball(norm, eps)], steps=40), module, images)
    weight = module.backbone.model[1].weight
    difference = (weight[0] - weight[1]).detach()
    dual = difference.abs().sum() if norm == "linf" else difference.norm()
    logits = module(images).detach()[:, :2]
    clean = logits.softmax(dim=1)
    divergences = []
    for sign in (-1, 1):
        moved = torch.stack([logits[:, 0] + sign * eps * dual, logits[:, 1]], dim=1)
        divergences.append((clean * (clean.log() - moved.log_softmax(dim=1))).sum(dim=1))
    assert bool((torch.stack(divergences).amin(dim=0) > 0).all())
    both = torch.stack(divergences)
    low, high = 2.0 * both.amin(dim=0).mean(), 2.0 * both.amax(dim=0).mean()
    # Ascent from a random point reaches one of the two ends, which is a maximum on its side; l2 turns there slowly.
    assert low * (0.995 if norm == "linf" else 0.95) <= found <= high * 1.0001
    assert torch.autograd.grad(found, weight)[0].abs().sum() > 0


def test_classes_outside_of_the_loss_do_not_count(module):
    images = torch.rand(3, *PIXELS, dtype=torch.float64)
    with torch.no_grad():
        module.backbone.model[1].weight[:2] = 1.0  # equal logits of the task's classes, whatever the image
    assert float(penalty(TRADES(steps=2), module, images).detach()) == pytest.approx(0.0, abs=1e-12)


def test_every_task_has_its_threat():
    linf, l2, none = Ball("linf", 0.1), Ball("l2", 0.5), Ball("linf", 0.0)
    regularizer = TRADES(threats=[linf, l2, none], steps=1)
    module = small_classifier(regularizer, backbone=FlatBackbone(), head=Passed(), loss_classes="current")
    seen = []
    for task in range(4):
        start(module, [task])
        seen.append(regularizer.threat)
        end(module)
    assert seen == [linf, l2, none, linf]
    again = TRADES(threats=[linf, l2, none], steps=1)
    again.load_state_dict(regularizer.state_dict())
    assert again.threat == linf
    again.begin_task(module, None)
    assert again.threat == l2


def test_a_ball_of_no_radius_and_no_strength_cost_nothing(module):
    images = torch.rand(2, *PIXELS, dtype=torch.float64)
    for regularizer in (TRADES(threats=[Ball("l2", 0.0)]), TRADES(0.0)):
        assert float(penalty(regularizer, module, images)) == 0.0


def test_training_against_attacks_lowers_the_term(module):
    images = torch.rand(32, *PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = (images.flatten(1).sum(dim=1) > 6).long()
    found = []
    for strength in (0.0, 6.0):
        trained = small_classifier(backbone=FlatBackbone(), head=Passed(), loss_classes="current")
        start(trained, [0, 1])
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.5)
        regularizer = TRADES(strength, threats=[Ball("linf", 0.1)], steps=3)
        for _ in range(30):
            optimizer.zero_grad()
            loss = functional.cross_entropy(trained(images)[:, :2], labels) + penalty(regularizer, trained, images)
            loss.backward()
            optimizer.step()
        found.append(float(penalty(TRADES(1.0, threats=[Ball("linf", 0.1)], steps=10), trained, images).detach()))
    assert found[1] < 0.5 * found[0]


@pytest.mark.parametrize(
    "make",
    [lambda: TRADES(threats=[]), lambda: TRADES(steps=0), lambda: TRADES(-1.0)],
    ids=["balls", "steps", "strength"],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
