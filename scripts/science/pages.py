"""Write the tables of docs/methods.md, why.md, claims.md, predictors.md and which_merger.md from committed figures.

    python scripts/science/pages.py            # tables, the figure, and what clmerge report knows
    python scripts/science/pages.py --check    # exit with 1 if a table is out of date

What is written stands between the comments `science: NAME` and `science: end` of a page. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/table_runs.py

from advice import ADVICE, EVIDENCE, evidence
from claims import CLAIMS, Claim, compared
from factors import factor_tables
from intervals import Interval, points, rank_correlation
from plan import STRENGTHS, WAYS
from rows import READINGS, STREAMS, Row, load, table_of
from table_runs import markdown, spread

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"(<!-- science: ([\w-]+) -->\n).*?(<!-- science: end -->)", re.DOTALL)


def methods_table(stream: str, table: Mapping[tuple[str, str, str], Row]) -> str:
    """Return all methods on one stream, best first."""
    found = [row for (name, _, change), row in table.items() if name == stream and not change]
    own = found[0].evaluation
    other = "agnostic" if own == "aware" else "aware"
    heads = [STREAMS[stream], "data", READINGS[own], READINGS[other], "learning", "forgetting", "BWT"]
    heads += ["MB kept", "training s", "merging s", "scale", "seeds"]
    rows = []

    def place(row: Row) -> float:
        return -statistics.mean(row.values().values())

    for row in sorted((row for row in found if row.values()), key=place):
        figures = list(row.by_seed.values())
        seconds = [one["seconds"] for one in figures if one.get("seconds") is not None]
        trains = [] if row.model == "zero_shot" else [run["train_seconds"] for run in row.runs.values()]
        cells = [row.label, row.data, spread([*row.values().values()]), spread([*row.values(other).values()])]
        cells += [spread([*row.values("own", key).values()]) for key in ("learning", "forgetting", "bwt")]
        cells += [f"{statistics.mean(one['bytes'] or 0 for one in figures) / 1e6:.1f}"]
        cells += [f"{min(trains):.0f}" if trains else "-", f"{min(seconds):.1f}" if seconds else "-"]
        rows.append([*cells, chosen(one.get("chosen") for one in figures), str(len(figures))])
    return markdown(heads, rows)


def chosen(found: Iterable[Mapping[str, Any] | None]) -> str:
    """Write the scales that validation images chose, over the seeds."""
    scales = [next((v for k, v in one.items() if k.endswith("scale")), None) for one in found if one]
    known = sorted({scale for scale in scales if scale is not None})
    return "-" if not known else f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"


COMPARED = ["rows compared", "difference in points, 95 % interval", "here"]


def comparison(claim: Claim, table: Mapping[tuple[str, str, str], Row]) -> list[str]:
    """Return the cells of a comparison: the rows, the differences, and what they decide; none without common seeds."""
    found = compared(claim, table)
    if not found.by_stream:
        return []
    shown = "<br>".join(f"{name}: {points(one)}" for name, one in found.streams.items())
    if len(found.by_stream) > 1:
        shown += f"<br>mean: {points(found.overall())}"
    reading = f", {READINGS[claim.reading]}" if claim.reading != "own" else ""
    margin = f", plus {100 * claim.margin:.0f} points" if claim.margin else ""
    surely = ", at 99 %, too" if found.verdict in ("holds", "fails") and found.overall(0.99).sign else ""
    return [f"`{claim.first}` less `{claim.second}`{reading}{margin}", shown, f"**{found.verdict}**{surely}"]


def advice_table(table: Mapping[tuple[str, str, str], Row]) -> str:
    """Return one row for every advice."""
    rows = ([one.condition, one.take, *cells] for one in ADVICE if (cells := comparison(one.claim, table)))
    return markdown(["you have, or want", "take", *COMPARED], rows)


def claims_table(table: Mapping[tuple[str, str, str], Row]) -> str:
    """Return one row for every claim."""
    rows = (
        [f"{claim.text} ([{claim.source}](https://arxiv.org/abs/{claim.source}))", *cells]
        for claim in CLAIMS
        if (cells := comparison(claim, table))
    )
    return markdown(["claim", *COMPARED], rows)


RULES = {"task_arithmetic": "task arithmetic", "ties": "TIES", "tsvm": "TSV-M"}


def predictors_tables(known: Mapping[str, Any]) -> dict[str, str]:
    """Return the rank correlations of what is known before merging with what merging loses, all and by stream."""
    runs = [run for run in known["runs"] if run.get("before")]
    names = list(dict.fromkeys(name for run in runs for name in run["before"]))
    overall = {name: [correlation(runs, name, rule) for rule in RULES] for name in names}

    def strength(name: str) -> float:
        return -sum(0 if math.isnan(one.mean) else abs(one.mean) for one in overall[name])

    names.sort(key=strength)
    rows = ([name, *map(cell, overall[name]), str(overall[name][-1].count)] for name in names)
    made = {"predictors": markdown(["number", *(f"loss by {rule}" for rule in RULES.values()), "runs"], rows)}
    parts = {stream: [run for run in runs if run["stream"] == stream] for stream in STREAMS}
    lost = {stream: [loss(run, "task_arithmetic") for run in part] for stream, part in parts.items()}
    heads = [f"{name} ({len(lost[stream])} runs)" for stream, name in STREAMS.items()]
    rows = ([name, *(cell(correlation(part, name, "task_arithmetic")) for part in parts.values())] for name in names)
    losses = ["*points lost by task arithmetic*", *(spread(values) for values in lost.values())]
    return made | {"predictors-streams": markdown(["number", *heads], [losses, *rows])}


def loss(run: Mapping[str, Any], rule: str) -> float:
    """Return what merging loses of the accuracy of the experts, told the task."""
    return float(run["experts"]["aware"] - run["models"][rule]["aware"]["accuracy"])


def correlation(runs: Sequence[Mapping[str, Any]], name: str, rule: str) -> Interval:
    """Return the rank correlation of a number with what a rule loses, inside of the streams."""
    kept = [run for run in runs if run["before"].get(name) is not None and rule in run["models"]]
    x, y = [run["before"][name] for run in kept], [loss(run, rule) for run in kept]
    groups = [run["stream"] for run in kept]
    return rank_correlation(x, y, groups, [f"{run['stream']} {run['change']} {run['way']}" for run in kept])


def cell(one: Interval) -> str:
    """Write a correlation with its interval, bold where it excludes zero."""
    bold = "**" if one.sign else ""
    return "-" if math.isnan(one.mean) else f"{bold}{one.mean:+.2f}{bold} [{one.low:+.2f}, {one.high:+.2f}]"


def blocks(known: Mapping[str, Any], table: Mapping[tuple[str, str, str], Row]) -> dict[str, str]:
    """Return every generated table by name."""
    made = {f"methods-{stream}": methods_table(stream, table) for stream in STREAMS}
    made |= {f"why-{name}": text for name, text in factor_tables(known, table).items()}
    made["claims"] = claims_table(table)
    made |= predictors_tables(known)
    made["backbones"] = backbones_table(known["backbones"])
    made["strengths"] = strengths_table(known["strengths"])
    made["advice"] = advice_table(table)
    return made


def backbones_table(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the pretrained ViTs are."""
    rows = (
        [
            name,
            f"{card['parameters'] / 1e6:.2f} million",
            f"{card['epochs']} of {card['of']}",
            str(card["cpu_seconds"]),
            f"{100 * card['test_accuracy']:.1f} % (n = {card['test_images']})",
        ]
        for name, card in sorted(cards.items(), key=lambda one: (one[1]["parameters"], one[1]["epochs"]))
    )
    return markdown(["backbone", "parameters", "epochs", "CPU seconds", "accuracy on the 41 classes"], rows)


def strengths_table(trials: Iterable[Mapping[str, Any]]) -> str:
    """Return what strengths of regularizers reached on validation images; bold: taken."""
    rows = []
    for trial in trials:
        stream, way = trial["stream"], trial["way"]
        cells = []
        for strength, score in trial["scores"]:
            text = f"{strength:g}: {100 * score:.1f}"
            cells.append(f"**{text}**" if strength == STRENGTHS[way][stream] else text)
        rows.append([f"{way}, `{WAYS[way].strength}`", STREAMS[stream], ", ".join(cells)])
    return markdown(["way, parameter", "stream", "value: accuracy on validation images"], rows)


def filled(text: str, made: Mapping[str, str], used: set[str]) -> str:
    """Return a page with its blocks written anew."""

    def fill(match: re.Match[str]) -> str:
        used.add(match[2])
        return f"{match[1]}\n{made[match[2]]}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args(arguments).check
    known = load()
    table = table_of(known)
    made, used = blocks(known, table), set[str]()
    wanted = {page: filled(page.read_text(encoding="utf-8"), made, used) for page in sorted(DOCS.glob("*.md"))}
    wanted[EVIDENCE] = json.dumps(evidence(table), indent=1, ensure_ascii=False) + "\n"
    stale = [page for page, text in wanted.items() if not page.is_file() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        print(f"{'out of date' if check else 'wrote'}: {page.name}")
        if not check:
            page.write_text(wanted[page], encoding="utf-8")
    if unused := made.keys() - used:
        print(f"no page has: {', '.join(sorted(unused))}")
    if not check:
        from picture import draw

        draw(table, DOCS / "images" / "accuracy_bytes.png")
    return int(check and bool(stale or unused))


if __name__ == "__main__":
    sys.exit(main())
