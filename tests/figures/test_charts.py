import csv
import io
import math

import pytest

from clmerge.figures.charts import Grid, HeatChart, Line, LineChart, Panel, Value, to_csv
from clmerge.figures.looks import look_of

LOOK = look_of("magmax", 0)


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_lines_as_csv_have_every_digit():
    points = [(1.0, Value(0.1 + 0.2, 1 / 3, 2)), (2.5, Value(math.nan))]
    chart = LineChart([Panel("a", [Line("magmax", LOOK, points)])], "after task", "accuracy")
    assert rows(chart.to_csv()) == [
        {
            "panel": "a",
            "model": "magmax",
            "after task": "1",
            "accuracy": repr(0.1 + 0.2),
            "std": repr(1 / 3),
            "runs": "2",
        },
        {"panel": "a", "model": "magmax", "after task": "2.5", "accuracy": "", "std": "", "runs": "1"},
    ]


def test_heatmaps_as_csv_name_their_rows_and_columns():
    chart = HeatChart([Grid("g", [[Value(0.25), Value(math.nan)]])], "after task", "on task", ["1", "2"], ["x", "y"])
    assert [list(row.values()) for row in rows(chart.to_csv())] == [
        ["g", "1", "x", "0.25", "", "1"],
        ["g", "1", "y", "", "", "1"],
    ]


def test_tips_say_what_where_and_how_often():
    line = Line("magmax", LOOK, [(1e6, Value(0.91234, 0.014, 2)), (2e6, Value(0.5))], chosen=[1])
    chart = LineChart([Panel("", [line])], "bytes kept", "accuracy", x_unit="bytes")
    assert chart.tip(line, 0) == "magmax, bytes kept 1 MB: 91.23 ± 1.40 % (2 runs)"
    assert chart.tip(line, 1) == "magmax, bytes kept 2 MB: 50.00 %, chosen"
    grid = Grid("opcm", [[Value(0.5), Value(math.nan)]])
    heat = HeatChart([grid], "after task", "on task", ["1"], ["x", "y"], unit="number")
    assert heat.tip(grid, 0, 0) == "opcm, after task 1, on task x: 0.5"
    assert heat.tip(grid, 0, 1) == "opcm, after task 1, on task y: -"


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        ("=1+1", False),
        ("+1-1", False),
        ("-2+3", False),
        ("@SUM(A1)", False),
        ("\uff1d1+1", False),
        ("-0.25", True),
        ("-1e-05", True),
        ("1", True),
        ("", True),
        ("magmax", True),
    ],
)
def test_cells_that_begin_like_formulas_are_text(cell, kept):
    (found,) = list(csv.reader(io.StringIO(to_csv(["a"], [[cell, ""]]))))[1][:1]
    assert found == (cell if kept else f"'{cell}")


@pytest.mark.parametrize("cell", ["\t=1", "\r=1", "\n=1"])
def test_cells_that_begin_with_a_control_character_show_it(cell):
    assert to_csv(["a"], [[cell]]).splitlines()[1] == repr(cell)[1:-1]


def test_rows_without_a_number_are_left_out_of_the_csv():
    nothing = [Value(math.nan), Value(math.nan)]
    grids = [Grid("a", [nothing, nothing, [Value(0.5), Value(math.nan)]]), Grid("b", [nothing, nothing, nothing])]
    rows = HeatChart(grids, "after", "on", ["1", "2", "3"], ["x", "y"]).to_csv().splitlines()
    assert rows[1:] == ["a,3,x,0.5,,1", "a,3,y,,,1", "b,3,x,,,1", "b,3,y,,,1"]


def test_a_large_heatmap_is_thinned_to_rows_with_numbers():
    cells = [[Value(row / 8 if row % 2 else math.nan)] * 8 for row in range(8)]
    names = [str(index) for index in range(8)]
    chart = HeatChart([Grid("a", cells)], "after", "on", names, names)
    assert chart.thinned(8) is chart
    small = chart.thinned(4)
    assert (small.rows, small.columns, small.diagonal) == (["1", "3", "5", "7"], ["0", "2", "4", "6"], False)
    assert [[value.mean for value in row] for row in small.grids[0].cells] == [[row / 8] * 4 for row in (1, 3, 5, 7)]
    assert len(small.thinned(3).rows) == 2
    empty = HeatChart([Grid("a", [[Value(math.nan)] * 8] * 8)], "after", "on", names, names).thinned(4)
    assert (len(empty.rows), len(empty.grids[0].cells)) == (4, 4)
