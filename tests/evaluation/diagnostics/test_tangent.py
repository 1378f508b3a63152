import pytest
import torch
from torch import nn

from clmerge.evaluation.diagnostics import tangent_localisation
from clmerge.evaluation.diagnostics.tangent import tangent_images


def linear(num_inputs=4, num_classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(num_inputs, num_classes, bias=False))


def state(module, tau=0.0):
    return {"1.weight": module[1].weight.detach() + tau}


def test_of_a_linear_model_with_orthogonal_tasks():
    """Task one has inputs 0 and 1, task two inputs 2 and 3: gradients are orthogonal, so nothing leaks."""
    module = linear()
    own = (torch.eye(4)[:2].reshape(2, 1, 2, 2), torch.tensor([0, 1]))
    other = (torch.eye(4)[2:].reshape(2, 1, 2, 2), torch.tensor([0, 1]))
    tau = torch.zeros(2, 4)
    tau[0, 0], tau[1, 1] = 1.0, 2.0
    found = tangent_localisation(module, state(module), state(module, tau), own, other)
    assert found == {"localisation": pytest.approx(1), "alignment": pytest.approx(1, abs=1e-5), "images": 4}
    half = tau.clone()
    half[0, 2], half[1, 3] = 1.0, 2.0  # as much on the other task
    found = tangent_localisation(module, state(module), state(module, half), own, other)
    assert found["localisation"] == pytest.approx(0.5, abs=1e-5)
    unseen = torch.zeros(2, 4)
    unseen[0, 0], unseen[1, 0] = 3.0, 4.0  # the second of these moves no image's own logit
    found = tangent_localisation(module, state(module), state(module, unseen), own, other)
    assert found["alignment"] == pytest.approx(3 / 5, abs=1e-5)


def test_against_dense_projections():
    module = linear(6, 3)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(6, 1, 2, 3, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    tau = torch.randn(3, 6, generator=generator)
    found = tangent_localisation(
        module, state(module), state(module, tau), (images[:3], labels[:3]), (images[3:], labels[3:])
    )
    rows = torch.zeros(6, 3, 6, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        rows[i, label] = images[i].double().flatten()
    jacobian = rows.flatten(1)
    flat = tau.double().flatten()
    projection = torch.linalg.pinv(jacobian) @ jacobian @ flat
    assert found["alignment"] == pytest.approx(float(projection.norm() / flat.norm()), abs=1e-5)
    left, values, _ = torch.linalg.svd(jacobian, full_matrices=False)
    energy = (left.T @ (jacobian @ flat)).square()
    mass = left[:3].square().sum(dim=0)
    assert values.min() > 1e-3
    assert found["localisation"] == pytest.approx(float((energy * mass).sum() / energy.sum()), abs=1e-5)


def test_a_vector_that_does_nothing_has_no_place_and_large_models_take_fewer_images():
    module = linear()
    part = (torch.ones(1, 1, 2, 2), torch.tensor([0]))
    found = tangent_localisation(module, state(module), state(module), part, part)
    assert found["localisation"] is None
    assert found["alignment"] is None
    assert tangent_images({"w": torch.empty(1000)}, 16) == 16
    assert tangent_images({"w": torch.empty(1).expand(86_000_000)}, 16) == 1
