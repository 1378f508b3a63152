import math

import pytest
from matplotlib.figure import Figure

from clmerge.figures.charts import Line, LineChart, Panel, Value
from clmerge.figures.lines import draw_lines
from clmerge.figures.looks import look_of


def drawn(points, *, y_range=None, **options):
    line = Line("magmax", look_of("magmax", 0), [(float(x), Value(y)) for x, y in points])
    chart = LineChart([Panel("", [line], y_range=y_range)], "after task", "accuracy", **options)
    axes = Figure((5, 3), dpi=72).add_axes((0.2, 0.2, 0.7, 0.7))
    draw_lines(axes, chart, chart.panels[0])
    return axes


def ticks(axis):
    low, high = axis.get_view_interval()
    places = [place for place in axis.get_majorticklocs() if low <= place <= high]
    return dict(zip(places, axis.get_major_formatter().format_ticks(places), strict=True))


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [0.0], [0.0, 0.0], [-1.0, 1.0]])
@pytest.mark.parametrize("unit", ["share", "bytes"])
def test_odd_values_are_inside_the_axes(values, unit):
    axes = drawn(list(enumerate(values, start=1)), y_unit=unit)
    low, high = axes.get_ylim()
    assert high > low
    assert all(low <= value <= high for value in values if not math.isnan(value))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.873, 0.991), (1.0, 5.0), (-0.2, 0.7)])
def test_ticks_are_few_and_round(low, high):
    found = ticks(drawn([(1, low), (2, high)], y_unit="number").yaxis)
    assert 2 <= len(found) <= 7
    assert all(len(text.lstrip("-")) <= 4 for text in found.values())


def test_ticks_of_tasks_are_whole_and_shares_are_in_percent():
    axes = drawn([(1, 0.5), (2, 0.25), (3, 1.0)], y_range=(0.0, 1.0))
    assert ticks(axes.xaxis) == {1.0: "1", 2.0: "2", 3.0: "3"}
    assert list(ticks(axes.yaxis).values()) == ["0", "20", "40", "60", "80", "100"]
    assert axes.get_ylabel() == "accuracy in %"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1e3, 1e6, ["1 kB", "10 kB", "100 kB", "1 MB"]),
        (2e6, 3e7, ["3 MB", "10 MB", "30 MB"]),
        (2e6, 8e6, ["2 MB", "4 MB", "6 MB", "8 MB"]),
    ],
)
def test_logarithmic_ticks_are_round_bytes(low, high, expected):
    axes = drawn([(low, 0.5), (high, 0.6)], log_x=True, x_unit="bytes", dots=True)
    assert list(ticks(axes.xaxis).values()) == expected


def test_amounts_begin_at_zero_and_accuracies_do_not():
    assert drawn([(1, 5e6), (2, 6e6)], y_unit="bytes").get_ylim()[0] == 0
    assert drawn([(1, 0.8), (2, 0.9)]).get_ylim()[0] > 0.7
