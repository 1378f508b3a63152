"""Draw one panel of a line chart into axes."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clmerge.figures.axes import name_axes, name_columns
from clmerge.figures.charts import Line, LineChart, Panel, Value
from clmerge.figures.looks import LINE, SOFT
from clmerge.figures.numbers import Unit, named, show
from clmerge.figures.svg import Mark, Marks

Points = Sequence[tuple[float, Value]]


def draw_lines(axes: Axes, chart: LineChart, panel: Panel, marks: Marks | None = None) -> None:
    """Draw one panel: a faint grid, the lines, the first one on top, and the names of the axes.

    Args:
        axes: Where to draw.
        chart: The chart.
        panel: One of its panels.
        marks: Where to note what belongs to which model, for a page; None for a picture.
    """
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    if panel.rule is not None:
        axes.axvline(panel.rule, color=SOFT, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    for index, line in enumerate(reversed(panel.lines)):
        _draw_line(axes, chart, panel, line, 2 + index / len(panel.lines), marks)
    _set_range(axes, chart, panel)
    _set_ticks(axes, chart, panel, on_page=marks is not None)
    name_axes(axes, chart.x_name, named(chart.y_name, chart.y_unit))


def formatter(unit: Unit) -> FuncFormatter:
    """Return what writes the tick labels of a unit."""
    if unit == "share":
        return FuncFormatter(lambda value, _: f"{100 * value + 0.0:.4g}")
    return FuncFormatter(lambda value, _: show(value + 0.0, unit))


def _draw_line(axes: Axes, chart: LineChart, panel: Panel, line: Line, layer: float, marks: Marks | None) -> None:
    known = [index for index, (_, value) in enumerate(line.points) if value.is_defined]
    sizes = {index: _size(chart, line, index) for index in known}
    order = sorted(known, key=sizes.__getitem__)
    style: dict[str, Any] = {"color": line.look.color, "zorder": layer}
    front = 0.25 if line.faint else 1.0
    if marks is not None:
        front = 1.0  # its style sheet makes lines faint
        style["gid"] = str(len(marks))
        tips = (chart.tip(line, index) for index in order)
        marks[style["gid"]] = Mark("line faint" if line.faint else "line", tips, line.name)
    points = [line.points[index] for index in known]
    if chart.dots:
        _draw_deviations(axes, points, style)
    else:
        after = [point for point in points if point[0] >= line.known_from]
        if len(after) > 1 and not line.faint:
            _draw_band(axes, after, panel.y_range or (-math.inf, math.inf), style)
        before = [point for point in points if point[0] <= line.known_from]
        for piece, width, strength in ((before, 1.0, 0.55), (after, 2.0, 1.0)):
            if len(piece) > 1:
                style |= {"linestyle": line.look.dash, "linewidth": width, "alpha": front * strength}
                axes.plot(*_curve(piece), **style)
    for size in sorted(set(sizes.values())):
        curve = _curve([line.points[index] for index in order if sizes[index] == size])
        style |= line.look.style | {"linestyle": "", "markersize": size, "alpha": front, "clip_on": False}
        axes.plot(*curve, **style)


def _size(chart: LineChart, line: Line, index: int) -> float:
    if index in line.chosen:
        return 14.0
    return 8.4 if chart.dots else 6.4 if line.points[index][0] >= line.known_from else 3.2


def _curve(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [value.mean for _, value in points]


def _draw_band(axes: Axes, points: Points, within: tuple[float, float], style: dict[str, Any]) -> None:
    known = [(x, value) for x, value in points if not math.isnan(value.std)]
    upper = [(x, min(value.mean + value.std, within[1])) for x, value in known]
    lower = [(x, max(value.mean - value.std, within[0])) for x, value in reversed(known)]
    if len(known) > 1:
        axes.fill(*zip(*upper, *lower, strict=True), alpha=0.15, linewidth=0, **style)


def _draw_deviations(axes: Axes, points: Points, style: dict[str, Any]) -> None:
    known = [(x, value) for x, value in points if not math.isnan(value.std)]
    ends = [(x, height) for x, value in known for height in (value.mean - value.std, value.mean + value.std, math.nan)]
    if ends:
        axes.plot(*zip(*ends, strict=True), "-", linewidth=2, **style)


def _set_range(axes: Axes, chart: LineChart, panel: Panel) -> None:
    if chart.log_x:
        axes.set_xscale("log")
    axes.margins(x=0.04 if chart.log_x else 0.02, y=0.06)
    if panel.y_range is not None:
        axes.set_ylim(panel.y_range)
    elif chart.y_unit != "share" and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)


def _set_ticks(axes: Axes, chart: LineChart, panel: Panel, *, on_page: bool) -> None:
    low, high = axes.get_xlim()
    if chart.x_labels:
        name_columns(axes, chart.x_labels, 1, on_page=on_page)
        axes.set_xlim(0.5, len(chart.x_labels) + 0.5)
        for task in range(1, len(chart.x_labels)):
            axes.axvline(task + 0.5, color=LINE, linewidth=1, zorder=0)
    else:
        whole = all(float(x).is_integer() for line in panel.lines for x, _ in line.points)
        round_ones = MaxNLocator(5 if chart.log_x else 6, steps=[1, 2, 5, 10], integer=whole)
        decades = LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 3.0), numticks=5)
        axes.xaxis.set_major_locator(decades if chart.log_x and high > 10 * low else round_ones)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(formatter(chart.x_unit))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(formatter(chart.y_unit))
