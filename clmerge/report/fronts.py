"""Pareto fronts of searches: the points that no other one beats on all tasks, as a table and a figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clmerge.figures.charts import LineChart, Panel
from clmerge.figures.numbers import show
from clmerge.names import file_name
from clmerge.report.charts import Figure, line_of
from clmerge.report.runs import Run, number
from clmerge.report.study import Entry, Spread, Study

_SEVERAL = ("preferences", "nsga", "quadratic")  # strategies that look for more than one best point
_SENTENCE = (
    "Validation accuracies of the points that no other point of the search beats on all tasks; large marks are the "
    "chosen one."
)


@dataclass(frozen=True)
class Front:
    """The front of one search.

    Attributes:
        name: The merger.
        run: The run.
        tasks: The tasks.
        rows: For every point: its values, the accuracies, whether it was chosen.
    """

    name: str
    run: str
    tasks: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float], bool]]

    def shown(self) -> list[tuple[str, list[str], bool]]:
        """Return the rows as texts."""
        return [(values, [show(each) for each in accuracies], chosen) for values, accuracies, chosen in self.rows]


def fronts_of(study: Study) -> list[Front]:
    """Return the fronts of the searches that looked for one, those with two points or more on two tasks or more."""
    return [
        front
        for entry in study.mergers
        for run in entry.runs
        for search in run.results.searches
        if search["model"] == entry.model and (front := _front(entry, run, search)) is not None
    ]


def front_figures(study: Study) -> Iterable[Figure]:
    """Draw every front: two tasks as a plane, more as a line for each point."""
    entries = {entry.name: entry for entry in study.mergers}
    several = len(study.runs) > 1
    for front in fronts_of(study):
        entry = entries[front.name]
        chosen = [i for i, (_, _, is_chosen) in enumerate(front.rows) if is_chosen]
        chart: LineChart
        if len(front.tasks) == 2:
            dots = [(found[0], Spread((found[1],))) for _, found, _ in front.rows]
            panel = Panel("", [line_of(entry, dots, chosen=chosen)])
            chart = LineChart([panel], front.tasks[0], front.tasks[1], x_unit="share", dots=True)
        else:
            lines = []
            for _, found, is_chosen in sorted(front.rows, key=lambda row: -row[2]):
                points = [(float(task), Spread((value,))) for task, value in enumerate(found, start=1)]
                lines.append(line_of(entry, points, faint=not is_chosen))
            chart = LineChart([Panel("", lines)], "task", "accuracy", x_labels=front.tasks)
        name = f"front_{file_name(entry.model)}" + (f"_{file_name(front.run)}" if several else "")
        title = f"What {front.name} can trade" + (f" in {front.run}" if several else "")
        yield Figure(name, title, _SENTENCE, chart)


def _front(entry: Entry, run: Run, search: Mapping[str, Any]) -> Front | None:
    points = [search["points"][i] for i in search.get("front", ()) if i < len(search["points"])]
    tasks = run.results.tasks
    rows = [
        (_values(point["values"]), [number(each) for each in point["accuracy"]], point["values"] == search["chosen"])
        for point in points
        if len(point.get("accuracy", ())) == len(tasks)
    ]
    if search["method"] not in _SEVERAL or len(rows) < 2 or len(tasks) < 2:
        return None
    return Front(entry.name, run.name, tasks, rows)


def _values(values: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())
