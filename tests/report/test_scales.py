import pytest

from clmerge.report.scales import Scale, scale_of, ticks


def test_a_scale_maps_its_ends_and_what_is_between():
    scale = scale_of([2.0, 4.0], (0, 100), pad=0.0)
    assert [scale(2.0), scale(3.0), scale(4.0)] == [0, 50, 100]
    log = scale_of([1.0, 100.0], (0, 100), log=True, pad=0.0)
    assert log(10.0) == pytest.approx(50)
    assert scale_of([0.5], (0, 1), fixed=(0.0, 1.0))(0.5) == 0.5


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [0.0, 0.0], [-1.0, 1.0]])
@pytest.mark.parametrize("zero", [False, True])
def test_odd_values_have_a_scale_too(values, zero):
    scale = scale_of(values, (0, 100), zero=zero)
    assert scale.high > scale.low
    assert all(scale.low <= value <= scale.high for value in values)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.873, 0.991), (1.0, 5.0), (0.0, 2.3e7), (-0.2, 0.7)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(Scale(low, high, 0, 100), 5)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)


def test_ticks_of_tasks_are_whole():
    assert ticks(Scale(0.9, 3.1, 0, 100), 6, whole=True) == [1.0, 2.0, 3.0]


def test_logarithmic_ticks_are_powers_or_round_numbers():
    assert ticks(Scale(1e3, 1e9, 0, 100, log=True), 4) == [1e3, 1e5, 1e7, 1e9]
    assert ticks(Scale(2e6, 3e7, 0, 100, log=True), 5) == [3e6, 1e7, 3e7]
    assert all(2e6 <= value <= 8e6 for value in ticks(Scale(2e6, 8e6, 0, 100, log=True), 5))
