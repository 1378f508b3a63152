"""Layers between two models, and sharpness, against plain loops."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from clmerge.evaluation.diagnostics import Observer, average_sharpness, diagnose_layers
from clmerge.weights import apply_task_vector


@pytest.fixture(scope="module")
def pair(base):
    generator = torch.Generator().manual_seed(1)
    return tuple({n: 0.3 * torch.randn(w.shape, generator=generator) for n, w in base.items()} for _ in range(2))


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(20, 3, 4, 4, generator=generator)
    labels = torch.randint(6, (20,), generator=generator)
    return [(images[:12], labels[:12]), (images[12:], labels[12:])]


def loss_of(module, base, vector, batches):
    weights = {name: base[name] + tensor for name, tensor in vector.items()}
    with torch.no_grad():
        logits = torch.cat([functional_call(module, weights, (images,)) for images, _ in batches])
    return float(functional.cross_entropy(logits, torch.cat([labels for _, labels in batches])))


def test_barriers_are_those_of_one_layer_at_a_time(module, base, pair, batches):
    found = diagnose_layers(module, lambda tau: apply_task_vector(base, tau), pair, batches, num_points=3)
    assert sorted(name for layer in found for name in base if name.startswith(layer["name"])) == sorted(base)
    for layer in found:
        own = [name for name in base if name.startswith(layer["name"])]
        for key, (one, other) in {"barrier": pair, "barrier_of_second": pair[::-1]}.items():
            losses = []
            for share in (0.0, 0.5, 1.0):
                moved = {n: (1 - share) * one[n] + share * other[n] if n in own else one[n] for n in one}
                losses.append(loss_of(module, base, moved, batches))
            expected = max(0.0, losses[1] - (losses[0] + losses[2]) / 2)
            assert layer[key] == pytest.approx(expected, abs=1e-6)


def test_features_of_the_average_against_the_average_of_features(module, base, pair, batches):
    found = {
        layer["name"]: layer
        for layer in diagnose_layers(module, lambda tau: apply_task_vector(base, tau), pair, batches)
    }
    name = "backbone.model.1"
    part = module.get_submodule(name)
    outputs = []
    handle = part.register_forward_hook(lambda _, __, output: outputs.append(output.double().flatten()))
    rows = []
    for vector in (*pair, {n: (pair[0][n] + pair[1][n]) / 2 for n in base}):
        outputs.clear()
        loss_of(module, base, vector, batches)
        rows.append(torch.cat(outputs))
    handle.remove()
    a, b, merged = rows
    assert found[name]["features_apart"] == pytest.approx(1 - float(functional.cosine_similarity(a, b, dim=0)))
    assert found[name]["llfc"] == pytest.approx(
        1 - float(functional.cosine_similarity(merged, (a + b) / 2, dim=0)), abs=1e-9
    )
    # The first layer is linear in its weights, so the features of the average are the average of the features.
    assert found[name]["llfc"] == pytest.approx(0, abs=1e-9)
    assert found[name]["coefficient"] == pytest.approx(1, abs=1e-6)
    assert found["backbone.model.2"]["llfc"] > 1e-4  # its inputs move, too


def test_a_model_and_itself_have_no_barrier_and_the_same_features(module, base, pair, batches):
    for layer in diagnose_layers(module, lambda tau: apply_task_vector(base, tau), (pair[0], pair[0]), batches):
        assert layer["barrier"] == pytest.approx(0, abs=1e-6)
        assert layer["features_apart"] in (None, pytest.approx(0, abs=1e-9))
    with pytest.raises(ValueError, match="expected 3 points or more, got num_points=2"):
        diagnose_layers(module, lambda tau: tau, pair, batches, num_points=2)


class Quadratic(nn.Module):
    """A classifier of one feature whose loss is known: features are w * x, logits (features, 0)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))
        self.head = nn.Identity()

    def backbone(self, images):
        score = images.flatten(1).sum(dim=1, keepdim=True) * self.w
        return torch.cat([score, torch.zeros_like(score)], dim=1)

    def forward(self, images):
        return self.backbone(images)


def test_sharpness_is_the_mean_rise_under_noise_in_proportion_to_the_weights():
    module = Quadratic()
    images, labels = torch.ones(1, 1, 1, 1), torch.tensor([0])

    def loss(w):
        return math.log1p(math.exp(-w))

    found = average_sharpness(
        Observer(module), {"w": module.w.detach()}, [(images, labels)], loss=loss(2.0), radius=0.5, draws=4, seed=7
    )
    noise = [float(torch.randn(1, generator=torch.Generator().manual_seed(7 + draw))) for draw in range(4)]
    expected = sum(loss(2.0 + 0.5 * 2.0 * z) for z in noise) / 4 - loss(2.0)
    assert found == pytest.approx(expected, abs=1e-6)
