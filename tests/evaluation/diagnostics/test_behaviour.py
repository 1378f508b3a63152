import math

import pytest
import torch
from support.toy_backbone import ToyBackbone
from torch.nn import functional

from clmerge.evaluation.diagnostics import Observer, barrier, disagreement, representation_bias
from clmerge.evaluation.diagnostics.behaviour import first_images
from clmerge.models import LinearHead
from clmerge.training.module import ContinualClassifier

CLASSES = [(0, 3), (1, 2)]


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = ContinualClassifier(ToyBackbone(), LinearHead())
    module.begin_stream(4)
    for classes in CLASSES:
        module.begin_task(classes)
    module.train()
    return module


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 3, 3, 0, 0])
    images = torch.randn(5, 3, 4, 4, generator=generator)
    return [(images[:2], labels[:2]), (images[2:], labels[2:])]


@pytest.mark.parametrize("classes", [None, (0, 3)])
def test_an_observer_sees_what_the_model_with_those_weights_does(module, batches, classes):
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: torch.randn(module.get_parameter(name).shape, generator=generator) for name in module.trained_names
    }
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = Observer(module)(weights, batches, classes)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())

    module.load_state_dict(weights, strict=False)
    module.eval()
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        features = module.backbone(images)
        logits = module(images)
    if classes is not None:
        logits, labels = logits[:, list(classes)], torch.tensor([classes.index(int(label)) for label in labels])
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found.error == pytest.approx(float((logits.argmax(1) != labels).float().mean()))
    assert torch.equal(found.predictions, logits.argmax(1))
    torch.testing.assert_close(found.features, features)


def test_weights_of_another_model_are_refused(module, batches):
    with pytest.raises(RuntimeError, match="names of the module, got 'other"):
        Observer(module)({"other.weight": torch.zeros(1)}, batches, None)


def test_no_more_images_are_taken_than_asked_for():
    loader = [(torch.full((3, 1), float(i)), torch.full((3,), i), torch.zeros(3)) for i in range(4)]
    assert [len(labels) for _, labels in first_images(loader, 5)] == [3, 2]
    assert [len(labels) for _, labels in first_images(loader, 6)] == [3, 3]
    assert sum(len(labels) for _, labels in first_images(loader, 100)) == 12
    with pytest.raises(ValueError, match="got a loader without any"):
        first_images([], 5)


def test_barrier_by_hand():
    assert barrier([0.0, 1.0], [3.0, 1.0]) == 0.0
    assert barrier([0.0, 0.25, 0.5, 1.0], [1.0, 1.0, 1.0, 3.0]) == 0.0  # below the line all the way
    assert barrier([0.0, 0.25, 0.5, 1.0], [1.0, 2.5, 2.75, 3.0]) == 1.0  # 2.5 - 1.5
    assert math.isnan(barrier([0.0, 0.5, 1.0], [1.0, math.nan, 1.0]))
    assert math.isnan(barrier([0.0, 0.5, 1.0], [math.inf, 1.0, 1.0]))
    for positions, values in (([0.0, 1.0], [1.0]), ([0.1, 1.0], [1.0, 1.0]), ([0.0, 0.5], [1.0, 1.0]), ([], [])):
        with pytest.raises(ValueError, match="a value for every position from 0 to 1"):
            barrier(positions, values)


def test_disagreement_and_bias_by_hand():
    assert disagreement(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)
    features = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    assert representation_bias(features, torch.zeros(2, 2)) == 0.75
    assert representation_bias(features, features) == 0.0
