"""Read back the .wandb file of an offline run.

The format: a 7-byte header (magic, version), then 32 KiB blocks of records, each with checksum, length and
type. A record longer than what is left of its block is cut into a first, any number of middle, and a last
part.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a .wandb file, checksums verified."""
    data = path.read_bytes()
    if not data:
        return
    assert struct.unpack_from("<4sHB", data) == (b":W&B", 0xBEE1, 0)
    position, parts = 7, []
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:  # too little for a header: padding
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:  # still being written
            return
        assert zlib.crc32(chunk, zlib.crc32(bytes([kind]))) == checksum, f"damaged record at {position}"
        position += 7 + length
        parts = [chunk] if kind in (FULL, FIRST) else [*parts, chunk]
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class OfflineRun:
    """What an offline run holds: metric definitions, history, summary, config, artifacts, whether it was finished."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("run-*.wandb")
        self.folder = folder
        self.metrics: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.run: Any = None
        self.artifacts: list[Any] = []
        self.finished = False
        for record in read_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "metric":
                name = record.metric.name or record.metric.glob_name
                self.metrics[name] = record.metric
            elif kind == "history":
                self.history.append(_values(record.history.item))
            elif kind == "summary":
                self.summary.update(_values(record.summary.update))
            elif kind == "run":
                self.run = record.run
                self.config.update(_values(record.run.config.update))
            elif kind == "config":
                self.config.update(_values(record.config.update))
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.finished = True

    def step_metric(self, name: str) -> str:
        """Name of the x-axis of a metric."""
        return str(self.metrics[name].step_metric)

    def rows(self, name: str, axis: str = "cl/task") -> list[tuple[Any, Any]]:
        """``(axis, value)`` of every history row that has the metric."""
        return [(row.get(axis), row[name]) for row in self.history if name in row]


def find_runs(folder: Path, timeout: float = 30.0) -> list[OfflineRun]:
    """All offline runs below a folder, oldest first.

    W&B's background process can still be writing when ``finish`` returns, so unfinished runs are waited for.
    """
    deadline = time.monotonic() + timeout
    while True:
        runs = [OfflineRun(path) for path in sorted(folder.glob("**/wandb/offline-run-*"))]
        if all(run.finished for run in runs) or time.monotonic() > deadline:
            return runs
        time.sleep(0.05)
