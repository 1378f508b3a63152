"""One model of a run in its results: how it answers, what it was adapted to, its accuracies, and what it costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clmerge.results.contract import DATA_FREE, SETTINGS, Kind, Setting
from clmerge.results.metrics.continual import Row
from clmerge.results.metrics.matrix import AccuracyMatrix


@dataclass
class ModelRecord:
    """A model of a run.

    Attributes:
        matrices: Accuracy matrix R by reading of the logits.
        kind: How it answers: ``merged`` (one set of weights), ``per_task`` (a set for every task), ``calibrated``,
            ``routed`` (weights mixed for every image), ``ensemble``, or ``unmerged`` (the weights of a fit, or of the
            base model).
        rule: Its merge rule: ``merger`` (class name), ``init_args``, ``requires``, ``order_free``, ``exact_online``;
            None for models that are not merged.
        data: The images that it was adapted to beside the training of its tasks; ``none`` if it used no images.
        probes: Further measurements by name: ``value`` and its ``curve`` over the tasks learned, ``per_task`` or
            ``values``, with the count ``n``.
        bytes_kept: Bytes kept beside the base model, after every task; None where unknown.
        merge_seconds: Seconds of the update and of computing the merged weights, after every task; None where unknown.
    """

    matrices: dict[Setting, AccuracyMatrix]
    kind: Kind = "merged"
    rule: Mapping[str, Any] | None = None
    data: str = DATA_FREE
    probes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    bytes_kept: list[int | None] = field(default_factory=list)
    merge_seconds: list[float | None] = field(default_factory=list)

    @classmethod
    def blank(cls, num_tasks: int) -> "ModelRecord":
        """Return a model without rows."""
        return cls({setting: AccuracyMatrix(num_tasks) for setting in SETTINGS})

    def __len__(self) -> int:
        return len(self.matrices[SETTINGS[0]])

    @property
    def needs_task(self) -> bool:
        """Whether it has task-aware accuracies alone, because it serves every task with a view of its own."""
        undefined, known = (np.isnan(self.matrices[setting].values) for setting in SETTINGS)
        return bool(undefined.all() and not known.all())

    def add_row(
        self, rows: Sequence[Row], *, bytes_kept: int | None = None, merge_seconds: float | None = None
    ) -> None:
        """Append the accuracies after one more task, by reading of the logits, and what the model costs."""
        for setting, row in zip(SETTINGS, rows, strict=True):
            self.matrices[setting].add_row(row)
        self.bytes_kept.append(bytes_kept)
        self.merge_seconds.append(merge_seconds)

    def until(self, num_rows: int) -> "ModelRecord":
        """Return a copy with the first rows."""
        cut = {setting: matrix.until(num_rows) for setting, matrix in self.matrices.items()}
        costs = (self.bytes_kept[:num_rows], self.merge_seconds[:num_rows])
        probes = {name: _until(probe, num_rows) for name, probe in self.probes.items()}
        return ModelRecord(cut, self.kind, self.rule, self.data, probes, *costs)

    def to_dict(self, figures: Mapping[Setting, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the model in the form of ``results.json``.

        Args:
            figures: Its figures by reading of the logits.
        """
        readings: dict[str, Any] = {setting: to_json(figures[setting]) for setting in SETTINGS}
        if self.needs_task:
            readings["task_agnostic"] = None
        return {
            "kind": self.kind,
            "rule": None if self.rule is None else dict(self.rule),
            "data": self.data,
            **readings,
            "probes": to_json(self.probes),
            "bytes_kept": _known(self.bytes_kept),
            "merge_seconds": _known(self.merge_seconds),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], num_tasks: int) -> "ModelRecord":
        """Rebuild a model from ``results.json``, whose contract was checked."""
        found = cls.blank(num_tasks)
        aware = document["task_aware"]["R"]
        agnostic = document["task_agnostic"]
        undefined = [[None] * num_tasks] * len(aware)
        for rows in zip(undefined if agnostic is None else agnostic["R"], aware, strict=True):
            found.add_row(rows)
        found.kind, found.rule, found.data = document["kind"], document.get("rule"), document["data"]
        found.probes = dict(document.get("probes") or {})
        unknown = [None] * len(aware)
        found.bytes_kept = list(document.get("bytes_kept") or unknown)
        found.merge_seconds = list(document.get("merge_seconds") or unknown)
        return found


def _until(probe: Mapping[str, Any], num_rows: int) -> Mapping[str, Any]:
    """Cut the curve of a probe; what it found of the last task goes with the rest of the curve."""
    curve = probe.get("curve")
    if curve is None or len(curve) <= num_rows:
        return probe
    about = {key: probe[key] for key in ("better", "share", "probe") if key in probe}
    value = curve[num_rows - 1] if num_rows else math.nan
    return {"value": value, "curve": list(curve[:num_rows]), **about}


def _known(values: Sequence[float | None]) -> list[float | None] | None:
    return None if all(value is None for value in values) else list(values)


def to_json(value: Any) -> Any:
    """Replace NaN, at any depth, by None.

    Example:
        >>> to_json({"a": [1.0, math.nan]})
        {'a': [1.0, None]}
    """
    # Matrices of a long stream are millions of numbers, converted at every commit: the common types come first.
    kind = type(value)
    if kind is float:
        return None if value != value else value
    if kind is list or kind is tuple:
        return [(None if item != item else item) if type(item) is float else to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
