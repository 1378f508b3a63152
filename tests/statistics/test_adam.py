import pytest
import torch
from torch import nn

from clmerge.merging import Fisher
from clmerge.statistics.adam import adam_second_moments


def train(optimizer, parameters, steps=5):
    """Take steps of a quadratic loss; return the squared gradients of every step."""
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        optimizer.zero_grad()
        sum((p * torch.randn(p.shape, generator=generator)).square().sum() for p in parameters.values()).backward()
        squares.append({name: p.grad.square() for name, p in parameters.items()})
        optimizer.step()
    return squares


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.Adam(p, betas=(0.9, 0.8)),
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.8), amsgrad=True, foreach=True),
        lambda p: torch.optim.NAdam(p, betas=(0.9, 0.8)),
        lambda p: torch.optim.RAdam(p, betas=(0.9, 0.8)),
    ],
)
def test_the_moments_are_the_weighted_mean_of_squared_gradients(build):
    parameters = {"w": nn.Parameter(torch.randn(3, 2)), "b": nn.Parameter(torch.randn(()))}
    optimizer = build(parameters.values())
    squares = train(optimizer, parameters)
    weights = torch.tensor([0.8**age for age in reversed(range(5))])
    for name, moment in adam_second_moments([optimizer], parameters).items():
        expected = sum(w * step[name] for w, step in zip(weights, squares, strict=True)) / weights.sum()
        torch.testing.assert_close(moment, expected)


def test_several_optimizers_and_a_parameter_without_gradient():
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("a", "b", "idle")}
    first = torch.optim.Adam([parameters["a"], parameters["idle"]])
    second = torch.optim.AdamW([parameters["b"]])
    train(first, {"a": parameters["a"]})
    train(second, {"b": parameters["b"]})
    moments = adam_second_moments([first, second], parameters)
    assert moments["a"].all()
    assert moments["b"].all()
    assert not moments["idle"].any()


def test_other_optimizers_are_named():
    parameters = {"w": nn.Parameter(torch.ones(2))}
    with pytest.raises(ValueError, match="'w', got SGD"):
        adam_second_moments([torch.optim.SGD(parameters.values(), lr=0.1)], parameters)
    with pytest.raises(ValueError, match=r"trains 'w' itself.*got none"):
        adam_second_moments([], parameters)
    adamax = torch.optim.Adamax(parameters.values())
    train(adamax, parameters)
    with pytest.raises(ValueError, match="got Adamax"):
        adam_second_moments([adamax], parameters)


def test_a_rule_takes_them_for_its_precision():
    merger = Fisher(statistic="adam")
    assert merger.requires == {"adam"}
    merger.update({"w": torch.tensor([1.0])}, statistics={"adam": {"w": torch.tensor([3e-9])}})
    merger.update({"w": torch.tensor([5.0])}, statistics={"adam": {"w": torch.tensor([1e-9])}})
    assert merger.compute()["w"].item() == pytest.approx(2.0)
