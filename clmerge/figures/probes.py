"""Charts of what probes found: over the tasks learned, and by task."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from clmerge.figures.charts import Chart, Grid, HeatChart, Line, LineChart, Panel, Value
from clmerge.figures.drawing import draw
from clmerge.figures.looks import Look, look_of
from clmerge.figures.numbers import Unit
from clmerge.results.probe_table import probe_names
from clmerge.results.results import Results


@dataclass(frozen=True)
class Probed:
    """What a probe found about one model.

    Attributes:
        name: The model.
        look: How it looks.
        curve: Its value after every task.
        per_task: The number for every task after the last one; empty if it is not by task.
    """

    name: str
    look: Look
    curve: Sequence[Value]
    per_task: Sequence[Value]


def curve_chart(name: str, models: Sequence[Probed], unit: Unit) -> LineChart | None:
    """Return the values after every task, one line per model; None if no model has two.

    Args:
        name: Name of the probe, for readers.
        models: The models, those in front first.
        unit: Unit of its numbers.
    """
    if not any(sum(value.is_defined for value in model.curve) > 1 for model in models):
        return None
    lines = [
        Line(model.name, model.look, [(float(task + 1), value) for task, value in enumerate(model.curve)])
        for model in models
        if any(value.is_defined for value in model.curve)
    ]
    limits = (0.0, 1.0) if unit == "share" else None
    return LineChart([Panel("", lines, y_range=limits)], "after task", name, y_unit=unit, shows_last=True)


def task_chart(name: str, models: Sequence[Probed], tasks: Sequence[str], unit: Unit) -> HeatChart | None:
    """Return a heatmap of the models and the tasks; None if the probe is not by task.

    Args:
        name: Name of the probe, for readers.
        models: The models, from top to bottom.
        tasks: Names of the tasks.
        unit: Unit of its numbers.
    """
    known = [model for model in models if any(value.is_defined for value in model.per_task)]
    if not known or len(tasks) < 2:
        return None
    numbers = [value.mean for model in known for value in model.per_task if value.is_defined]
    limits = (
        (0.0, 1.0)
        if unit == "share"
        else (min(numbers), max(numbers) if max(numbers) > min(numbers) else min(numbers) + 1)
    )
    rows = [model.name for model in known]
    grid = Grid("", [model.per_task for model in known])
    return HeatChart([grid], "model", "on task", rows, tasks, name, limits, unit=unit, diagonal=False)


def readable(name: str) -> str:
    """Return the name of a probe for readers.

    Example:
        >>> readable("attack_success")
        'attack success'
    """
    return name.replace("_", " ")


def probe_charts(results: Results) -> dict[str, Chart]:
    """Return a picture of every probe that has one, by name: its curve, else its numbers by task.

    Args:
        results: Results of the run.
    """
    found: dict[str, Chart] = {}
    for name in probe_names(results):
        models, unit = [], unit_of(results.model(model).probes.get(name) for model in results.models)
        for model in results.models:
            probe = results.model(model).probes.get(name)
            if probe is not None:
                index = results.mergers.index(model) if model in results.mergers else None
                curve, per_task = (_values(probe.get(key)) for key in ("curve", "per_task"))
                models.append(Probed(model, look_of(model, index), curve, per_task))
        chart = curve_chart(readable(name), models, unit) or task_chart(
            readable(name), models, results.task_labels(), unit
        )
        if chart is not None:
            found[name] = chart
    return found


def plot_probe(results: Results, name: str) -> Figure:
    """Draw a probe: its value after every task, or by task if it was measured after the last one only.

    Args:
        results: Results of the run.
        name: Name of the probe.

    Raises:
        ValueError: If there is no such probe, or it has nothing to draw.
    """
    charts = probe_charts(results)
    if name not in charts:
        raise ValueError(f"expected one of the probes that can be drawn, {[*charts]}, got {name!r}")
    return draw(charts[name])


def unit_of(probes: Iterable[Mapping[str, Any] | None]) -> Unit:
    """Return the unit of a probe's numbers, from what any model's record says."""
    return "share" if any(probe is not None and probe.get("share") for probe in probes) else "number"


def _values(numbers: Sequence[float | None] | None) -> list[Value]:
    return [Value(math.nan if number is None else number) for number in numbers or ()]
