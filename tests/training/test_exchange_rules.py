import copy

import pytest
import torch

from clmerge.training.exchange_rules import Average, Keep, Pull, Shuffle


def members(number=4, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (40, 30), "second": (50,), "last": (7, 3)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
        for _ in range(number)
    ]


def stacked(given):
    return {name: torch.stack([member[name] for member in given]) for name in given[0]}


def exchanged(rule, given, *, step=1, rate=1.0, seed=0):
    after = copy.deepcopy(given)
    rule.exchange(after, step=step, rate=rate, seed=seed)
    return stacked(after)


def test_average():
    given = members()
    after, before = exchanged(Average(), given), stacked(given)
    for name in before:
        expected = before[name].mean(0).expand_as(before[name])
        assert torch.allclose(after[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("follow", [True, False])
def test_pull_keeps_the_mean_and_multiplies_deviations(rate, follow):
    given = members()
    before = stacked(given)
    after = exchanged(Pull(0.9, follow_rate=follow), given, rate=rate)
    stays = 1 - 0.1 * (rate if follow else 1.0)
    for name in before:
        mean = before[name].mean(0)
        assert torch.allclose(after[name].mean(0), mean, rtol=0, atol=1e-12)
        assert torch.allclose(after[name] - mean, stays * (before[name] - mean), rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("by_depth", [True, False])
def test_shuffle_keeps_the_values_of_every_coordinate(p, by_depth):
    given = members()
    before, after = stacked(given), exchanged(Shuffle(p, by_depth=by_depth), given)
    for name in before:
        assert torch.equal(before[name].sort(0).values, after[name].sort(0).values)
    moved = {name: float((before[name] != after[name]).any(0).double().mean()) for name in before}
    # A chosen coordinate of four members stays as it is with probability 1/24.
    assert moved["first"] == pytest.approx(p * 23 / 24, abs=0.05)
    assert moved["last"] == (0 if by_depth else pytest.approx(p * 23 / 24, abs=0.25))


def test_shuffle_draws_by_seed_step_and_name():
    given = members()
    rule = Shuffle(0.5)
    again = exchanged(rule, given)
    assert all(torch.equal(exchanged(rule, given)[name], tensor) for name, tensor in again.items())
    assert not torch.equal(exchanged(rule, given, step=2)["first"], again["first"])
    assert not torch.equal(exchanged(rule, given, seed=1)["first"], again["first"])
    alone = exchanged(Shuffle(0.5, by_depth=False), [{"second": member["second"]} for member in given])
    assert torch.equal(alone["second"], exchanged(Shuffle(0.5, by_depth=False), given)["second"])


@pytest.mark.parametrize("rule", [Keep(), Pull(1.0), Shuffle(0.0)])
def test_rules_that_change_nothing(rule):
    given = members(dtype=torch.bfloat16)
    after, before = exchanged(rule, given), stacked(given)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("rule", [Average(), Pull(0.7), Shuffle(0.5)])
def test_equal_members_stay_bit_for_bit(rule):
    [one] = members(1, dtype=torch.bfloat16)
    after = exchanged(rule, [copy.deepcopy(one) for _ in range(3)])
    assert all(torch.equal(tensor, one[name]) for name, stack in after.items() for tensor in stack)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="alpha from 0 to 1"):
        Pull(1.1)
    with pytest.raises(ValueError, match="p from 0 to 1"):
        Shuffle(-0.1)
