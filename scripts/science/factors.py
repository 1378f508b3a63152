"""Tables of one changed factor at a time: what merging adds, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plan import CHANGES, RATES, TRAINED
from rows import STREAMS, Row
from table_runs import spread

Table = Mapping[tuple[str, str, str], Row]
FACTORS = {
    "loss": "classes in the loss",
    "lr": "learning rate",
    "images": "images a class",
    "tasks": "tasks",
    "backbone": "backbone",
}
USUAL = {"loss": "current", "lr": f"{RATES['full']:g}", "backbone": "medium"}
SUM, SVD = "full, base: task_arithmetic", "full, base: tsvm"


def usual(stream: str, factor: str) -> str:
    """Return the level that all other runs have."""
    if factor == "images":
        return f"{TRAINED[stream]}"
    return {"grey": "5", "four": "20", "caltech": "10"}[stream] if factor == "tasks" else USUAL[factor]


def base_of(table: Table, stream: str, change: str) -> Row | None:
    """Return the model that fine-tuning starts from: zero-shot, or class means where the head has no text."""
    changed = change if change.startswith(("backbone", "tasks")) else ""  # other changes leave it as it is
    for label in ("zero-shot", "class means, frozen"):
        if (row := table.get((stream, label, changed))) is not None:
            return row
    return None


def experts(row: Row, reading: str) -> list[float]:
    """Return the accuracy of every expert on its own task, over seeds."""
    return [run["experts"][reading] for run in row.runs.values()]


def differences(first: Row, second: Row, reading: str) -> list[float]:
    """Return the paired differences over seeds."""
    one, other = first.values(reading), second.values(reading)
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def factor_tables(known: Mapping[str, Any], table: Table) -> dict[str, str]:
    """Return a table for every factor."""
    made = {}
    heads = ["", "level", "base", "experts", "sum, tuned", "TSV-M, tuned", "TSV-M over base", "TSV-M less experts", "n"]
    for factor, title in FACTORS.items():
        heads[0] = title
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for stream, name in STREAMS.items():
            changes = [change for change in CHANGES[stream] if change.startswith(f"{factor}=")]
            if not any((stream, SVD, change) in table for change in changes):
                continue
            for change in sorted(
                ["", *changes], key=lambda one: _order(one.partition("=")[2] or usual(stream, factor))
            ):
                added, merged = table.get((stream, SUM, change)), table.get((stream, SVD, change))
                if added is None or merged is None:
                    continue
                base = base_of(table, stream, change)
                for reading, short in (("aware", "told the task"), ("agnostic", "all classes")):
                    found = experts(merged, reading)
                    cells = [f"{name}, {short}", change.partition("=")[2] or f"**{usual(stream, factor)}**"]
                    cells += [spread([*base.values(reading).values()]) if base else "-", spread(found)]
                    cells += [spread([*added.values(reading).values()]), spread([*merged.values(reading).values()])]
                    cells += [spread(differences(merged, base, reading)) if base else "-"]
                    lost = [v - e for v, e in zip(merged.values(reading).values(), found, strict=True)]
                    cells += [spread(lost), str(len(found))]
                    lines.append(f"| {' | '.join(cells)} |")
        made[factor] = "\n".join(lines)
    made["scale"] = scale_table(known)
    made["policy"] = policy_table(table)
    made["head"] = head_table(table)
    return made


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
    lines = [f"| scale | {' | '.join(f'{scale:g}' for scale in scales)} |", "|---" * (len(scales) + 1) + "|"]
    for stream, one in found.items():
        lines.append(f"| {STREAMS[stream]} | {' | '.join(spread(one.get(scale, [])) for scale in scales)} |")
    return "\n".join(lines)


def policy_table(table: Table) -> str:
    """Return the same rules for experts from the base and for experts in sequence."""
    heads = ["rule", *(f"{name}, from {policy}" for name in STREAMS.values() for policy in ("base", "previous"))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for rule in ("weight_average", "task_arithmetic", "magmax", "ties", "tsvm"):
        for reading, short in (("aware", "told the task"), ("agnostic", "all classes")):
            cells = [f"{rule}, {short}"]
            for stream in STREAMS:
                for policy in ("base", "previous"):
                    row = table.get((stream, f"full, {policy}: {rule}", ""))
                    cells.append(spread([*row.values(reading).values()]) if row else "-")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def head_table(table: Table) -> str:
    """Return the mean with a head as it is, and with one that is tuned on a few images of all classes."""
    lines = ["| stream | mean | mean, head tuned | difference | seeds |", "|---|---|---|---|---|"]
    for stream, name in STREAMS.items():
        tuned = table.get((stream, "full, base: weight_average+tuned", ""))
        plain = table.get((stream, "full, base: weight_average", ""))
        if tuned is None or plain is None:
            continue
        for reading, short in (("aware", "told the task"), ("agnostic", "all classes")):
            cells = [f"{name}, {short}"]
            cells += [spread([*row.values(reading).values()]) for row in (plain, tuned)]
            cells += [spread(differences(tuned, plain, reading)), str(len(tuned.by_seed))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
