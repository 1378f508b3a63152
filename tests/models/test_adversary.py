"""Projected gradient ascent against what it finds on linear models, where the worst image is known."""

import pytest
import torch

from clmerge.models.adversary import Ball, attacked

PLAIN = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def linear(weight):
    """Return the loss of a linear binary model: minus its margin."""
    return lambda images: -(images.flatten(1) @ weight.flatten())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_worst_image_of_a_linear_model_lowers_the_margin_by_the_dual_norm(norm):
    """Far from the borders of [0, 1] the worst margin is margin - eps * |w|_1 (linf), or - eps * |w|_2 (l2)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    ball = Ball(norm, 0.1)
    found = attacked(
        images,
        linear(weight),
        ball,
        start=ball.random(images, generator),
        steps=40,
        step_size=0.025,
        normalise=PLAIN,
    )
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    expected = -linear(weight)(images) - 0.1 * dual
    torch.testing.assert_close(-linear(weight)(found), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_stay_in_the_ball_and_in_the_range_of_pixels(norm):
    generator = torch.Generator().manual_seed(1)
    mean, deviation = torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).reshape(3, 1, 1)
    pixels = torch.rand(6, 3, 5, 5, generator=generator).round()  # black and white: the border is everywhere
    images = (pixels - mean) / deviation
    weight = torch.randn(3, 5, 5, generator=generator)
    ball = Ball(norm, 0.3)
    found = attacked(
        images,
        linear(weight),
        ball,
        start=ball.random(images, generator),
        steps=10,
        step_size=0.1,
        normalise=(mean, deviation),
    )
    after = found * deviation + mean
    assert after.min() >= -1e-6
    assert after.max() <= 1 + 1e-6
    moved = (after - pixels).flatten(1)
    size = moved.abs().amax(dim=1) if norm == "linf" else moved.norm(dim=1)
    assert (size <= 0.3 + 1e-5).all()
    assert (linear(weight)(found) > linear(weight)(images)).all()


def test_random_points_fill_the_ball():
    """In d dimensions the length of a uniform point is eps * U^(1/d); each coordinate of linf is uniform."""
    generator = torch.Generator().manual_seed(2)
    like = torch.zeros(4000, 1, 1, 2)
    lengths = Ball("l2", 2.0).random(like, generator).flatten(1).norm(dim=1)
    assert lengths.max() <= 2.0 + 1e-6
    assert float((lengths < 1.0).float().mean()) == pytest.approx(0.25, abs=0.03)
    found = Ball("linf", 2.0).random(like, generator)
    assert found.abs().max() <= 2.0
    assert float((found.abs() < 1.0).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_projection_moves_only_what_is_outside():
    inside, outside = torch.tensor([[[[0.3, 0.4]]]]), torch.tensor([[[[6.0, 8.0]]]])
    ball = Ball("l2", 1.0)
    assert torch.equal(ball.project(inside), inside)
    torch.testing.assert_close(ball.project(outside), torch.tensor([[[[0.6, 0.8]]]]))
    assert torch.equal(Ball("l2", 0.0).project(outside), torch.zeros(1, 1, 1, 2))
    assert torch.equal(Ball("linf", 1.0).project(outside), torch.ones(1, 1, 1, 2))


def test_a_vanishing_gradient_leaves_the_image():
    images = torch.full((1, 1, 2, 2), 0.5)
    options = {"start": torch.zeros_like(images), "steps": 3, "step_size": 0.1, "normalise": PLAIN}
    found = attacked(images, lambda each: (each * 0.0).flatten(1).sum(dim=1), Ball("l2", 0.3), **options)
    assert torch.equal(found, images)


def test_a_model_that_blocks_gradients_is_refused():
    images = torch.full((1, 1, 2, 2), 0.5)
    options = {"start": torch.zeros_like(images), "steps": 1, "step_size": 0.1, "normalise": PLAIN}
    with pytest.raises(RuntimeError, match="one that blocks gradients"):
        attacked(images, lambda each: each.detach().flatten(1).sum(dim=1), Ball(), **options)


@pytest.mark.parametrize("wrong", [{"norm": "l1"}, {"eps": -0.1}])
def test_no_other_balls(wrong):
    with pytest.raises(ValueError, match="expected norm linf or l2 and eps of 0 or more"):
        Ball(**wrong)


@pytest.mark.peers
@pytest.mark.parametrize(("norm", "eps", "border"), [("linf", 0.03, 0.0), ("linf", 0.1, 0.0), ("l2", 0.5, 0.3)])
def test_attack_equals_that_of_adversarial_robustness_toolbox(norm, eps, border):
    """Version 1.20.1, from the image itself: its random points come from numpy.

    It goes into [0, 1] before the ball, so that images of l2 that touch the border of [0, 1] differ.
    """
    attacks = pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
    )
    images = border + (1 - 2 * border) * torch.rand(32, 3, 8, 8, generator=generator)
    labels = torch.randint(4, (32,), generator=generator)
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    classifier = PyTorchClassifier(network, torch.nn.CrossEntropyLoss(), (3, 8, 8), 4, clip_values=(0.0, 1.0))
    attack = attacks.ProjectedGradientDescentPyTorch(
        classifier,
        norm="inf" if norm == "linf" else 2,
        eps=eps,
        eps_step=eps / 4,
        max_iter=20,
        num_random_init=0,
        verbose=False,
    )
    expected = torch.from_numpy(attack.generate(images.numpy(), torch.nn.functional.one_hot(labels, 4).numpy()))
    found = attacked(
        images,
        lambda each: criterion(network(each), labels),
        Ball(norm, eps),
        start=torch.zeros_like(images),
        steps=20,
        step_size=eps / 4,
        normalise=PLAIN,
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(network(found).argmax(dim=1), network(expected).argmax(dim=1))
