"""What is on a page is what the chart says."""

import math
import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from clmerge.figures.charts import Grid, HeatChart, Line, LineChart, Panel, Value
from clmerge.figures.drawing import draw, draw_key, draw_panels, draw_strip
from clmerge.figures.heatmaps import heat_frame
from clmerge.figures.looks import look_of
from clmerge.figures.svg import Marks, to_svg
from clmerge.results.results import EXPERT


def line(name, values, index=0, *, std=math.nan, **options):
    points = [(float(task + 1), Value(value, std, 2)) for task, value in enumerate(values)]
    return Line(name, look_of(name, index), points, **options)


def parse(drawing):
    return ElementTree.fromstring(str(drawing))


def panel_of(lines, y_range=(0.0, 1.0), **options):
    ((_, drawing),) = draw_panels(LineChart([Panel("", lines, y_range=y_range)], "after task", "accuracy", **options))
    return parse(drawing)


def groups(svg):
    return {group.get("data-entry"): group for group in svg.iter("g")}


def test_dots_lie_where_their_numbers_are():
    svg = panel_of([line("magmax", [0.0, 1.0, 0.25])])
    circles = list(svg.iter("circle"))
    zero, one, quarter = (float(circle.get("cy")) for circle in circles)
    assert zero - quarter == pytest.approx((zero - one) / 4, abs=0.1)
    across = [float(circle.get("cx")) for circle in circles]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.1)
    grid = {text.text: float(text.get("y")) for text in svg.iter("text")}
    assert grid["0"] - zero == pytest.approx(grid["100"] - one, abs=0.1)
    assert [circle.get("data-tip") for circle in circles][2] == "magmax, after task 3: 25.00 % (2 runs)"


def test_the_shapes_of_a_model_are_one_group_in_its_colour():
    svg = panel_of(
        [line("ties", [0.5, 0.6], 1, std=0.1), line(EXPERT, [0.9, 0.2], None), line("far", [0.1, 0.2], 2, faint=True)]
    )
    found = groups(svg)
    assert list(found) == ["far", EXPERT, "ties"]  # the first one is drawn last, on top
    assert [group.get("class") for group in found.values()] == ["line faint", "line", "line"]
    band, curve, *dots = found["ties"]
    assert band.get("fill-opacity") == "0.15"
    assert curve.get("stroke") == "var(--c1)"
    assert {dot.get("fill") for dot in dots} == {"var(--c1)"}
    assert {dot.get("fill") for dot in found[EXPERT].iter("circle")} == {"var(--card)"}
    assert not [shape for shape in found["far"] if "fill-opacity" in shape.attrib]  # no band, and full strength


def test_tasks_not_yet_learned_are_thin_and_chosen_points_large():
    svg = panel_of([line("magmax", [0.1, 0.2, 0.8, 0.7], known_from=3, chosen=[3])])
    widths = [path.get("stroke-width") for path in groups(svg)["magmax"].iter("path")]
    assert widths == ["1", "2"]
    dots = sorted(groups(svg)["magmax"].iter("circle"), key=lambda circle: float(circle.get("cx")))
    assert [float(dot.get("r")) for dot in dots] == [1.6, 1.6, 3.2, 7.0]
    assert [dot.get("data-tip")[-15:] for dot in dots][3].endswith("chosen")


def test_undefined_numbers_have_no_dots():
    svg = panel_of([line("magmax", [math.nan, 0.5, math.nan, 0.7])])
    assert len(list(svg.iter("circle"))) == 2
    assert panel_of([line("magmax", [math.nan])]) is not None


def test_dots_alone_have_their_deviations():
    svg = panel_of([line("magmax", [0.5, 0.6], std=0.1)], dots=True)
    (deviations,) = groups(svg)["magmax"].iter("path")
    assert deviations.get("d").count("M") == 2
    assert deviations.get("d").count("V") == 2


def test_cells_have_the_colours_tips_and_numbers_of_their_values():
    chart = HeatChart(
        [Grid("opcm", [[Value(0.0), Value(1.0)], [Value(math.nan), Value(0.5)]])], "after", "on", "12", "xy"
    )
    ((title, drawing),) = draw_panels(chart)
    svg = parse(drawing)
    (cells,) = (group for group in svg.iter("g") if group.get("class") == "cells")
    assert title == "opcm"
    assert [cell.get("fill") for cell in cells] == ["#440154", "#fde725", "var(--line)", "#21918c"]
    assert [cell.get("data-tip") for cell in cells] == [
        "opcm, after 1, on x: 0.00 %",
        "opcm, after 1, on y: 100.00 %",
        "opcm, after 2, on x: -",
        "opcm, after 2, on y: 50.00 %",
    ]
    numbers = [text for text in svg.iter("text") if text.text in ("0.0", "100.0", "-", "50.0")]
    assert [number.text for number in numbers] == ["0.0", "100.0", "-", "50.0"]
    assert [number.get("fill") for number in numbers] == ["#fefefe", "#000000", "var(--soft)", "#000000"]
    assert svg.get("aria-label") == "opcm: accuracy by after and on"


@pytest.mark.parametrize("size", [1, 3, 12, 60])
def test_everything_is_inside_its_drawing(size):
    names = [f"a long name {index}" for index in range(size)]
    cells = [[Value(0.5)] * size] * size
    drawings = draw_panels(HeatChart([Grid("", cells)], "after task", "on task", names, names))
    drawings += draw_panels(LineChart([Panel("", [line("magmax", [0.5] * size)])], "after task", "accuracy"))
    for _, drawing in drawings:
        svg = parse(drawing)
        _, _, width, height = map(float, svg.get("viewBox").split())
        assert width <= 500
        for text in svg.iter("text"):
            assert 0 <= float(text.get("x")) <= width
            assert 0 <= float(text.get("y")) <= height
        numbers = [float(n) for path in svg.iter("path") for n in re.findall(r"-?[0-9.]+", path.get("d"))]
        assert max(numbers) <= max(width, height) + 2


def test_a_picture_has_all_panels_and_one_legend():
    panels = [Panel(f"task {t}", [line("magmax", [0.5, 0.6]), line(EXPERT, [0.9, 0.1], None)]) for t in range(5)]
    figure = draw(LineChart(panels, "after task", "accuracy"))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [panel.title for panel in panels]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["magmax", EXPERT]


def test_letters_of_a_page_are_kept_and_names_are_no_mathematics():
    names = ["$x^2$", "\u4e2d\u6587", "<b>"]
    ((_, drawing),) = draw_panels(HeatChart([Grid("", [[Value(0.5)] * 3])], "after", "on", ["a & b"], names))
    found = [text.text for text in parse(drawing).iter("text")]
    assert [name for name in (*names, "a & b") if name not in found] == []


def test_keys_look_like_their_lines():
    (line_, dot) = parse(draw_key(look_of("ties", 9)))
    assert (line_.get("stroke"), dot.get("fill")) == ("var(--c1)", "var(--c1)")
    assert line_.get("stroke-dasharray")
    (_, dot) = parse(draw_key(look_of(EXPERT, None)))
    assert (dot.get("fill"), dot.get("stroke")) == ("var(--card)", "var(--ink)")


@pytest.mark.parametrize(
    ("values", "best", "places"),
    [([0.0, 0.5, 1.0], 1.0, [6.0, 100.0, 194.0]), ([0.3, math.nan], 0.3, [100.0]), ([math.nan], math.nan, [])],
)
def test_strips_show_where_the_best_one_is(values, best, places):
    circles = list(parse(draw_strip(values, best, look_of("magmax", 0))).iter("circle"))
    assert [float(circle.get("cx")) for circle in circles] == places
    assert [circle.get("fill") for circle in circles][-1:] == (["var(--c0)"] if places else [])


def test_turned_text_keeps_its_anchor():
    figure = Figure((1, 1), dpi=72)
    figure.add_artist(
        Text(0.5, 0.5, "up", rotation=90, rotation_mode="anchor", ha="center", va="baseline", figure=figure)
    )
    figure.add_artist(Line2D([0, 0.5, 1], [0, 0, 1], color="#123456", alpha=0.5))
    svg = parse(to_svg(figure, Marks(), kind="test"))
    (text,) = svg.iter("text")
    assert (text.get("x"), text.get("y")) == ("36", "36")
    assert text.get("transform") == "rotate(-90 36 36)"
    assert text.get("text-anchor") == "middle"
    (path,) = (path for path in svg.iter("path") if path.get("stroke") == "#123456")
    assert path.get("d") == "M0 72H36L72 0"
    assert path.get("stroke-opacity") == "0.5"
    assert svg.get("aria-hidden") == "true"


def test_a_heatmap_of_a_thousand_tasks_is_no_larger_than_one_of_a_hundred():
    def size(tasks, *, on_page=False):
        names = [str(task) for task in range(tasks)]
        frame = heat_frame(HeatChart([], "after task", "on task", names, names), on_page=on_page)
        return frame.width, frame.height

    assert max(size(1000)) < max(size(100)) + 60
    assert max(size(1000, on_page=True)) < 2600
