"""Store the rows of a comparison on disk, so that it resumes after an interruption."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import clmerge
from clmerge.files import parse_json
from clmerge.results.confusion import Confusion, Confusions, ModelRow
from clmerge.results.measured import Measured
from clmerge.results.model_record import to_json
from clmerge.results.results import ROUTING, SETTINGS
from clmerge.results.run_lock import hold_lock
from clmerge.shapes import amount, anything, count, keyed, listed, maybe, number, record, share
from clmerge.weights import write_json_atomic


class CachedRow(TypedDict):
    """Accuracies of one model on every task, NaN where undefined, and the seconds that merging took.

    ``confusion`` is there for a finished model; a routed model has the share of every task's images that are routed to
    it, too; ``probes`` are the findings by the names of the probes.
    """

    task_agnostic: list[float]
    task_aware: list[float]
    merge_seconds: float
    confusion: NotRequired[Confusions]
    routing_accuracy: NotRequired[list[float]]
    probes: NotRequired[dict[str, Measured]]


def make_row(found: ModelRow, merge_seconds: float = 0.0) -> CachedRow:
    """Return the row of a model that was evaluated."""
    return {**found, "merge_seconds": merge_seconds}


class RowCache:
    """Rows by the key of their inputs, in one JSON file that is replaced atomically with every addition.

    Its folder is made, and locked while the cache exists: a second process would overwrite the rows of the first.

    Args:
        file: The file; read if it exists.

    Attributes:
        close: Releases the lock; adding rows is over then.

    Raises:
        BlockingIOError: If another process has locked the folder.
        ValueError: If the file is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = RowCache(Path(folder, "rows.json"))
        ...     key = cache.key("run", "MagMax(scale=0.5)", "test", [0, 1])
        ...     cache.add({key: {"task_agnostic": [1.0], "task_aware": [1.0], "merge_seconds": 0.5}})
        ...     key in RowCache(Path(folder, "rows.json"))
        True
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: dict[str, CachedRow] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        self.close = hold_lock(file.parent, self)
        if file.is_file():
            try:
                found = parse_json(file.read_bytes(), "something else")
                _ROWS(found, "")
            except ValueError as error:
                raise ValueError(
                    f"expected the rows of a comparison in {file}, which is damaged: {error}; remove the file"
                ) from error
            self._rows = {key: _from_json(row) for key, row in found.items()}

    @staticmethod
    def key(run: str, model: str, split: str, tasks: Sequence[int]) -> str:
        """Return the key of a row: equal for equal results of one version of clmerge.

        Args:
            run: Identity of the run.
            model: The merger with all settings.
            split: The split that it was evaluated on.
            tasks: The tasks that were merged, in order.
        """
        return hashlib.sha256(json.dumps([clmerge.__version__, run, model, split, list(tasks)]).encode()).hexdigest()[
            :32
        ]

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> CachedRow:
        return self._rows[key]

    def add(self, rows: Mapping[str, CachedRow]) -> None:
        """Add rows; they are on disk when this returns.

        Args:
            rows: Rows by key.
        """
        self._rows.update(rows)
        write_json_atomic(self.file, {key: _to_json(row) for key, row in self._rows.items()})

    def take(self, other: "RowCache") -> None:
        """Add the rows of another cache; they are on disk when this returns."""
        self.add(other._rows)


def _answers(value: Any, where: str) -> None:
    counts = record({"images": listed(count), "right": listed(count), "wrong": maybe(listed(listed(maybe(count), 3)))})
    record({}, dict.fromkeys(map(str, SETTINGS), counts))(value, where)


_SHARES = listed(maybe(share))
_ROWS = keyed(
    record(
        {**dict.fromkeys(map(str, SETTINGS), _SHARES), "merge_seconds": amount},
        {"confusion": _answers, ROUTING: _SHARES, "probes": keyed(record({"value": maybe(number), "n": anything}))},
    )
)


def _to_json(row: CachedRow) -> dict[str, Any]:
    agnostic, aware = (_nulls(row[s]) for s in SETTINGS)
    found = {"task_agnostic": agnostic, "task_aware": aware, "merge_seconds": row["merge_seconds"]}
    if "confusion" in row:
        found["confusion"] = {setting: one.to_dict() for setting, one in row["confusion"].items()}
    if "routing_accuracy" in row:
        found[ROUTING] = _nulls(row["routing_accuracy"])
    if "probes" in row:
        found["probes"] = {name: to_json(each.to_dict()) for name, each in row["probes"].items()}
    return found


def _nulls(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _from_json(row: Mapping[str, Any]) -> CachedRow:
    agnostic, aware = (_numbers(row[s]) for s in SETTINGS)
    found: CachedRow = {"task_agnostic": agnostic, "task_aware": aware, "merge_seconds": float(row["merge_seconds"])}
    if "confusion" in row:
        found["confusion"] = {s: Confusion.from_dict(row["confusion"][s]) for s in SETTINGS if s in row["confusion"]}
    if ROUTING in row:
        found["routing_accuracy"] = _numbers(row[ROUTING])
    if "probes" in row:
        found["probes"] = {name: Measured.from_dict(each) for name, each in row["probes"].items()}
    return found
