"""Collect the figures of finished studies into docs/results/methods.json, a row for every model of every run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from plan import TRIAL_SEED, TRIED, WAYS, Run, Study, trial_of

FILE = Path(__file__).resolve().parents[2] / "docs" / "results" / "methods.json"
READINGS = {"agnostic": "task_agnostic", "aware": "task_aware"}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is defined, if anything is."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def rounded(value: Any) -> Any:
    """Round all numbers to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def figures_of(record: dict[str, Any], model: str, searches: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one model of one run."""
    found = record["models"][model]
    figures: dict[str, Any] = {"data": found["data"], "kind": found["kind"]}
    for short, reading in READINGS.items():
        if found[reading] is not None:
            one = found[reading]
            figures[short] = {
                "accuracy": one["average_accuracy"][-1],
                "learning": one["learning_accuracy"],
                "forgetting": one["forgetting"],
                "bwt": one["backward_transfer"],
            }
    kept = found["bytes_kept"][-1] if found["bytes_kept"] else 0
    if found["kind"] == "unmerged":
        kept = sum(number for key, number in record["bytes"].items() if key.startswith(("regularizer.", "replay")))
    figures["bytes"] = kept
    if model == "task_oracle":
        figures["aware"] = {"accuracy": mean(row[place] for place, row in enumerate(found["task_aware"]["R"]))}
    if found["merge_seconds"]:
        figures["seconds"] = sum(one or 0.0 for one in found["merge_seconds"])
    if model in searches:
        search = searches[model]
        figures["chosen"] = search["chosen"]
        if model == "task_arithmetic":
            figures["searched"] = [[one["values"]["scale"], one["score"]] for one in search["points"]]
    return figures


def expert_accuracy(record: dict[str, Any]) -> dict[str, float | None]:
    """Return the accuracy of every expert on its own task, averaged over the tasks."""
    expert = record["models"]["expert"]
    return {
        short: mean(row[place] for place, row in enumerate(expert[reading]["R"])) if expert[reading] else None
        for short, reading in READINGS.items()
    }


def off_diagonal(matrix: Sequence[Sequence[float | None]]) -> float | None:
    """Return the mean of a matrix beside its diagonal."""
    return mean(one for row, line in enumerate(matrix) for column, one in enumerate(line) if row != column)


def numbers_before(diagnostics: dict[str, Any]) -> dict[str, float | None]:
    """Return what is known of task vectors and experts before anything is merged, one number each."""
    vectors, models, layers = (diagnostics[key] for key in ("vectors", "models", "layers"))
    whole, matrices = vectors["whole"], vectors["matrices"]
    pairs = [s for s in models["segments"] if s["from"] == s["to"] == "expert"]
    starts = [s for s in models["segments"] if (s["from"], s["to"]) == ("base", "expert")]
    found: dict[str, float | None] = {
        "norm": mean(one and one / math.sqrt(whole["numel"]) for one in whole["norm"]),
        "cosine": off_diagonal(whole["cosine"]),
        "sign conflict": off_diagonal(whole["sign_conflict"]),
        "left overlap": mean(off_diagonal(one["left_overlap"]) for one in matrices),
        "right overlap": mean(off_diagonal(one["right_overlap"]) for one in matrices),
        "effective rank": mean(mean(one["effective_rank"]) for one in matrices),
        "barrier of experts (loss)": mean(one["loss_barrier"] for one in pairs),
        "barrier of experts (error)": mean(one["error_barrier"] for one in pairs),
        "barrier from base (loss)": mean(one["loss_barrier"] for one in starts),
        "xi": off_diagonal(models["disentanglement"]["xi"]),
        "sharpness of experts": mean(models["models"]["expert"]["sharpness"]),
        "features moved": mean(models["models"]["base"]["representation_bias"]),
        "gain of experts (error)": mean(
            None if base is None or expert is None else base - expert
            for base, expert in zip(*(models["models"][name]["error"] for name in ("base", "expert")), strict=True)
        ),
    }
    if layers:
        found["largest barrier of a layer"] = max(
            (one["barrier"] for one in layers["layers"] if one["barrier"] is not None), default=None
        )
        found["LLFC"] = mean(one["llfc"] for one in layers["layers"])
        for key in ("localisation", "alignment"):
            found[f"tangent {key}"] = mean(one[key] for one in layers.get("tangent") or [])
    return found


def row_of(run: Run, comparisons: Iterable[str], work: Path) -> dict[str, Any] | None:
    """Return everything that is known of a run; None if it is not finished."""
    file = work / "runs" / run.name / "results.json"
    manifest = file.with_name("manifest.json")
    if not file.is_file() or not json.loads(manifest.read_text())["finished"]:
        return None
    [record] = json.loads(file.read_text())["runs"]
    way = WAYS[run.way]
    shown = [name for name in record["models"] if way.own or name in ("expert", "zero_shot")]
    row: dict[str, Any] = {
        "stream": run.stream,
        "way": run.way,
        "seed": run.seed,
        "change": run.change,
        "lr": run.lr,
        "tasks": len(record["tasks"]),
        "evaluation": record["evaluation"],
        "images": {"test": sum(record["samples"])},
        "train_seconds": record["seconds"].get("train", 0.0),
        "experts": expert_accuracy(record),
        "models": {name: figures_of(record, name, {}) for name in shown},
    }
    for name in comparisons:
        out = work / "compared" / f"{run.name}--{name}"
        if not (out / "done").is_file():
            continue
        [compared] = json.loads((out / "results.json").read_text())["runs"]
        if name == "why":
            row["before"] = numbers_before(compared["diagnostics"])
            continue
        searches = {search["model"]: search for search in compared["searches"]}
        for model in compared["models"]:
            shown = f"{model}, closed form" if (name, model) == ("closed", "wudi") else model
            row["models"].setdefault(shown, figures_of(compared, model, searches))
    return row


def collect(studies: Sequence[Study], work: Path) -> None:
    """Write the file, one line per run."""
    asked: dict[Run, list[str]] = {}
    for one in studies:
        asked.setdefault(one.run, []).extend(one.comparisons)
    rows = [row for run, names in asked.items() if (row := row_of(run, names, work)) is not None]
    cards = {file.parent.name: json.loads(file.read_text()) for file in sorted((work / "caltech").glob("*/card.json"))}
    parts = {"backbones": json.dumps(rounded(cards)), "strengths": json.dumps(rounded(list(strengths(work))))}
    head = ",\n".join(f'"{key}": {text}' for key, text in parts.items())
    lines = ",\n".join(json.dumps(rounded(row), ensure_ascii=False) for row in rows)
    FILE.write_text(f'{{{head},\n"runs": [\n{lines}\n]}}\n')
    print(f"{FILE}: {len(rows)} of {len(asked)} runs", file=sys.stderr)


def strengths(work: Path) -> Iterator[dict[str, Any]]:
    """Yield the validation accuracies of all strengths that were tried, on a seed of their own."""
    for way, streams in TRIED.items():
        for stream, values in streams.items():
            trials = {value: Run(stream, way, TRIAL_SEED, strength=value) for value in values}
            found = {value: searches_of(run, work) for value, run in trials.items()}
            scores = [(value, max(one["score"] for one in searches)) for value, searches in found.items() if searches]
            if scores:
                yield {"stream": stream, "way": way, "scores": scores}


def searches_of(run: Run, work: Path) -> list[dict[str, Any]]:
    """Return what validation images chose in a trial, rule by rule; nothing if it is not finished."""
    out = work / "compared" / f"{run.name}--{trial_of(run)}"
    if not (out / "done").is_file():
        return []
    [record] = json.loads((out / "results.json").read_text())["runs"]
    found: list[dict[str, Any]] = record["searches"]
    return found


def validation_accuracy(work: Path, run: Run) -> str:
    """Return the validation accuracy of a trial's merges, each with the scale that is best for it."""
    found = searches_of(run, work)
    return ", ".join(f"{one['model']} {one['score']:.3f} at {one['chosen']}" for one in found)
