"""What probes found, in a report: a table of all models and probes, and figures of every probe."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clmerge.figures.charts import LineChart, Panel, Value, to_csv
from clmerge.figures.numbers import MISSING, Unit, show
from clmerge.figures.probes import Probed, curve_chart, readable, task_chart, unit_of
from clmerge.names import file_name
from clmerge.report.charts import Figure, line_of, look, value_of
from clmerge.report.runs import number
from clmerge.report.study import Entry, Spread, Study
from clmerge.results.probe_table import cases, probe_names, wilson

_BETTER = {"higher": "; higher is better", "lower": "; lower is better"}


@dataclass(frozen=True)
class ProbeCell:
    """One finding of the table: as shown, what it is counted over, and with all digits."""

    text: str
    hint: str
    exact: str
    is_best: bool


@dataclass(frozen=True)
class ProbeTable:
    """Models by probes.

    Attributes:
        names: Names of the probes, for readers.
        hints: The settings of every probe.
        rows: An entry, and its cells.
        csv: The same with all digits.
    """

    names: Sequence[str]
    hints: Sequence[str]
    rows: Sequence[tuple[Entry, Sequence[ProbeCell]]]
    csv: str


def probe_table(study: Study) -> ProbeTable | None:
    """Return the table of what probes found after the last task; None if there are no probes."""
    names = _names(study)
    if not names:
        return None
    rows = [(entry, [_cell(study, entry, name) for name in names]) for entry in study.entries]
    lines = [[entry.name, *(cell.exact for cell in cells)] for entry, cells in rows]
    hints = [_about(study, name) for name in names]
    return ProbeTable([readable(name) for name in names], hints, rows, to_csv(["model", *names], lines))


def probe_figures(study: Study) -> Iterable[Figure]:
    """Draw every probe over the tasks learned, and by task."""
    for name in _names(study):
        unit = _unit(study, name)
        models = [_probed(entry, name) for entry in study.entries if _found(entry, name)]
        better = _BETTER.get(_any(study, name).get("better", ""), "")
        title = readable(name)
        if (curves := curve_chart(title, models, unit)) is not None:
            yield Figure(
                f"probe_{file_name(name)}",
                f"{title.capitalize()} after every task",
                f"What the probe found about every model after each task{better}.",
                curves,
            )
        if (by_task := task_chart(title, models, study.tasks, unit)) is not None:
            yield Figure(
                f"probe_{file_name(name)}_by_task",
                f"{title.capitalize()} by task",
                f"The same after the last task, for every task{better}.",
                by_task,
            )
        if (plane := _plane(study, name, unit)) is not None:
            yield Figure(
                f"probe_{file_name(name)}_against_accuracy",
                f"{title.capitalize()} against average accuracy",
                "One dot per model after the last task. What lies above the line through the others gains in the probe "
                "beyond what its accuracy explains; the base model and interpolations with it make a curve.",
                plane,
            )


def _plane(study: Study, name: str, unit: Unit) -> LineChart | None:
    """Return the models by average accuracy and by a probe that is a share and better when higher; None if under 3."""
    if unit != "share" or _any(study, name).get("better") != "higher":
        return None
    dots = [
        line_of(entry, [(accuracy.mean, value)])
        for entry in study.entries
        if (value := _value(entry, name)).is_defined
        and (accuracy := entry.figure("average_accuracy", study.evaluation)).is_defined
    ]
    title = readable(name)
    chart = LineChart([Panel("", dots)], "average accuracy", title, x_unit="share", y_unit=unit, dots=True)
    return chart if len(dots) > 2 else None


def _names(study: Study) -> list[str]:
    return [*dict.fromkeys(name for run in study.runs for name in probe_names(run.results))]


def _found(entry: Entry, name: str) -> list[Mapping[str, Any]]:
    """Return what the probe found in every run; empty if a run lacks it."""
    found = [run.results.model(entry.model).probes.get(name) for run in entry.runs]
    return [] if None in found else [one for one in found if one is not None]


def _any(study: Study, name: str) -> Mapping[str, Any]:
    return next(found[0] for entry in study.entries if (found := _found(entry, name)))


def _unit(study: Study, name: str) -> Unit:
    return unit_of(found for entry in study.entries for found in _found(entry, name))


def _about(study: Study, name: str) -> str:
    found = _any(study, name)
    return f"{found.get('probe', name)}{_BETTER.get(found.get('better', ''), '')}"


def _value(entry: Entry, name: str) -> Spread:
    found = _found(entry, name)
    return Spread(tuple(number(one["value"]) for one in found) or (math.nan,))


def _cell(study: Study, entry: Entry, name: str) -> ProbeCell:
    spread, unit = _value(entry, name), _unit(study, name)
    if not spread.is_defined:
        return ProbeCell(MISSING, "not measured or undefined", "", is_best=False)
    value, found = value_of(spread), _found(entry, name)
    counted = sum(cases(one["n"]) for one in found)
    hint = f"{value.mean!r}, over {counted}"
    if unit == "share" and len(found) == 1 and counted:
        low, high = wilson(value.mean, counted)
        hint += f", 95 % Wilson interval {show(low)} to {show(high)}"
    text = show(value.mean, unit, std=value.std)
    return ProbeCell(text, hint, repr(value.mean), entry.is_merger and value.mean == _best(study, name))


def _best(study: Study, name: str) -> float:
    """Return the best value among the mergers, NaN if neither end is better."""
    known = [value.mean for entry in study.mergers if (value := _value(entry, name)).is_defined]
    better = _any(study, name).get("better")
    if len(known) < 2 or better is None:
        return math.nan
    return max(known) if better == "higher" else min(known)


def _probed(entry: Entry, name: str) -> Probed:
    found = _found(entry, name)
    return Probed(entry.name, look(entry), _over_runs(found, "curve"), _over_runs(found, "per_task"))


def _over_runs(found: Sequence[Mapping[str, Any]], key: str) -> list[Value]:
    columns = zip(*(one.get(key) or () for one in found), strict=False)
    return [value_of(Spread(tuple(number(value) for value in column))) for column in columns]
