"""The table of a comparison, for terminals and for log files."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from clmerge.names import shorten
from clmerge.results.results import SETTINGS, Setting, is_reference, needs_task
from clmerge.results.table import align, percent, told_note

_NAME_LENGTH = 80
_NOTES = {
    "A": "A1, A2, ...: average accuracy in % on the tasks so far, after each task",
    "worst": "worst: lowest accuracy on a task; gap: how far below the tasks' own experts; norm.: share of theirs",
    "kept": "kept: bytes beside theta_0 after the last task; merge: seconds of all merges",
}


def print_comparison(document: Mapping[str, Any], *, setting: Setting | None = None) -> None:
    """Print the table of a document to stdout.

    Args:
        document: What ``build_document`` returned.
        setting: Which reading of the logits; default the document's own.
    """
    lines, styles = comparison_lines(document, setting or document["evaluation"])
    console = Console(soft_wrap=True, highlight=False)
    for line, style in zip(lines, styles, strict=True):
        console.print(Text(line, style=style if console.is_terminal else ""))


def comparison_lines(document: Mapping[str, Any], setting: Setting) -> tuple[list[str], list[str]]:
    """Return the lines of the table, and the terminal style of each line.

    With several runs a line is the mean over the runs of a group, with their number and the standard deviation of the
    average accuracy.

    Args:
        document: What ``build_document`` returned.
        setting: Which reading of the logits.
    """
    compared = document["compare"]
    num_tasks = len(document["tasks"])
    if compared["aggregates"]:
        rows = [_aggregate_row(entry, document, setting) for entry in compared["aggregates"]]
        names = [entry["model"] for entry in compared["aggregates"]]
    else:
        rows = [_row(model, document, setting) for model in document["models"]]
        names = list(document["models"])
    averages = [row.pop("average") for row in rows]
    candidates = [i for i, name in enumerate(names) if not is_reference(name) and averages[i] is not None]
    best = max(candidates, key=lambda i: averages[i], default=-1)
    headings = [
        "model",
        *(f"A{t + 1}" for t in range(num_tasks)),
        *[key for key in rows[0] if key not in ("model", "A")],
    ]
    cells = [
        [shorten(row["model"], _NAME_LENGTH) + " *" * (i == best), *row.pop("A"), *list(row.values())[1:]]
        for i, row in enumerate(rows)
    ]
    table = align([headings, *cells])
    title = f"After task {num_tasks} of {num_tasks}, {setting.replace('_', '-')}"
    notes = list(_NOTES.values())
    if best >= 0:
        notes.append("* best merger by average accuracy after the last task")
    told = [model for model, found in document["models"].items() if needs_task(*(found[s]["R"] for s in SETTINGS))]
    if told:
        notes.append(told_note(told))
    chosen = [_search_note(search) for search in compared["searches"]]
    swept = compared["orders"]["models"] if compared["orders"] else {}
    orders = [_order_note(name, part, setting) for name, part in swept.items()]
    styles = ["bold", "", *("bold" if i == best else "dim" if is_reference(n) else "" for i, n in enumerate(names))]
    lines = [title, *table, *chosen, *orders, *notes]
    return lines, styles + [""] * (len(chosen) + len(orders)) + ["dim"] * len(notes)


def _row(model: str, document: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    contract = document["models"][model][setting]
    own = document["compare"]["figures"][model][setting]
    averages = contract["average_accuracy"]
    return {
        "model": model,
        "A": [_percent(value) for value in averages],
        "average": averages[-1],
        "forget": _percent(contract["forgetting"]),
        "worst": _percent(own["worst_task"][-1]),
        "gap": _percent(own["gap_to_experts"][-1]),
        "norm.": _percent(own["normalised_accuracy"][-1]),
        **_costs([model], document["compare"]),
    }


def _aggregate_row(entry: Mapping[str, Any], document: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    figures = entry[setting]
    averages, spread = (figures["average_accuracy"][key] for key in ("mean", "std"))
    several = spread[-1] is not None
    return {
        "model": " ".join(filter(None, (entry["model"], entry["group"], f"({entry['num_runs']} runs)" * several))),
        "A": [*map(_percent, averages[:-1]), _percent(averages[-1]) + f" +-{_percent(spread[-1])}" * several],
        "average": averages[-1],
        "forget": _percent(figures["forgetting"]["mean"]),
        "worst": _percent(figures["worst_task"]["mean"][-1]),
        "gap": _percent(figures["gap_to_experts"]["mean"][-1]),
        "norm.": _percent(figures["normalised_accuracy"]["mean"][-1]),
        **_costs(entry["models"], document["compare"]),
    }


def _costs(models: Sequence[str], compared: Mapping[str, Any]) -> dict[str, str]:
    kept = [compared["bytes_kept"][model][-1] for model in models]
    seconds = [sum(compared["merge_seconds"][model]) for model in models if model in compared["merge_seconds"]]
    merge = f"{sum(seconds) / len(seconds):.2f}" if seconds else "-"
    return {"kept MB": f"{sum(kept) / len(kept) / 1e6:.1f}", "merge s": merge}


def _search_note(search: Mapping[str, Any]) -> str:
    values = ", ".join(_chosen(name, value, search["parameters"][name]) for name, value in search["chosen"].items())
    score = percent(search["score"])
    name = shorten(search["model"], _NAME_LENGTH)
    note = f"{name}: {values} chosen of {len(search['points'])} by {score} % on validation images"
    if search["rule"] is None:
        return note
    return f"{note}; best scale after task t: {search['rule']['a']:.2f} * t^{search['rule']['b']:.2f}"


def _chosen(name: str, value: Any, values: Sequence[Any]) -> str:
    """Return a chosen value as text, with a hint if a wider range may hold a better one."""
    numbers = len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return f"{name}={value}" + " (at the edge of what was tried)" * (numbers and value in (min(values), max(values)))


def _order_note(model: str, part: Mapping[str, Any], setting: Setting) -> str:
    name = shorten(model, _NAME_LENGTH)
    if part["order_free"]:
        return f"{name}: the order of tasks does not matter"
    found = part[setting]
    spread = f"{percent(found['mean'])} +- {percent(found['std'])} %"
    return f"{name}: {spread} over {len(found['accuracy'])} orders of the experts"


def _percent(value: float | None) -> str:
    return percent(math.nan if value is None else value)
