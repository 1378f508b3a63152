"""Tables of one changed factor at a time: what merging adds, and what it loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from plan import CHANGES, FROZEN, RATES, TASKS, TRAINED
from rows import STREAMS, Row
from table_runs import markdown, spread

Table = Mapping[tuple[str, str, str], Row]
FACTORS = {
    "loss": "classes in the loss",
    "lr": "learning rate",
    "images": "images a class",
    "tasks": "tasks",
    "backbone": "backbone",
}
USUAL = {"loss": "current", "lr": f"{RATES['full']:g}", "backbone": "medium"}
SHORT = {"aware": "told the task", "agnostic": "all classes"}  # readings, in a row's name
SUM, SVD = "full, base: task_arithmetic", "full, base: tsvm"


def usual(stream: str, factor: str) -> str:
    """Return the level that all other runs have."""
    if factor == "images":
        return f"{TRAINED[stream]}"
    return f"{TASKS[stream]}" if factor == "tasks" else USUAL[factor]


def base_of(table: Table, stream: str, change: str) -> Row | None:
    """Return the model that fine-tuning starts from: zero-shot, or class means where the head has no text."""
    changed = change if change.startswith(FROZEN) else ""  # other changes leave it as it is
    for label in ("zero-shot", "class means, frozen"):
        if (row := table.get((stream, label, changed))) is not None:
            return row
    return None


def experts(row: Row, reading: str) -> list[float]:
    """Return the accuracy of every expert on its own task, over seeds."""
    return [run["experts"][reading] for run in row.runs.values()]


def factor_tables(known: Mapping[str, Any], table: Table) -> dict[str, str]:
    """Return a table for every factor."""
    heads = ["level", "base", "experts", "sum, tuned", "TSV-M, tuned", "TSV-M over base", "TSV-M less experts", "n"]
    made = {
        factor: markdown([title, *heads], (row for stream in STREAMS for row in _levels(table, stream, factor)))
        for factor, title in FACTORS.items()
    }
    return made | {"scale": scale_table(known), "policy": policy_table(table), "head": head_table(table)}


def _levels(table: Table, stream: str, factor: str) -> Iterator[list[str]]:
    """Yield two rows for every level of a factor that a stream has, if it has another than the usual one."""
    changed = {change: change.partition("=")[2] for change in CHANGES[stream] if change.startswith(f"{factor}=")}
    if not any((stream, SVD, change) in table for change in changed):
        return
    names = {"": usual(stream, factor), **changed}
    there = [change for change in names if (stream, SUM, change) in table and (stream, SVD, change) in table]
    for change in sorted(there, key=lambda one: _order(names[one])):
        added, merged = table[stream, SUM, change], table[stream, SVD, change]
        base = base_of(table, stream, change)
        for reading, short in SHORT.items():
            found = experts(merged, reading)
            lost = [value - expert for value, expert in zip(merged.values(reading).values(), found, strict=True)]
            yield [
                f"{STREAMS[stream]}, {short}",
                names[change] if change else f"**{names[change]}**",
                spread([*base.values(reading).values()]) if base else "-",
                spread(found),
                spread([*added.values(reading).values()]),
                spread([*merged.values(reading).values()]),
                spread(merged.less(base, reading)) if base else "-",
                spread(lost),
                str(len(found)),
            ]


def _order(level: str) -> tuple[float, str]:
    try:
        return float(level), level
    except ValueError:
        names = ["current", "seen", "all", "small", "medium-5", "medium-20", "medium", "large"]
        return float(names.index(level)), level


def scale_table(known: Mapping[str, Any]) -> str:
    """Return validation accuracy against the scale of the sum."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in known["runs"]:
        if run["way"] == "full, base" and not run["change"]:
            for scale, score in run["models"].get("task_arithmetic", {}).get("searched", []):
                found.setdefault(run["stream"], {}).setdefault(scale, []).append(score)
    scales = sorted({scale for one in found.values() for scale in one})
    rows = ([STREAMS[stream], *(spread(one.get(scale, [])) for scale in scales)] for stream, one in found.items())
    return markdown(["scale", *(f"{scale:g}" for scale in scales)], rows)


def policy_table(table: Table) -> str:
    """Return the same rules for experts from the base and for experts in sequence."""
    places = [(stream, policy) for stream in STREAMS for policy in ("base", "previous")]
    rows = []
    for rule in ("weight_average", "task_arithmetic", "magmax", "ties", "tsvm"):
        found = [table.get((stream, f"full, {policy}: {rule}", "")) for stream, policy in places]
        for reading, short in SHORT.items():
            cells = (spread([*row.values(reading).values()]) if row else "-" for row in found)
            rows.append([f"{rule}, {short}", *cells])
    return markdown(["rule", *(f"{STREAMS[stream]}, from {policy}" for stream, policy in places)], rows)


def head_table(table: Table) -> str:
    """Return the mean with a head as it is, and with one that is tuned on a few images of all classes."""
    rows = []
    for stream, name in STREAMS.items():
        tuned = table.get((stream, "full, base: weight_average+tuned", ""))
        plain = table.get((stream, "full, base: weight_average", ""))
        if tuned is None or plain is None:
            continue
        for reading, short in SHORT.items():
            both = plain.by_seed.keys() & tuned.by_seed.keys()
            accuracies = ([v for seed, v in row.values(reading).items() if seed in both] for row in (plain, tuned))
            rows.append(
                [f"{name}, {short}", *map(spread, accuracies), spread(tuned.less(plain, reading)), str(len(both))]
            )
    return markdown(["stream", "mean", "mean, head tuned", "difference", "seeds"], rows)
