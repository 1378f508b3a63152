"""Draw charts as PNG with Matplotlib, from the same objects as the page's charts."""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from clmerge.figures.lettering import label, lettered
from clmerge.figures.style import DARK, GREY, LIGHT, MODEL_LENGTH, ink_on, look_at
from clmerge.report.charts import Grid, HeatChart, Line, LineChart, Panel, Unit
from clmerge.report.text import show


def draw(chart: LineChart | HeatChart) -> Figure:
    """Draw a chart."""
    return _draw_lines(chart) if isinstance(chart, LineChart) else _draw_heatmaps(chart)


def _draw_lines(chart: LineChart) -> Figure:
    count = len(chart.panels)
    num_columns = min(count, 3 if count != 4 else 2)
    num_rows = math.ceil(count / num_columns)
    width = 3.6 * num_columns + 0.8
    # In inches: a handle with its gaps is 0.7 wide, a letter of 9 points about 0.08; a line of the legend is 0.2 high.
    widest = 0.7 + 0.08 * max(min(len(entry.name), MODEL_LENGTH) for entry in chart.entries)
    columns = max(1, min(len(chart.entries), int(width / widest)))
    height = 2.7 * num_rows + 0.6 + 0.21 * math.ceil(len(chart.entries) / columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for panel_axes in axes[count:]:
        panel_axes.set_visible(False)
    for panel, panel_axes in zip(chart.panels, axes, strict=False):
        _draw_panel(chart, panel, panel_axes)
    handles = []
    for entry in chart.entries:
        color, dash, marker = look_at(entry.look, entry.model)
        line = "" if chart.dots else dash
        handles.append(
            Line2D(
                [], [], color=color, linestyle=line, marker=marker, markersize=5, label=label(entry.name, MODEL_LENGTH)
            )
        )
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return lettered(figure)


def _draw_panel(chart: LineChart, panel: Panel, axes: Axes) -> None:
    axes.set_title(label(panel.title, 34), fontsize=10, color=DARK)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.rule is not None:
        axes.axvline(panel.rule, color=GREY, linewidth=0.8, zorder=1)
    for line in reversed(panel.lines):
        _draw_line(chart, line, axes)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.x_name == "after task":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.y_range is not None:
        margin = 0.02 * (panel.y_range[1] - panel.y_range[0])
        axes.set_ylim(panel.y_range[0] - margin, panel.y_range[1] + margin)
    axes.xaxis.set_major_formatter(_formatter(chart.x_unit))
    axes.yaxis.set_major_formatter(_formatter(chart.y_unit))
    axes.set_xlabel(chart.x_name, fontsize=9)
    axes.set_ylabel(f"{chart.y_name} in %" if chart.y_unit == "share" else chart.y_name, fontsize=9)


def _draw_line(chart: LineChart, line: Line, axes: Axes) -> None:
    color, dash, marker = look_at(line.entry.look, line.entry.model)
    x = np.array([position for position, _ in line.points])
    mean = np.array([spread.mean for _, spread in line.points])
    std = np.array([spread.std for _, spread in line.points])
    chosen = list(line.chosen)
    axes.plot(x[chosen], mean[chosen], color=color, linestyle="", marker=marker, markersize=10)
    if chart.dots:
        axes.errorbar(x, mean, np.nan_to_num(std), color=color, linestyle="", marker=marker, markersize=6)
        return
    front = 0.25 if line.faint else 1.0
    known = x >= line.known_from
    if not line.faint:
        axes.fill_between(x[known], (mean - std)[known], (mean + std)[known], color=color, alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=color, linestyle=dash, linewidth=0.7, alpha=0.6 * front)
    (drawn,) = axes.plot(x[known], mean[known], color=color, linestyle=dash, linewidth=1.6, alpha=front)
    drawn.set(marker=marker, markersize=4)


def _draw_heatmaps(chart: HeatChart) -> Figure:
    count, num_tasks = len(chart.grids), len(chart.columns)
    num_columns = min(count, 4)
    num_rows = math.ceil(count / num_columns)
    side = max(2.4, num_tasks * (0.5 if num_tasks <= 10 else 0.3))
    height = side * len(chart.rows) / num_tasks
    figure = Figure(figsize=(num_columns * (side + 0.5) + 1.2, num_rows * (height + 1.0)), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in axes.ravel()[count:]:
        panel.set_visible(False)
    for grid, panel in zip(chart.grids, axes.ravel(), strict=False):
        _draw_grid(chart, grid, panel)
    scale = Normalize(*chart.value_range)
    bar = figure.colorbar(
        ScalarMappable(scale, "viridis"), ax=axes.ravel().tolist(), fraction=0.03, pad=0.02, aspect=30
    )
    bar.set_label(f"{chart.value_name} in %" if chart.unit == "share" else chart.value_name)
    bar.ax.yaxis.set_major_formatter(_formatter(chart.unit))
    bar.outline.set_visible(False)
    return lettered(figure)


def _draw_grid(chart: HeatChart, grid: Grid, panel: Axes) -> None:
    cells = np.array([[spread.mean for spread in row] for row in grid.cells])
    colors, scale = colormaps["viridis"], Normalize(*chart.value_range)
    panel.set_facecolor("#F4F4F4")
    panel.imshow(np.ma.masked_invalid(cells), cmap=colors, norm=scale, aspect="equal")
    for (row, column), value in np.ndenumerate(cells):
        if len(chart.columns) <= 10:
            text = "-" if math.isnan(value) else f"{100 * value:.1f}" if chart.unit == "share" else f"{value:.2f}"
            ink = GREY if math.isnan(value) else ink_on(colors(scale(value)))
            panel.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    if chart.diagonal:
        for row in range(len(cells)):
            outline = Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=DARK, linewidth=0.9)
            outline.set_clip_on(False)
            panel.add_patch(outline)
    step = 1 if len(chart.columns) <= 20 else 5
    names = [label(name, 14) if index % step == 0 else "" for index, name in enumerate(chart.columns)]
    panel.set_xticks(range(len(names)), names, fontsize=7.5)
    if max(map(len, names)) > 4:
        for tick in panel.get_xticklabels():
            tick.set(rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(chart.rows)), [label(name, 14) for name in chart.rows], fontsize=7.5)
    panel.set_xlabel(chart.column_name, fontsize=9)
    panel.set_ylabel(chart.row_name, fontsize=9)
    panel.set_title(label(grid.title, 34), fontsize=10, color=DARK)
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _formatter(unit: Unit) -> FuncFormatter:
    if unit == "share":
        return FuncFormatter(lambda value, _: f"{100 * value:.4g}")
    return FuncFormatter(lambda value, _: show(value, unit))
