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
from intervals import points, rank_correlation
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
    return [f"`{claim.first}` less `{claim.second}`{reading}{margin}", shown, f"**{found.verdict}**"]


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


def predictors_table(known: Mapping[str, Any]) -> str:
    """Return the rank correlations of what is known before merging with what merging loses."""
    runs = [run for run in known["runs"] if run.get("before")]
    rules = {"task_arithmetic": "task arithmetic", "ties": "TIES", "tsvm": "TSV-M"}
    names = list(dict.fromkeys(name for run in runs for name in run["before"]))
    found: list[tuple[float, list[str]]] = []
    for name in names:
        cells, strength, count = [], 0.0, 0
        for rule in rules:
            kept = [
                (run["before"][name], run["experts"]["aware"] - run["models"][rule]["aware"]["accuracy"], run)
                for run in runs
                if run["before"].get(name) is not None and rule in run["models"]
            ]
            x, y = [one[0] for one in kept], [one[1] for one in kept]
            groups = [run["stream"] for _, _, run in kept]
            clusters = [f"{run['stream']} {run['change']} {run['way']}" for _, _, run in kept]
            one = rank_correlation(x, y, groups, clusters)
            bold = "**" if one.sign else ""
            cells.append(
                "-" if math.isnan(one.mean) else f"{bold}{one.mean:+.2f}{bold} [{one.low:+.2f}, {one.high:+.2f}]"
            )
            strength, count = strength + (0 if math.isnan(one.mean) else abs(one.mean)), one.count
        found.append((-strength, [name, *cells, str(count)]))
    heads = ["number", *(f"loss by {shown}" for shown in rules.values()), "runs"]
    return markdown(heads, (cells for _, cells in sorted(found)))


def blocks(known: Mapping[str, Any], table: Mapping[tuple[str, str, str], Row]) -> dict[str, str]:
    """Return every generated table by name."""
    made = {f"methods-{stream}": methods_table(stream, table) for stream in STREAMS}
    made |= {f"why-{name}": text for name, text in factor_tables(known, table).items()}
    made["claims"] = claims_table(table)
    made["predictors"] = predictors_table(known)
    made["backbones"] = backbones_table(known["backbones"])
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
