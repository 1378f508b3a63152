"""A classifier of a few dozen float64 weights, small enough to compute its losses by hand."""

import torch
from torch import nn

from clmerge.models import Backbone, LinearHead
from clmerge.training.module import ContinualClassifier
from clmerge.training.regularizers import EWC, IEL, ITA, L2, FeatureDistance, LossStep, LwF, MeanTeacher

REGULARIZERS = {
    "l2": lambda: L2(1e-2),
    "l2 to base": lambda: L2(1e-2, to="base"),
    "ewc": lambda: EWC(1.0),
    "online ewc": lambda: EWC(1.0, decay=0.9),
    "ita": lambda: ITA(1.0),
    "iel": lambda: IEL(1.0),
    "lwf": lambda: LwF(0.3),
    "mean teacher": lambda: MeanTeacher(1.0, decay=0.9),
    "features": lambda: FeatureDistance(0.1),
    "cosine to base": lambda: FeatureDistance(0.1, to="base", distance="cosine"),
}


class SmallBackbone(Backbone):
    """Two linear layers on three inputs."""

    def __init__(self):
        super().__init__()
        self.feature_dim = 4
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, images):
        return self.model(images)


def small_classifier(*regularizers, backbone=None, head=None, loss_classes="seen", num_classes=4, seed=0):
    torch.manual_seed(seed)
    module = ContinualClassifier(
        backbone or SmallBackbone(), head or LinearHead(), loss_classes=loss_classes, regularizers=list(regularizers)
    )
    module.begin_stream(num_classes)
    return module.double()


def start(module, classes, fisher=None):
    """Begin a task as the learner does."""
    module.begin_task(classes)
    module.double()
    for regularizer in module.regularizers:
        regularizer.begin_task(module, fisher or no_fisher)


def end(module, fisher=None):
    for regularizer in module.regularizers:
        regularizer.end_task(module, fisher or no_fisher)


def no_fisher():
    raise AssertionError("expected a regularizer that needs no Fisher information")


def move(module, seed):
    """Put the trained weights somewhere else, as training would; return them."""
    generator = torch.Generator().manual_seed(seed)
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name in module.trained_names:
            own[name].add_(torch.randn(own[name].shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return weights(module)


def weights(module):
    own = dict(module.named_parameters())
    return {name: own[name].detach().clone() for name in module.trained_names}


def made_up_fisher(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator, dtype=torch.float64)
        for name, value in weights(module).items()
    }


def batch(num=6, seed=0):
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(module, images=None):
    images = batch() if images is None else images
    features = module.backbone(images)
    return LossStep(module, images, features, module.head(features))


def term(module, images=None):
    """The only regularizer's term and its gradient by weight."""
    (regularizer,) = module.regularizers
    value = regularizer.penalty(step_of(module, images))
    own = dict(module.named_parameters())
    found = (
        torch.autograd.grad(value, [own[n] for n in module.trained_names], allow_unused=True)
        if value.requires_grad
        else ()
    )
    gradients = {
        name: torch.zeros_like(own[name]) if gradient is None else gradient
        for name, gradient in zip(module.trained_names, found, strict=False)
    }
    return float(value.detach()), gradients
