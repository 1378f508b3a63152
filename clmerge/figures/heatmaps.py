"""Draw one heatmap into axes."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from clmerge.figures.axes import LONGEST, SIZE, Frame, name_axes, name_columns, named_step, slant, widest
from clmerge.figures.charts import Grid, HeatChart
from clmerge.figures.lettering import label
from clmerge.figures.looks import ALWAYS_WHITE, CARD, HEAT, SOFT, ink_on
from clmerge.figures.numbers import percent
from clmerge.figures.svg import CELLS, Mark, Marks

LARGEST = 2400.0  # pixels of the cells of one heatmap: a thousand tasks are a picture of megabytes, not of gigabytes


def heat_frame(chart: HeatChart, *, on_page: bool) -> Frame:
    """Return the size of a heatmap: large cells for few, small ones for many, and on a page for phones."""
    least = min(6.0 if on_page else 24.0, LARGEST / len(chart.columns))
    width = max(least, min(50.0, 280 / len(chart.columns)))
    height = min(width, max(min(13.0, LARGEST / len(chart.rows)), 420 / len(chart.rows)))
    left, below = 30 + widest(chart.rows), 38 + slant(chart.columns, width)
    return Frame(left + width * len(chart.columns) + 14, 10 + height * len(chart.rows) + below, left, below)


def draw_heatmap(axes: Axes, chart: HeatChart, grid: Grid, marks: Marks | None = None) -> None:
    """Draw one heatmap; numbers are written into the cells where they fit.

    Args:
        axes: Where to draw.
        chart: The chart.
        grid: One of its heatmaps.
        marks: Where to note the tips of the cells, for a page; None for a picture.
    """
    width, height = axes.bbox.width / len(chart.columns), axes.bbox.height / len(chart.rows)
    scale = Normalize(*chart.value_range)
    means = np.array([[value.mean for value in row] for row in grid.cells], dtype=float)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(means), cmap=HEAT, norm=scale, edgecolors=CARD, linewidth=0.6 if width >= 4 else 0
    )
    if marks is not None:
        mesh.set_gid("cells")
        marks["cells"] = Mark(CELLS, (chart.tip(grid, row, column) for row, column in np.ndindex(means.shape)))
    if min(width, 2 * height) >= 24 and len(chart.columns) <= 25:
        digits = 1 if width >= 32 else 0
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
    step = named_step(height)
    labels = [label(name, LONGEST, on_page=marks is not None) for name in chart.rows[::step]]
    axes.set_yticks([row + 0.5 for row in range(len(chart.rows))][::step], labels)
