"""Draw charts: all panels as one Matplotlib figure for a picture, or every panel by itself for a page."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Protocol

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clmerge.figures.axes import LETTER, SIZE, Frame, name_axes, slant
from clmerge.figures.charts import Chart, HeatChart, LineChart
from clmerge.figures.heatmaps import draw_heatmap, heat_frame
from clmerge.figures.lettering import label, lettered
from clmerge.figures.lines import draw_lines, formatter
from clmerge.figures.looks import CARD, HEAT, INK, LINE, SOFT, Look
from clmerge.figures.numbers import named, percent, show
from clmerge.figures.svg import Marks, to_svg

NAME_LENGTH = 40  # largest length of a model's name in a legend
MOST_ON_PAGE = 100  # rows and columns of a heatmap on a page
_TITLE, _LEGEND_LINE, _SCALE = 24, 17, 84  # in pixels: heights of a title and of a line of a legend, width of a scale


def draw(chart: Chart) -> Figure:
    """Draw a chart as a picture: its panels in rows, with one legend or colour scale."""
    panels = _panels(chart)
    frame = _frame(chart, len(panels))
    columns = min(len(panels), 2 if len(panels) == 4 else 3 if len(panels) <= 6 else 4 if len(panels) <= 25 else 8)
    rows = math.ceil(len(panels) / columns)
    title = _TITLE if any(name for name, _ in panels) else 0
    width = columns * frame.width + (_SCALE if isinstance(chart, HeatChart) else 0)
    keys = _keys(chart) if isinstance(chart, LineChart) else []
    per_line = max(1, int(width / (50 + LETTER * max((len(str(key.get_label())) for key in keys), default=1))))
    above = 10 + _LEGEND_LINE * math.ceil(len(keys) / per_line)
    figure = Figure((width / 72, (rows * (frame.height + title) + above) / 72), dpi=72, facecolor=CARD)
    for index, (name, draw_into) in enumerate(panels):
        row, column = divmod(index, columns)
        axes = frame.axes(figure, column * frame.width, (rows - 1 - row) * (frame.height + title))
        draw_into(axes, marks=None)
        if name:
            axes.set_title(label(name, int(frame.width / 8)), fontsize=SIZE + 1, color=INK, loc="left")
        if column:
            axes.set_ylabel("")
    if keys:
        figure.legend(handles=keys, loc="upper center", ncols=per_line, frameon=False, fontsize=SIZE, labelcolor=INK)
    if isinstance(chart, HeatChart):
        _draw_scale(figure, chart, frame, columns * frame.width, (rows - 1) * (frame.height + title))
    return lettered(figure)


def draw_panels(chart: Chart) -> list[tuple[str, Markup]]:
    """Draw every panel of a chart for a page, which has the titles, the legend and the scale; return them by title.

    Of a heatmap with more than 100 rows or columns, so many are drawn: every cell is an element of the page.
    """
    chart = chart.thinned(MOST_ON_PAGE) if isinstance(chart, HeatChart) else chart
    frame = _frame(chart, None)
    drawn = []
    for name, draw_into in _panels(chart):
        figure, marks = _page_figure(frame.width, frame.height), Marks()
        draw_into(frame.axes(figure), marks=marks)
        if isinstance(chart, LineChart):
            kind, about = "chart", f"{name or chart.y_name}: {chart.y_name} against {chart.x_name}"
        else:
            kind, what = "heat", f"{chart.value_name} by {chart.row_name} and {chart.column_name}"
            about = f"{name or chart.value_name}: {what}"
        drawn.append((name, to_svg(figure, marks, kind=kind, label=about)))
    return drawn


@cache
def draw_key(look: Look) -> Markup:
    """Draw the sample of a line for a legend on a page."""
    figure = _page_figure(28, 16)
    figure.add_artist(Line2D([1 / 28, 27 / 28], [0.5, 0.5], color=look.color, linestyle=look.dash, linewidth=2))
    figure.add_artist(Line2D([0.5], [0.5], linestyle="", markersize=7, **look.style))
    return to_svg(figure, Marks(), kind="key")


def draw_strip(values: Sequence[float], best: float, look: Look) -> Markup:
    """Draw where the best merger's number lies among all mergers' numbers, for a tile of a page."""
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    figure = _page_figure(200, 16)
    figure.add_artist(Line2D([0.01, 0.99], [0.5, 0.5], color=LINE, linewidth=1))
    places = {value: 0.03 + 0.94 * ((value - low) / (high - low) if high > low else 0.5) for value in known}
    others = [places[value] for value in known if value != best]
    own = [places[best]] if best in places else []
    for place, color, size, alpha in ((others, SOFT, 6, 0.55), (own, look.color, 10, 1.0)):
        style: dict[str, Any] = {
            "linestyle": "",
            "marker": "o",
            "markersize": size,
            "markeredgewidth": 0,
            "alpha": alpha,
        }
        figure.add_artist(Line2D(place, [0.5] * len(place), color=color, **style))
    return to_svg(figure, Marks(), kind="strip")


class _DrawInto(Protocol):
    def __call__(self, axes: Axes, *, marks: Marks | None) -> None: ...


def _panels(chart: Chart) -> list[tuple[str, _DrawInto]]:
    """Return the titles of the panels, and what draws them."""
    if isinstance(chart, LineChart):
        return [(panel.title, partial(draw_lines, chart=chart, panel=panel)) for panel in chart.panels]
    return [(grid.title, partial(draw_heatmap, chart=chart, grid=grid)) for grid in chart.grids]


def _page_figure(width: float, height: float) -> Figure:
    return Figure((width / 72, height / 72), dpi=72, frameon=False)


def _frame(chart: Chart, count: int | None) -> Frame:
    """Return the size of panels: those of a page if ``count`` is None, else of a picture with so many of them."""
    if isinstance(chart, HeatChart):
        return heat_frame(chart, on_page=count is None)
    left = 50 if chart.y_unit == "share" else 74
    if chart.x_labels:
        width = max(460.0, 30.0 * len(chart.x_labels))
        return Frame(left + width + 14, 330, left, 40 + slant(chart.x_labels, width / len(chart.x_labels)))
    width = 360 if count is None or 2 <= count <= 4 else 520 if count == 1 else 290
    return Frame(width, 0.65 * width, left, 40)


def _keys(chart: LineChart) -> list[Line2D]:
    """Return the samples of a legend, with the last values of the lines if the chart wants them."""
    keys = []
    for line in chart.models:
        last = line.points[-1][1].mean if line.points and chart.shows_last else math.nan
        value = percent(last) if chart.y_unit == "share" else show(last, chart.y_unit)  # the axis says that it is %
        name = label(line.name, NAME_LENGTH) + ("" if math.isnan(last) else f" {value}")
        dash = "" if chart.dots else line.look.dash
        keys.append(Line2D([], [], linestyle=dash, linewidth=2, markersize=6.4, label=name, **line.look.style))
    return keys


def _draw_scale(figure: Figure, chart: HeatChart, frame: Frame, x: float, below: float) -> None:
    """Draw the colour scale, beside the upper row of heatmaps."""
    axes = replace(frame, width=_SCALE, left=8, right=_SCALE - 18).axes(figure, x, below)
    bar = figure.colorbar(ScalarMappable(Normalize(*chart.value_range), HEAT), cax=axes)
    bar.outline.set_visible(False)
    name_axes(axes, "", named(chart.value_name, chart.unit))
    axes.yaxis.set_major_formatter(formatter(chart.unit))
