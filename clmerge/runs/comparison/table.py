"""The table of a comparison, for terminals and for log files."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from clmerge.names import shorten
from clmerge.report.fronts import Front, fronts_of
from clmerge.report.runs import number
from clmerge.report.soups import soups_of
from clmerge.report.study import Entry, Spread, Study
from clmerge.results.results import ROUTING, Setting
from clmerge.results.table import align, percent, told_note
from clmerge.runs.comparison.compare import FORGOTTEN

_NAME_LENGTH = 80
_FRONT_LINES = 12
_NOTES = {
    "A": "A1, A2, ...: average accuracy in % on the tasks so far, after each task",
    "worst": "worst: lowest accuracy on a task; gap: how far below the tasks' own experts; norm.: share of theirs",
    "kept": "kept: bytes beside theta_0 after the last task; merge: seconds of all merges",
    "data": "data: images that were looked at beside the training of each task: val, current (its training images)",
}


def print_comparison(study: Study, *, setting: Setting | None = None) -> None:
    """Print the table of a comparison to stdout.

    Args:
        study: The compared runs.
        setting: Which reading of the logits; default the study's own.
    """
    lines, styles = comparison_lines(study, setting or study.evaluation)
    console = Console(soft_wrap=True, highlight=False)
    for line, style in zip(lines, styles, strict=True):
        console.print(Text(line, style=style if console.is_terminal else ""))


def comparison_lines(study: Study, setting: Setting) -> tuple[list[str], list[str]]:
    """Return the lines of the table, and the terminal style of each line.

    With several runs a line is the mean over the runs of a group, with their number and the standard deviation of the
    average accuracy.

    Args:
        study: The compared runs.
        setting: Which reading of the logits.
    """
    num_tasks = study.num_finished
    entries = study.entries
    best = next(iter(study.ranking(setting)), None)
    headings = ["model", *(f"A{t + 1}" for t in range(num_tasks)), "forget", "worst", "gap", "norm."]
    table = align(
        [
            [*headings, "kept MB", "merge s", "data"],
            *(_row(entry, study, setting, starred=entry is best) for entry in entries),
        ]
    )
    notes = list(_NOTES.values())
    notes += [line for entry in study.mergers for line in _forgotten(entry)]
    notes += [line for entry in study.mergers for line in _routed(entry)]
    notes += _knowledge(study)
    if best is not None:
        notes.append("* best merger by average accuracy after the last task")
    if told := [entry.name for entry in study.mergers if entry.needs_task]:
        notes.append(told_note(told))
    several = len(study.runs) > 1
    chosen = [
        _search_note(search, f"{entry.name} of {run.results.name}" if several else entry.name)
        for entry in study.mergers
        for run in entry.runs
        for search in run.results.searches
        if search["model"] == entry.model
    ]
    chosen += [line for front in fronts_of(study) for line in _front_lines(front)]
    orders = [
        _order_note(f"{entry.name} of {run.results.name}" if several else entry.name, part, setting)
        for entry in study.mergers
        for run in entry.runs
        if (part := (run.results.orders or {"models": {}})["models"].get(entry.model))
    ]
    soups = [line for soup in soups_of(study, setting) for line in soup.lines()]
    styles = ["bold", "", *("bold" if entry is best else "" if entry.is_merger else "dim" for entry in entries)]
    title = f"After task {num_tasks} of {len(study.tasks)}, {setting.replace('_', '-')}"
    plain = [*chosen, *orders, *soups]
    return [title, *table, *plain, *notes], styles + [""] * len(plain) + ["dim"] * len(notes)


def _row(entry: Entry, study: Study, setting: Setting, *, starred: bool) -> list[str]:
    num_runs = len(entry.runs)
    averages = entry.series("average_accuracy", setting)
    spread = f" +-{percent(averages[-1].std)}" if num_runs > 1 and not math.isnan(averages[-1].std) else ""
    name = entry.name + (f" ({num_runs} runs)" if num_runs > 1 else "")
    kept, seconds = entry.bytes_kept(), _total(entry.merge_seconds())
    return [
        shorten(name, _NAME_LENGTH) + " *" * starred,
        *(percent(value.mean) for value in averages[:-1]),
        percent(averages[-1].mean) + spread,
        *(
            percent(entry.figure(key, setting).mean)
            for key in ("forgetting", "worst_task", "gap_to_experts", "normalised_accuracy")
        ),
        f"{kept[-1].mean / 1e6:.1f}" if kept and kept[-1].is_defined else "-",
        "-" if math.isnan(seconds) else f"{seconds:.2f}",
        entry.data if entry.is_merger else "-",
    ]


def _forgotten(entry: Entry) -> Iterator[str]:
    """Describe the accuracy on the tasks that were left out."""
    for run in entry.runs:
        if probe := run.results.model(entry.model).probes.get(FORGOTTEN):
            values = ", ".join(f"{task} {percent(number(value))} %" for task, value in probe["values"].items())
            yield f"{entry.name}: on tasks that were left out {values}"


def _routed(entry: Entry) -> Iterator[str]:
    """Describe how many images of every task were routed to it, as a mean over the runs."""
    probes = [run.results.model(entry.model).probes.get(ROUTING) for run in entry.runs]
    if found := [probe["per_task"] for probe in probes if probe is not None]:
        columns = [[math.nan if v is None else float(v) for v in column] for column in zip(*found, strict=True)]
        values = " ".join(percent(math.fsum(column) / len(column)) for column in columns)
        yield f"{entry.name}: routed to the right task {values} % of each"


def _knowledge(study: Study) -> Iterator[str]:
    """Describe how much of what experts share, and of what one alone knows, every merged model remembers."""
    run = study.diagnosed
    models = ((run.results.diagnostics or {}).get("models") or {}) if run is not None else {}
    if run is None or "knowledge" not in models:
        return
    shared, unshared = (models["knowledge"][kind] for kind in ("shared", "unshared"))
    for name in run.results.mergers:
        if name in shared["remembered"]:
            kept = [percent(number(kind["remembered"][name])) for kind in (shared, unshared)]
            yield (
                f"{name}: remembers {kept[0]} % of {shared['n']} images that several experts know, and {kept[1]} % of "
                f"{unshared['n']} that one alone knows"
            )


def _total(seconds: Sequence[Spread]) -> float:
    """Return the sum over tasks, NaN where a task is unknown."""
    return math.fsum(value.mean for value in seconds) if seconds else math.nan


def _search_note(search: Mapping[str, Any], name: str) -> str:
    values = ", ".join(_chosen(name, value, search["parameters"][name]) for name, value in search["chosen"].items())
    score = percent(search["score"])
    name = shorten(name, _NAME_LENGTH)
    note = f"{name}: {values} chosen of {len(search['points'])} by {score} % on validation images"
    if search["rule"] is None:
        return note
    return f"{note}; best scale after task t: {search['rule']['a']:.2f} * t^{search['rule']['b']:.2f}"


def _front_lines(front: Front) -> Iterator[str]:
    """Describe the points that no other one beats on all tasks; of many, the rest is left to the report."""
    tasks = ", ".join(front.tasks)
    yield f"{front.name} of {front.run}: {len(front.rows)} points that no other beats on all tasks ({tasks})"
    for values, accuracies, _ in front.rows[:_FRONT_LINES]:
        yield f"  {values}: {' '.join(percent(value) for value in accuracies)}"
    if len(front.rows) > _FRONT_LINES:
        yield f"  ... {len(front.rows) - _FRONT_LINES} more in the report"


def _chosen(name: str, value: Any, values: Sequence[Any]) -> str:
    """Return a chosen value as text, with a hint if a wider range may hold a better one."""
    numbers = len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    shown = f"{value:.4g}" if isinstance(value, float) else value
    return f"{name}={shown}" + " (at the edge of what was tried)" * (numbers and value in (min(values), max(values)))


def _order_note(model: str, part: Mapping[str, Any], setting: Setting) -> str:
    name = shorten(model, _NAME_LENGTH)
    if part["order_free"]:
        return f"{name}: the order of tasks does not matter"
    found = part[setting]
    spread = f"{percent(found['mean'])} +- {percent(found['std'])} %"
    return f"{name}: {spread} over {len(found['accuracy'])} orders of the experts"
