"""Draw one heatmap into axes."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from clmerge.figures.axes import LONGEST, SIZE, name_axes, name_columns, slant, widest
from clmerge.figures.charts import Grid, HeatChart
from clmerge.figures.lettering import label
from clmerge.figures.looks import ALWAYS_WHITE, CARD, HEAT, SOFT, ink_on
from clmerge.figures.numbers import percent
from clmerge.figures.svg import CELLS, Marks


@dataclass(frozen=True)
class Cells:
    """Sizes of the cells of a chart in pixels, and of what is left of them and below them."""

    width: float
    height: float
    left: float
    below: float


def cells_of(chart: HeatChart, *, on_page: bool) -> Cells:
    """Lay out the cells of a chart: large ones for few, small ones for many, and on a page for phones."""
    width = max(6.0 if on_page else 24.0, min(50.0, 280 / len(chart.columns)))
    height = min(width, max(13.0, 420 / len(chart.rows)))
    return Cells(width, height, 30 + widest(chart.rows), 38 + slant(chart.columns, width))


def draw_heatmap(axes: Axes, chart: HeatChart, grid: Grid, marks: Marks | None = None) -> None:
    """Draw one heatmap; numbers are written into the cells where they fit.

    Args:
        axes: Where to draw.
        chart: The chart.
        grid: One of its heatmaps.
        marks: Where to note the tips of the cells, for a page; None for a picture.
    """
    cells, scale = cells_of(chart, on_page=marks is not None), Normalize(*chart.value_range)
    means = np.array([[value.mean for value in row] for row in grid.cells], dtype=float)
    mesh = axes.pcolormesh(np.ma.masked_invalid(means), cmap=HEAT, norm=scale, edgecolors=CARD, linewidth=0.6)
    if marks is not None:
        tips = [chart.tip(grid, row, column) for row, column in np.ndindex(means.shape)]
        mesh.set_gid(marks.add(CELLS, tips))
    if cells.width >= 24 and cells.height >= 13 and len(chart.columns) <= 25:
        digits = 1 if cells.width >= 32 else 0
        for (row, column), value in np.ndenumerate(means):
            ink = SOFT if math.isnan(value) else ink_on(HEAT(scale(value)))
            is_share = chart.unit == "share" or math.isnan(value)
            text = percent(value, digits) if is_share else f"{value:.{digits + 1}f}"
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=SIZE - 0.5, color=ink)
    if chart.diagonal:
        corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (math.nan, math.nan)])
        outline = np.concatenate([corners + row for row in range(len(means))]).T
        for color, width in ((ALWAYS_WHITE, 3.2), ("#111111", 1.3)):  # dark on white, visible on any colour
            axes.plot(*outline, color=color, linewidth=width, clip_on=False, zorder=3)
    axes.set(xlim=(0, len(chart.columns)), ylim=(len(chart.rows), 0))
    axes.spines[:].set_visible(False)
    name_axes(axes, chart.column_name, chart.row_name)
    name_columns(axes, chart.columns, 0.5, on_page=marks is not None)
    step = 1 if cells.height >= 12 else 5
    labels = [label(name, LONGEST, on_page=marks is not None) for name in chart.rows]
    axes.set_yticks([row + 0.5 for row in range(len(labels))][::step], labels[::step])
