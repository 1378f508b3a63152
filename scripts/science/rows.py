"""Read docs/results/methods.json: the values of a row, over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from collect import FILE
from plan import WAYS

STREAMS = {"grey": "grey, 5 tasks", "four": "grey, 20 tasks", "caltech": "Caltech, 10 tasks"}
SEEN = {
    "joint training": "all so far",
    "experience replay, 500 images": "500 kept",
}  # what the training itself looks at
READINGS = {"aware": "told the task", "agnostic": "all classes compete"}
SPECIAL = {"zero_shot": "zero-shot", "task_oracle": "experts, told the task", "ensemble": "ensemble of experts"}


@dataclass(frozen=True)
class Row:
    """One model of one kind of run.

    Attributes:
        stream: Name of the stream.
        label: What tables call it.
        way: Way of training.
        model: Name of the model in results.json.
        change: Changed factor; empty for none.
        by_seed: Its figures, by seed.
        runs: Its runs, by seed.
    """

    stream: str
    label: str
    way: str
    model: str
    change: str
    by_seed: Mapping[int, Mapping[str, Any]]
    runs: Mapping[int, Mapping[str, Any]]

    @property
    def data(self) -> str:
        """Images that it looked at beside those of the current task."""
        found: str = next(iter(self.by_seed.values()))["data"]
        return SEEN.get(self.label, found)

    @property
    def evaluation(self) -> str:
        """The reading that the stream goes by, ``aware`` or ``agnostic``."""
        found: str = next(iter(self.runs.values()))["evaluation"]
        return found.removeprefix("task_")

    def less(self, other: Row, reading: str = "own", figure: str = "accuracy") -> list[float]:
        """Return the paired differences to another row, over the seeds that both have."""
        first, second = self.values(reading, figure), other.values(reading, figure)
        return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]

    def values(self, reading: str = "own", figure: str = "accuracy") -> dict[int, float]:
        """Return a figure by seed, where it is defined."""
        wanted = self.evaluation if reading == "own" else reading
        found = {seed: one[wanted].get(figure) for seed, one in self.by_seed.items() if wanted in one}
        return {seed: value for seed, value in found.items() if value is not None}


def load() -> dict[str, Any]:
    """Return the file."""
    known: dict[str, Any] = json.loads(FILE.read_text())
    return known


def label_of(way: str, model: str) -> str | None:
    """Return what tables call a model of a run; None for what they do not show."""
    if model in SPECIAL:
        return SPECIAL[model] if way == "full, base" else None
    if model == "expert":
        return WAYS[way].expert
    if WAYS[way].own and WAYS[way].expert:
        return None  # these merge nothing
    shown = model.replace("pipeline", "task_arithmetic, LiNeS")
    return f"{way}: {shown}"


def rows(known: Mapping[str, Any]) -> Iterator[Row]:
    """Group the models of all runs by seeds."""
    grouped: dict[tuple[str, str, str, str], dict[int, Any]] = {}
    for run in known["runs"]:
        for model in run["models"]:
            grouped.setdefault((run["stream"], run["way"], model, run["change"]), {})[run["seed"]] = run
    for (stream, way, model, change), found in grouped.items():
        label = label_of(way, model)
        if label is not None:
            by_seed = {seed: run["models"][model] for seed, run in sorted(found.items())}
            yield Row(stream, label, way, model, change, by_seed, dict(sorted(found.items())))


def table_of(known: Mapping[str, Any]) -> dict[tuple[str, str, str], Row]:
    """Return all rows by stream, label and change."""
    return {(row.stream, row.label, row.change): row for row in rows(known)}
