"""Read a CSV or Parquet table with one image per row."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARQUET = (".parquet", ".pq")
_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        place: the row in messages, such as "line 7 of labels.csv".
        cells: text by column; None where the cell is empty.
    """

    place: str
    cells: Mapping[str, str | None]


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """Return the columns and rows of a table.

    Args:
        path: a Parquet file (``.parquet``, ``.pq``), or UTF-8 text whose first line names the columns, separated by
            commas, semicolons or tabs.

    Raises:
        RuntimeError: if there is no such file, it is not a table, or pyarrow is needed and missing.
    """
    if not path.is_file():
        raise RuntimeError(f"expected a CSV or Parquet table at {path.absolute()}, found no such file")
    names, rows = _parquet(path) if path.suffix.lower() in PARQUET else _csv(path)
    return names, list(rows)


def _csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        raise RuntimeError(f"expected a CSV table in UTF-8 at {path.absolute()}, got other bytes ({error})") from error
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(_DELIMITERS, key=header.count), strict=True)
    names = [name.strip() for name in next(reader, [])]
    if len(set(names)) < len(names):
        raise RuntimeError(f"expected different names of columns in line 1 of {path}, got {names}")
    return names, _csv_rows(path, names, reader)


def _csv_rows(path: Path, names: Sequence[str], reader: Any) -> Iterator[Row]:
    while True:
        place = f"line {reader.line_num + 1} of {path}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise RuntimeError(f"expected comma-separated values in {place}, got {error}") from error
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if len(cells) != len(names):
            raise RuntimeError(f"expected {len(names)} cells in {place}, as line 1 has, got {len(cells)}: {cells}")
        yield Row(place, {name: cell.strip() or None for name, cell in zip(names, cells, strict=True)})


def _parquet(path: Path) -> tuple[list[str], Iterator[Row]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise RuntimeError(
            f"expected pyarrow to read {path}, which is not installed: pip install 'clmerge[parquet]', or save the "
            "table as CSV"
        ) from error
    try:
        columns = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:
        raise RuntimeError(f"expected a Parquet table at {path.absolute()}, got {error}") from error
    rows = zip(*columns.values(), strict=True)
    names = list(columns)
    return names, (
        Row(f"row {number} of {path}", {name: _text(cell) for name, cell in zip(names, row, strict=True)})
        for number, row in enumerate(rows, start=1)
    )


def _text(cell: object) -> str | None:
    """Return a cell as a CSV table would have it; whole numbers become floats where pandas met an empty cell."""
    if isinstance(cell, float):
        if math.isnan(cell):
            return None
        cell = int(cell) if cell.is_integer() else cell
    return None if cell is None else str(cell).strip() or None
