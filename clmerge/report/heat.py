"""Heatmaps as SVG."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex

from clmerge.figures.style import ink_on
from clmerge.names import shorten
from clmerge.report.charts import Grid, HeatChart
from clmerge.report.study import Spread
from clmerge.report.svg import short, tag
from clmerge.report.text import of_runs, percent, show_spread

_LETTER = 6.2  # width of a letter at the size of tick labels
_TOP = 6.0


@dataclass(frozen=True)
class _Layout:
    """Position and size of the cells, in pixels of the drawing."""

    left: float
    width: float  # of a cell
    height: float
    num_rows: int
    num_columns: int

    @property
    def bottom(self) -> float:
        return _TOP + self.height * self.num_rows

    @property
    def shows_numbers(self) -> bool:
        return self.width >= 24 and self.height >= 14


def draw_grid(chart: HeatChart, grid: Grid) -> Markup:
    """Draw one heatmap; numbers are written into the cells where they fit."""
    columns, rows = len(chart.columns), len(chart.rows)
    width = 44.0 if columns <= 6 else max(6.0, 280 / columns)
    longest = min(14, _longest(chart.rows))
    layout = _Layout(26 + _LETTER * longest, width, min(width, max(13.0, 420 / rows)), rows, columns)
    slanted = _longest(chart.columns) > width / (_LETTER + 0.4)
    below = 26 + (4.6 * min(14, _longest(chart.columns)) if slanted else 14)
    content = [*_cells(chart, grid, layout), *_diagonal(chart, grid, layout)]
    content += [*_row_labels(chart, layout), *_column_labels(chart, layout, slanted=slanted)]
    total, height = layout.left + width * columns + 10, layout.bottom + below
    middle = (_TOP + layout.bottom) / 2
    content.append(
        tag("text", chart.column_name, x=layout.left + width * columns / 2, y=height - 4, class_="axis centre")
    )
    turn = f"rotate(-90 12 {short(middle)})"
    content.append(tag("text", chart.row_name, x=12, y=middle, transform=turn, class_="axis centre"))
    label = f"{grid.title or chart.value_name}: {chart.value_name} by {chart.row_name} and {chart.column_name}"
    box = f"0 0 {short(total)} {short(height)}"
    return tag(
        "svg", *content, viewBox=box, role="img", aria_label=label, class_="heat", style=f"max-width:{total:.0f}px"
    )


def _cells(chart: HeatChart, grid: Grid, layout: _Layout) -> Iterable[Markup]:
    colors = colormaps["viridis"]
    low, high = chart.value_range
    for row, cells in enumerate(grid.cells):
        for column, spread in enumerate(cells):
            x, y = layout.left + layout.width * column, _TOP + layout.height * row
            place = {"x": x, "y": y, "width": layout.width, "height": layout.height}
            tip = _tip(chart, grid, row, column, spread)
            middle = {"x": x + layout.width / 2, "y": y + layout.height / 2}
            if not spread.is_defined:
                yield tag("rect", **place, class_="cell undefined", data_tip=tip)
                if layout.shows_numbers:
                    yield tag("text", "-", **middle, class_="celltext")
                continue
            color = colors((spread.mean - low) / (high - low))
            exact = {"data_value": repr(spread.mean), "data_tip": tip}
            yield tag("rect", **place, fill=to_hex(color), class_="cell", **exact)
            if layout.shows_numbers:
                text = percent(spread.mean) if chart.unit == "share" else f"{spread.mean:.2f}"
                yield tag("text", text, **middle, class_=f"celltext {ink_on(color)}")


def _tip(chart: HeatChart, grid: Grid, row: int, column: int, spread: Spread) -> str:
    title = f"{grid.title}, " if grid.title else ""
    where = f"{chart.row_name} {chart.rows[row]}, {chart.column_name} {chart.columns[column]}"
    return f"{title}{where}: {show_spread(spread, chart.unit, digits=2)}{of_runs(len(spread.values))}"


def _diagonal(chart: HeatChart, grid: Grid, layout: _Layout) -> Iterable[Markup]:
    for row in range(len(grid.cells) if chart.diagonal else 0):
        x, y = layout.left + layout.width * row, _TOP + layout.height * row
        for style in ("diagonal halo", "diagonal"):  # dark on white, visible on any colour
            yield tag("rect", x=x, y=y, width=layout.width, height=layout.height, class_=style)


def _row_labels(chart: HeatChart, layout: _Layout) -> Iterable[Markup]:
    step = 1 if layout.height >= 12 else 5
    for row in range(0, layout.num_rows, step):
        y = _TOP + layout.height * (row + 0.5)
        yield tag("text", shorten(chart.rows[row], 14), x=layout.left - 5, y=y, class_="tick end middle")


def _column_labels(chart: HeatChart, layout: _Layout, *, slanted: bool) -> Iterable[Markup]:
    step = 1 if layout.width >= 12 else 5
    for column in range(0, layout.num_columns, step):
        x, y = layout.left + layout.width * (column + 0.5), layout.bottom + (10 if slanted else 16)
        turn = f"rotate(-45 {short(x)} {short(y)})" if slanted else None
        anchor = "tick end" if slanted else "tick centre"
        yield tag("text", shorten(chart.columns[column], 14), x=x, y=y, transform=turn, class_=anchor)


def _longest(labels: Sequence[str]) -> int:
    return max(map(len, labels), default=0)
