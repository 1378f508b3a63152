import torch
from support.references import Case, max_magnitude

from clmerge.merging import MagMax
from clmerge.merging.sign.magmax import fold_max_magnitude

CASES = {"MagMax": Case(MagMax, max_magnitude(0.5))}


def merged(*values, scale=1.0):
    merger = MagMax(scale=scale)
    for value in values:
        merger.update({"w": torch.tensor(value)})
    return merger.compute()["w"]


def test_largest_magnitude_wins_and_keeps_its_sign():
    assert torch.equal(merged([1.0, -5.0, 0.0], [-2.0, 4.0, 0.0]), torch.tensor([-2.0, -5.0, 0.0]))


def test_the_positive_of_two_equal_magnitudes_wins_in_any_order():
    assert merged([3.0], [-3.0]).item() == 3.0
    assert merged([-3.0], [3.0]).item() == 3.0
    assert merged([-3.0], [1.0], [3.0], [-3.0]).item() == 3.0


def test_joining_does_not_depend_on_the_side():
    for left, right in ((2.0, -2.0), (-2.0, 2.0)):
        first, second = MagMax(), MagMax()
        first.update({"w": torch.tensor([left])})
        second.update({"w": torch.tensor([right])}, task=1)
        first.merge_state(second)
        assert first.compute()["w"].item() == 1.0


def test_scale_halves_even_a_single_task():
    assert merged([4.0], scale=0.5).item() == 2.0


def test_selection_is_exact_over_the_whole_range_of_magnitudes():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-148, 126, (2, 10_000), generator=generator)
    winner, tau = torch.randn(2, 10_000, generator=generator).sign().ldexp(exponents)
    expected = torch.where(tau.abs() > winner.abs(), tau, winner)
    expected = torch.where(tau.abs() == winner.abs(), torch.maximum(tau, winner), expected)
    fold_max_magnitude(winner, tau)
    assert torch.equal(winner, expected)
