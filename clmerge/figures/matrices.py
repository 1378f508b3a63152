"""Accuracy matrices as heatmaps."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from clmerge.figures.lettering import label, lettered
from clmerge.figures.style import DARK, GREY, MODEL_LENGTH, ink_on, label_tasks
from clmerge.results.metrics.continual import Array
from clmerge.results.results import Results, Setting


def plot_matrix(results: Results, model: str, *, setting: Setting | None = None) -> Figure:
    """Draw the accuracy matrix of one model as a heatmap with the numbers in its cells.

    Args:
        results: Results of the run so far.
        model: One of ``results.models``.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure; rows are "after task", columns "accuracy on task", outlined cells the task just learned.

    Raises:
        ValueError: If there is no such model.
    """
    return plot_matrices(results, [model], setting=setting)


def plot_matrices(results: Results, models: Sequence[str], *, setting: Setting | None = None) -> Figure:
    """Draw the accuracy matrices of several models side by side, with one colour scale.

    Args:
        results: Results of the run so far.
        models: Names from ``results.models``.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure with one heatmap per model.

    Raises:
        ValueError: If ``models`` is empty or names an unknown model.
    """
    if not models:
        raise ValueError("expected one or more models to draw, got none")
    setting = setting or results.evaluation
    matrices = [results.matrix(model, setting) for model in models]
    side = max(2.6, results.num_tasks * (0.62 if results.num_tasks <= 10 else 0.4))
    figure = Figure(figsize=(len(models) * (side + 0.3) + 1.9, side + 1.5), layout="compressed")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for index, (panel, model, matrix) in enumerate(zip(panels, models, matrices, strict=True)):
        _draw_matrix(panel, results, matrix, label_rows=index == 0)
        panel.set_title(label(model, MODEL_LENGTH), fontsize=11, color=DARK)
    scale = ScalarMappable(Normalize(0, 100), "viridis")
    bar = figure.colorbar(scale, ax=list(panels), fraction=0.03, pad=0.02, aspect=30)
    bar.set_label(f"accuracy in %, {setting.replace('_', '-')}")
    bar.outline.set_visible(False)
    return lettered(figure)


def _draw_matrix(panel: Axes, results: Results, matrix: Array, *, label_rows: bool) -> None:
    num_tasks = results.num_tasks
    cells = np.full((num_tasks, num_tasks), np.nan)
    cells[: len(matrix)] = matrix * 100
    colors = colormaps["viridis"]
    panel.set_facecolor("#F4F4F4")
    panel.imshow(np.ma.masked_invalid(cells), cmap=colors, vmin=0, vmax=100, aspect="equal")
    size = 8.5 if num_tasks <= 10 else 6.5 if num_tasks <= 25 else 5
    for row in range(len(matrix)):
        for column in range(num_tasks):
            value = cells[row, column]
            undefined = math.isnan(value)
            text = "-" if undefined else f"{value:.1f}" if num_tasks <= 10 else f"{value:.0f}"
            color = GREY if undefined else ink_on(colors(value / 100))
            panel.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
        for color, linewidth in (("white", 1.6), (DARK, 0.7)):
            outline = Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=linewidth)
            outline.set_clip_on(False)
            panel.add_patch(outline)
    label_tasks(panel, results)
    panel.set_xlabel("accuracy on task")
    if label_rows:
        panel.set_yticks(range(num_tasks), [f"{task + 1}" for task in range(num_tasks)])
        panel.set_ylabel("after task")
    panel.tick_params(length=0, labelsize=8.5 if num_tasks <= 10 else 7.5)
    for spine in panel.spines.values():
        spine.set_visible(False)
