"""Images listed in a table of paths and labels, with optional columns for their split and their domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import override

from clmerge.streams.class_names import readable
from clmerge.streams.decoding import UnreadableImageError
from clmerge.streams.files import FileImages
from clmerge.streams.source_groups import SourceGroup
from clmerge.streams.sources import DataSource, LabelledImages, Templates
from clmerge.streams.split_folders import Role, role_of, usual_names
from clmerge.streams.splits import check_test_fraction, stratified_cut
from clmerge.streams.table import Row, read_table

if TYPE_CHECKING:
    from PIL.Image import Image

_ROLES: tuple[Role, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class _Entry:
    """One image of a table; ``split`` is None if the table has no column for it."""

    place: str
    path: Path
    label: str
    split: Role | None


class TableImages(FileImages):
    """Images in files that a table names; messages say where.

    Args:
        paths: path of every image.
        targets: class id of every image.
        places: row of every image, such as "line 7 of labels.csv".
    """

    def __init__(self, paths: Sequence[Path], targets: Sequence[int], places: Sequence[str]) -> None:
        super().__init__(paths, targets)
        self.places = list(places)

    @override
    def image(self, index: int) -> Image:
        try:
            return super().image(index)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"{error} ({self.places[index]})") from error

    @override
    def select(self, indices: Sequence[int]) -> TableImages:
        chosen = super().select(indices)
        return TableImages(chosen.paths, chosen.targets, [self.places[index] for index in indices])


class TableSource(DataSource):
    """Images listed in a CSV or Parquet table: one row each, with a path, a label and, optionally, a split.

    Labels are words or whole numbers; class ids count them in order. A column ``split`` says ``train``, ``test`` or
    ``val`` of every image, in the usual spellings (``Training``, ``valid``, ``dev``); without one, the test images are
    cut from all by ``seed``. Parquet needs ``pip install 'clmerge[parquet]'``.

    Args:
        table: the table. CSV is UTF-8 text whose first line names the columns, separated by commas, semicolons or tabs.
        root: folder that the paths are relative to (default: the folder of the table).
        name: name of the data set, which selects its prompt templates (default: the name of the table).
        names: class names in the order of class ids (default: the labels).
        path_column: column of the paths.
        label_column: column of the labels.
        split_column: column of the splits; the default need not be there.
        test_fraction: share of each class held out as the test split if the table has no splits.
        seed: seed of that cut.
        templates: prompt templates, or the name of the data set whose templates to use, "generic" for the
            plain one (default: those of the data set called ``name``).

    Raises:
        ValueError: if ``test_fraction`` is out of range.
        RuntimeError: if the table is missing or not as described (when it is first needed); the message names the row.
    """

    def __init__(
        self,
        table: str | Path,
        *,
        root: str | Path | None = None,
        name: str | None = None,
        names: list[str] | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str | None = None,
        test_fraction: float = 0.2,
        seed: int = 0,
        templates: Templates = None,
    ) -> None:
        self.table = Path(table).expanduser()
        super().__init__(name or self.table.stem, templates=templates)
        check_test_fraction(test_fraction)
        self.root = self.table.parent if root is None else Path(root).expanduser()
        self.path_column = path_column
        self.label_column = label_column
        self.split_column = split_column
        self.test_fraction = test_fraction
        self.seed = seed
        self._names = names

        self._whole: TableSource | None = None
        self._rows: list[Row] = []

    @cached_property
    def content(self) -> tuple[list[str], list[Row]]:
        """The columns and the rows."""
        return read_table(self.table) if self._whole is None else (self._whole.content[0], self._rows)

    def part(self, name: str, rows: list[Row]) -> TableSource:
        """Return a source of some of the rows, with the classes that occur in them.

        Args:
            name: name of the source.
            rows: the rows, some of ``content``.
        """
        templates = self._templates
        part = TableSource(
            self.table,
            root=self.root,
            name=name,
            path_column=self.path_column,
            label_column=self.label_column,
            split_column=self.split_column,
            test_fraction=self.test_fraction,
            seed=self.seed,
            templates=self.name if templates is None and not self.has_plain_templates else templates,
        )
        part._whole, part._rows = self, rows
        return part

    @property
    @override
    def class_names(self) -> list[str]:
        return [self._readable[label] for label in self._labels]

    @cached_property
    def _readable(self) -> dict[str, str]:
        """Class names by label."""
        if self._whole is not None:
            return self._whole._readable
        labels, names = self._labels, self._names
        if names is not None and len(names) != len(labels):
            raise RuntimeError(
                f"expected names for the {len(labels)} labels of {self.table}, which are {_some(labels)}, got "
                f"{len(names)} names"
            )
        return dict(zip(labels, names or map(readable, labels), strict=True))

    @cached_property
    def _labels(self) -> list[str]:
        """The labels by class id: whole numbers by value, words by the alphabet."""
        labels = {entry.label for entry in self._entries}
        numbers = all(label.isdecimal() for label in labels)
        return sorted(labels, key=int) if numbers else sorted(labels)

    @cached_property
    def _entries(self) -> list[_Entry]:
        columns, rows = self.content
        require_column(columns, self.path_column, "path_column", self.table)
        require_column(columns, self.label_column, "label_column", self.table)
        split_column = self.split_column or "split"
        if self.split_column is not None:
            require_column(columns, split_column, "split_column", self.table)
        seen: dict[str, str] = {}
        entries = []
        for row in rows:
            path = required_cell(row, self.path_column)
            if seen.setdefault(path, row.place) != row.place:
                raise RuntimeError(f"expected every image once, got {path!r} in {row.place} and in {seen[path]}")
            split = _split(row, split_column) if split_column in columns else None
            entries.append(_Entry(row.place, self.root / path, required_cell(row, self.label_column), split))
        if not entries:
            raise RuntimeError(f"expected rows with images in {self.table.absolute()}, found none")
        if not any(entry.path.is_file() for entry in entries):
            first = entries[0]
            raise RuntimeError(
                f"expected an image at {first.path.absolute()}, as {first.place} says, found no such file, nor any "
                f"other of the {len(entries)} there: set root to the folder that the paths are relative to"
            )
        return entries

    @cached_property
    def _splits(self) -> dict[Role, TableImages]:
        """The images of every split that has some."""
        entries = self._entries
        ids = {label: class_id for class_id, label in enumerate(self._labels)}
        targets = [ids[entry.label] for entry in entries]
        images = TableImages([entry.path for entry in entries], targets, [entry.place for entry in entries])
        if entries[0].split is None:
            train, test = stratified_cut(targets, self.test_fraction, seed=self.seed)
            return {"train": images.select(train), "test": images.select(test)}
        places = {role: [i for i, entry in enumerate(entries) if entry.split == role] for role in _ROLES}
        for role in ("train", "test"):
            if not places[role]:
                found = ", ".join(f"{len(found)} {role}" for role, found in places.items() if found)
                raise RuntimeError(
                    f"expected {role!r} rows in {self.table.absolute()}, got {found}: leave the column of splits out "
                    "to cut the test images from all"
                )
        return {role: images.select(indices) for role, indices in places.items() if indices}

    @override
    def _load(self, split: str) -> LabelledImages:
        return self._splits["train" if split == "train" else "test"]

    @override
    def _load_validation(self) -> LabelledImages | None:
        return self._splits.get("val")


class TableDomains(SourceGroup):
    """The domains, or tasks, of a table: one source for every value of a column, for example of ``domain``.

    With ``DomainIncremental`` classes of one name are one class; with ``TaskIncremental`` every task has its own.

    Args:
        source: the table.
        domain_column: column of the domain or task of every image.
        domains: the domains in order (default: as they first occur). Rows of others are left out.
    """

    def __init__(self, source: TableSource, *, domain_column: str = "domain", domains: list[str] | None = None) -> None:
        self.source = source
        self.domain_column = domain_column
        self.domains = domains

    @override
    def sources(self) -> list[DataSource]:
        table = self.source.table
        columns, rows = self.source.content
        require_column(columns, self.domain_column, "domain_column", table)
        by_domain: dict[str, list[Row]] = {}
        for row in rows:
            by_domain.setdefault(required_cell(row, self.domain_column), []).append(row)
        if missing := [domain for domain in self.domains or () if domain not in by_domain]:
            raise RuntimeError(
                f"expected rows of domain {missing[0]!r} in column {self.domain_column!r} of {table.absolute()}, "
                f"found {_some(list(by_domain))}"
            )
        return [self.source.part(domain, by_domain[domain]) for domain in self.domains or by_domain]


def require_column(columns: Sequence[str], name: str, option: str, table: Path) -> None:
    """Raise a RuntimeError unless a table has a column."""
    if name not in columns:
        raise RuntimeError(
            f"expected a column {name!r} in {table.absolute()}, found {list(columns)}: name the one to use with "
            f"{option}"
        )


def required_cell(row: Row, column: str) -> str:
    """Return the text of a cell, or raise a RuntimeError if it is empty."""
    if (text := row.cells[column]) is None:
        raise RuntimeError(f"expected a {column} in {row.place}, got an empty cell")
    return text


def _split(row: Row, column: str) -> Role:
    text = required_cell(row, column)
    if (role := role_of(text)) is None:
        raise RuntimeError(f"expected a split in {row.place}, one of {', '.join(usual_names())}, got {text!r}")
    return role


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (" ..." if len(names) > 10 else "")
