"""Searches and task orders of ``clmerge compare``: validation curves, chosen values, accuracy by order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clmerge.figures.charts import Line, LineChart, Panel
from clmerge.figures.numbers import show
from clmerge.names import file_name
from clmerge.report.charts import Figure, line_of
from clmerge.report.runs import Run, number
from clmerge.report.study import UNDEFINED, Entry, Spread, Study
from clmerge.results.results import Setting

_SENTENCE = (
    "Mean validation accuracy over all tasks, for every value that was tried; large marks are the chosen ones. Test "
    "images were used for those alone."
)


@dataclass(frozen=True)
class Chosen:
    """One search, as a line of the ledger."""

    name: str
    run: str
    method: str
    tried: str
    chosen: str
    score: str


def search_figures(study: Study) -> Iterable[Figure]:
    """Draw the validation accuracy of the tried values: curves for one parameter, dots for several."""
    curves: dict[str, list[Line]] = {}
    for entry in study.mergers:
        found = _searches(entry)
        names = {tuple(search["parameters"]) for _, search in found}
        listed = {search["method"] for _, search in found} == {"grid"}  # others try numbers of their own in each run
        if listed and len(names) == 1 and len(parameters := names.pop()) == 1 and _numeric(found, parameters[0]):
            curves.setdefault(parameters[0], []).append(_curve(entry, parameters[0], [s for _, s in found]))
        elif found:
            yield from _dots(entry, [search for _, search in found])
    if curves:
        panels = [Panel(parameter, lines) for parameter, lines in curves.items()]
        yield Figure("searches", "What validation images say", _SENTENCE, LineChart(panels, "value", "accuracy"))
    yield from _rules(study)


def order_figures(study: Study, setting: Setting) -> Iterable[Figure]:
    """Draw the final average accuracy when the same experts are merged in other orders."""
    lines = []
    for entry in study.mergers:
        found = [_orders(run)[entry.model] for run in entry.runs if entry.model in _orders(run)]
        values = [order[setting]["average_accuracy"] for order in found]
        # Rules that do not depend on the order are evaluated in one order only.
        if values and max(map(len, values)) > 1:
            points = [
                (float(i + 1), Spread(tuple(map(number, each)))) for i, each in enumerate(zip(*values, strict=False))
            ]
            lines.append(line_of(entry, points))
    if lines:
        yield Figure(
            "orders",
            "The same experts in other orders",
            "Final average accuracy for each order of the tasks that was tried: a flat line does not mind the order.",
            LineChart([Panel("", lines)], "order", "average accuracy"),
        )


def order_spread(entry: Entry, setting: Setting) -> Spread:
    """Return the final average accuracy in every tried order, over all runs; undefined for a single order."""
    found = [_orders(run)[entry.model] for run in entry.runs if entry.model in _orders(run)]
    values = [[number(value) for value in order[setting]["average_accuracy"]] for order in found]
    if not values or max(map(len, values)) < 2:
        return UNDEFINED
    return Spread(tuple(value for each in values for value in each))


def chosen_of(study: Study) -> list[Chosen]:
    """Describe every search: the tried and the chosen values."""
    return [
        Chosen(
            entry.name,
            run.name,
            str(search["method"]).replace("_", " "),
            f"{len(search['points'])} points: {', '.join(_range(name, search) for name in search['parameters'])}",
            ", ".join(f"{name}={_plain(value)}" for name, value in search["chosen"].items()),
            show(number(search["score"])),
        )
        for entry in study.mergers
        for run, search in _searches(entry)
    ]


def _searches(entry: Entry) -> list[tuple[Run, Mapping[str, Any]]]:
    return [(run, search) for run in entry.runs for search in run.results.searches if search["model"] == entry.model]


def _curve(entry: Entry, parameter: str, searches: list[Mapping[str, Any]]) -> Line:
    """Return the mean over runs at the values that all runs tried."""
    scores = [{p["values"][parameter]: number(p["score"]) for p in search["points"]} for search in searches]
    common = sorted(set.intersection(*map(set, scores)))
    chosen = {search["chosen"][parameter] for search in searches}
    points = [(float(x), Spread(tuple(score[x] for score in scores))) for x in common]
    return line_of(entry, points, chosen=[index for index, x in enumerate(common) if x in chosen])


def _dots(entry: Entry, searches: list[Mapping[str, Any]]) -> Iterable[Figure]:
    points = [point for search in searches for point in search["points"]]
    tried = [(point["values"], search["chosen"]) for search in searches for point in search["points"]]
    chosen = [index for index, (values, best) in enumerate(tried) if values == best]
    panels = []
    for parameter in searches[0]["parameters"]:
        if all(_is_number(point["values"].get(parameter)) for point in points):
            dots = [(float(p["values"][parameter]), Spread((number(p["score"]),))) for p in points]
            panels.append(Panel(parameter, [line_of(entry, dots, chosen=chosen)]))
    if panels:
        chart = LineChart(panels, "value", "accuracy", dots=True)
        yield Figure(
            f"search_{file_name(entry.model)}", f"What validation images say of {entry.name}", _SENTENCE, chart
        )


def _rules(study: Study) -> Iterable[Figure]:
    """Draw a coefficient against the number of tasks, for searches that fit a rule."""
    panels: dict[str, list[Line]] = {"best on validation images": [], "used: from earlier tasks alone": []}
    for entry in study.mergers:
        rules = [search["rule"] for _, search in _searches(entry) if search.get("rule")]
        for key, lines in zip(("chosen", "used"), panels.values(), strict=True):
            values = [rule[key] for rule in rules]
            if values:
                spreads = [Spread(tuple(map(number, each))) for each in zip(*values, strict=False)]
                lines.append(line_of(entry, [(float(task + 1), spread) for task, spread in enumerate(spreads)]))
    if any(panels.values()):
        yield Figure(
            "scale_by_task",
            "The coefficient as a function of the number of tasks",
            "Left the value that is best on validation images after every task, right the one that was used: a rule "
            "fitted to earlier tasks, which looks at nothing that comes later.",
            LineChart([Panel(title, lines) for title, lines in panels.items()], "after task", "value", y_unit="number"),
        )


def _range(name: str, search: Mapping[str, Any]) -> str:
    values = search["parameters"][name]
    if isinstance(values, list) and values and all(map(_is_number, values)):
        return f"{name} {_plain(min(values))} to {_plain(max(values))}"
    return f"{name} {', '.join(map(_plain, values))}" if isinstance(values, list) else name


def _numeric(found: list[tuple[Run, Mapping[str, Any]]], parameter: str) -> bool:
    return all(_is_number(point["values"][parameter]) for _, search in found for point in search["points"])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _orders(run: Run) -> Mapping[str, Any]:
    return run.results.orders["models"] if run.results.orders else {}
