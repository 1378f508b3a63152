import pytest
import torch

from clmerge.deploy.calibration import ClassGaussians


def measured(dim=3, num=40, classes=(4, 1), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, dim, generator=generator, dtype=dtype) * 2 + 1
    labels = torch.tensor(classes)[torch.arange(num) % len(classes)]
    return features, labels


def test_means_and_covariances_are_those_of_float64():
    features, labels = measured()
    gaussians = ClassGaussians()
    gaussians.add(features, labels, task=2)
    assert gaussians.classes.tolist() == [1, 4]
    assert gaussians.tasks.tolist() == [2, 2]
    for i, label in enumerate((1, 4)):
        own = features[labels == label].double()
        torch.testing.assert_close(gaussians.means[i].double(), own.mean(dim=0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gaussians.covariances[i].double(), torch.cov(own.T), rtol=1e-6, atol=1e-6)


def test_tasks_add_up_and_a_class_may_come_again():
    gaussians = ClassGaussians()
    for task in range(2):
        gaussians.add(*measured(seed=task), task=task)
    assert len(gaussians) == 4
    assert gaussians.classes.tolist() == [1, 4, 1, 4]
    assert gaussians.tasks.tolist() == [0, 0, 1, 1]
    kept = sum(tensor.nbytes for tensor in gaussians.state_dict().values())
    assert kept == 4 * ClassGaussians.bytes_each(3) == 4 * (8 + 8 + 4 * (3 + 9))


def test_draws_have_the_moments_they_were_asked_for():
    gaussians = ClassGaussians()
    gaussians.add(*measured(num=200), task=0)
    num, ridge = 20000, 0.5
    drawn = gaussians.sample(
        num, generator=torch.Generator().manual_seed(1), ridge=ridge, shrink=torch.tensor([1.0, 0.5])
    ).double()
    assert drawn.shape == (2, num, 3)
    for i, factor in enumerate((1.0, 0.5)):
        covariance = gaussians.covariances[i].double() + ridge * torch.eye(3)
        error = (covariance.diagonal() / num).sqrt()  # standard error of a mean
        assert ((drawn[i].mean(dim=0) - factor * gaussians.means[i]).abs() < 5 * error).all()
        spread = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()) / num
        assert ((torch.cov(drawn[i].T) - covariance).abs() < 5 * spread.sqrt()).all()


def test_a_class_of_one_image_and_fewer_images_than_features_can_be_drawn_from():
    gaussians = ClassGaussians()
    gaussians.add(torch.randn(4, 6), torch.tensor([0, 1, 1, 1]), task=0)
    assert torch.equal(gaussians.covariances[0], torch.zeros(6, 6))
    assert gaussians.sample(5, generator=torch.Generator().manual_seed(0), ridge=1e-4).isfinite().all()


def test_the_same_generator_gives_the_same_draws_and_state_survives():
    gaussians, twin = ClassGaussians(), ClassGaussians()
    gaussians.add(*measured(), task=0)
    twin.load_state_dict(gaussians.state_dict())
    first, second = (one.sample(4, generator=torch.Generator().manual_seed(3), ridge=1e-4) for one in (gaussians, twin))
    assert torch.equal(first, second)


def test_a_ridge_of_zero_with_a_singular_covariance_is_an_error_of_linear_algebra():
    gaussians = ClassGaussians()
    gaussians.add(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), task=0)
    with pytest.raises(RuntimeError, match="positive-definite"):
        gaussians.sample(1, generator=torch.Generator(), ridge=0.0)
