"""Accuracy over time and at the end, one line or bar per model."""

import math

import numpy as np
from matplotlib.figure import Figure

from clmerge.figures.lettering import label, lettered
from clmerge.figures.style import DARK, GREY, LIGHT, add_legend, darker, label_tasks, look, style_axes
from clmerge.results.metrics.continual import average_accuracy
from clmerge.results.results import Results, Setting


def plot_forgetting_curves(results: Results, *, setting: Setting | None = None) -> Figure:
    """Draw, in one panel per task, the accuracy on that task after every task.

    A vertical line marks when the task was learned. Accuracy before it is zero-shot ability and transfer, drawn thin;
    accuracy after it shows forgetting.

    Args:
        results: Results of the run so far.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure with small multiples and one legend.
    """
    setting = setting or results.evaluation
    num_columns = min(results.num_tasks, 5 if results.num_tasks <= 25 else 8)
    num_rows = math.ceil(results.num_tasks / num_columns)
    figure = Figure(figsize=(2.1 * num_columns + 0.7, 1.75 * num_rows + 1.1), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).ravel()
    after = np.arange(1, results.num_tasks + 1)
    for task, panel in enumerate(panels):
        panel.set_visible(task < results.num_tasks)
        if task >= results.num_tasks:
            continue
        style_axes(panel, results.num_tasks)
        panel.axvline(task + 1, color=GREY, linewidth=0.8, zorder=1)
        panel.set_title(label(results.tasks[task], 22), fontsize=9, color=DARK)
        # The last row of panels may be short; the panels above its gap then have the tick labels.
        panel.tick_params(labelbottom=task + num_columns >= results.num_tasks)
        for model in reversed(results.models):
            column = results.matrix(model, setting)[:, task] * 100
            color, dash, marker = look(results, model)
            panel.plot(after[: len(column)], column, color=color, linestyle=dash, linewidth=0.7, alpha=0.6)
            later = slice(task, len(column))
            dots = marker if results.num_tasks <= 10 else ""
            panel.plot(
                after[later],
                column[later],
                color=color,
                linestyle=dash,
                marker=dots,
                markersize=3.5,
                linewidth=1.6,
            )
    figure.supxlabel("after task", fontsize=10)
    figure.supylabel(f"accuracy in %, {setting.replace('_', '-')}", fontsize=10)
    add_legend(figure, results, "lines")
    return lettered(figure)


def plot_average_accuracy(results: Results, *, setting: Setting | None = None) -> Figure:
    """Draw the average accuracy on the tasks seen so far against the number of tasks, one line per model.

    Args:
        results: Results of the run so far.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure whose lines are labelled at their right ends; zero-shot is dashed.
    """
    setting = setting or results.evaluation
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    panel = figure.subplots()
    style_axes(panel, results.num_tasks)
    ends: dict[str, float] = {}
    for model in reversed(results.models):
        curve = [100 * value for value in average_accuracy(results.matrix(model, setting))]
        color, dash, marker = look(results, model)
        after = range(1, len(curve) + 1)
        panel.plot(after, curve, color=color, linestyle=dash, marker=marker, markersize=4.5, linewidth=1.8)
        if curve and not math.isnan(curve[-1]):
            ends[model] = curve[-1]
    for model, height in _spread(ends, gap=5.5).items():
        color = look(results, model)[0]
        panel.annotate(
            f"{label(model, 28)} {ends[model]:.1f}",
            xy=(results.num_finished, ends[model]),
            xytext=(1.02, height),
            textcoords=panel.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=darker(color),
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5},
            annotation_clip=False,
        )
    panel.set_xlabel("after task")
    panel.set_ylabel(f"average accuracy on tasks seen so far in %\n{setting.replace('_', '-')}")
    return lettered(figure)


def plot_final_accuracy(results: Results, *, setting: Setting | None = None) -> Figure:
    """Draw the accuracy on every task after the latest one: bars, or dots where bars would be too thin.

    Args:
        results: Results of the run so far.
        setting: Which reading of the logits; default the results' own.

    Returns:
        A figure with the tasks side by side and one legend.
    """
    setting = setting or results.evaluation
    models = results.models
    positions = np.arange(results.num_tasks)
    wanted = 1 + 0.28 * results.num_tasks * (1 + len(models))
    width = min(max(6.5, wanted), max(11.0, 0.3 * results.num_tasks))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    panel = figure.subplots()
    style_axes(panel, results.num_tasks)
    bars = results.num_tasks * len(models) <= 60
    share = 0.84 / max(len(models), 1)
    for index, model in enumerate(models):
        latest = results.matrix(model, setting)[-1:].ravel() * 100
        color, _, marker = look(results, model)
        offset = (index - (len(models) - 1) / 2) * share
        if len(latest) and bars:
            panel.bar(positions + offset, latest, share * 0.94, color=color, zorder=2)
        elif len(latest):
            panel.plot(
                positions,
                latest,
                color=color,
                alpha=0.85,
                zorder=3,
                linestyle="",
                marker=marker,
                markersize=6,
                markeredgewidth=1.5,
            )
    if not bars:
        for task in range(results.num_tasks):
            panel.axvline(task, color=LIGHT, linewidth=0.8, zorder=0)
    panel.set_xlim(-0.6, results.num_tasks - 0.4)
    label_tasks(panel, results)
    panel.set_ylabel(f"accuracy after task {results.num_finished} in %\n{setting.replace('_', '-')}")
    add_legend(figure, results, "bars" if bars else "dots")
    return lettered(figure)


def _spread(heights: dict[str, float], *, gap: float) -> dict[str, float]:
    """Move labels both ways until neighbours are ``gap`` percent apart, keeping their order."""
    order = sorted(heights, key=heights.__getitem__)
    groups: list[list[str]] = []
    for model in order:
        groups.append([model])
        # Merge groups that touch into one, centred on the mean height of its members.
        while len(groups) > 1 and _bottom(groups[-1], heights, gap) - _top(groups[-2], heights, gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return {model: _bottom(group, heights, gap) + index * gap for group in groups for index, model in enumerate(group)}


def _bottom(group: list[str], heights: dict[str, float], gap: float) -> float:
    return sum(heights[model] for model in group) / len(group) - (len(group) - 1) * gap / 2


def _top(group: list[str], heights: dict[str, float], gap: float) -> float:
    return _bottom(group, heights, gap) + (len(group) - 1) * gap
