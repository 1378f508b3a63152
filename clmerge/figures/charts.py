"""Charts as data: what is drawn on pages and into pictures, and written as CSV."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from clmerge.figures.looks import Look
from clmerge.figures.numbers import Unit, plural, show
from clmerge.names import visible

# First characters of a formula in a spreadsheet, ASCII and full-width; control characters are escaped before.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


class Value(NamedTuple):
    """A number, or the mean of several runs.

    Attributes:
        mean: The number, NaN where undefined.
        std: Its standard deviation over the runs, NaN for one run.
        runs: Number of runs.
    """

    mean: float
    std: float = math.nan
    runs: int = 1

    @property
    def is_defined(self) -> bool:
        """Whether it is a number."""
        return not math.isnan(self.mean)

    def tip(self, unit: Unit) -> str:
        """Return it for readers, with two decimals of percentages and the number of runs if several."""
        return show(self.mean, unit, std=self.std, digits=2 if unit == "share" else 1) + (
            f" ({plural(self.runs, 'run')})" if self.runs > 1 else ""
        )


@dataclass(frozen=True)
class Line:
    """One line, or a cloud of dots.

    Attributes:
        name: The model that it belongs to.
        look: How it looks.
        points: Horizontal position and value, in order.
        known_from: Points before this position are drawn thin: the task has not been learned yet.
        chosen: Indices of the chosen points, drawn larger.
        faint: Whether to draw it faintly, as one of many lines in the background.
    """

    name: str
    look: Look
    points: Sequence[tuple[float, Value]]
    known_from: float = -math.inf
    chosen: Sequence[int] = ()
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its lines.

    Attributes:
        title: Text above it.
        lines: The first one is drawn on top.
        rule: Position of a vertical line.
        y_range: Fixed range; default the range of the lines.
    """

    title: str
    lines: Sequence[Line]
    rule: float | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class LineChart:
    """Panels that share the meaning of their axes.

    Attributes:
        panels: In reading order.
        x_name: Name of the horizontal axis; also a column of the CSV.
        y_name: Name of the vertical axis.
        x_unit: Unit of the horizontal axis; tasks and scales are plain numbers.
        y_unit: Unit of the vertical axis.
        log_x: Logarithmic horizontal axis.
        dots: Draw dots only.
        x_labels: Texts for the positions 1, 2, ... instead of numbers.
        shows_last: Write every line's last value into the legend.
    """

    panels: Sequence[Panel]
    x_name: str
    y_name: str
    x_unit: Unit = "number"
    y_unit: Unit = "share"
    log_x: bool = False
    dots: bool = False
    x_labels: Sequence[str] = ()
    shows_last: bool = False

    @property
    def models(self) -> list[Line]:
        """The first line of every model."""
        return list({line.name: line for panel in reversed(self.panels) for line in panel.lines}.values())

    def tip(self, line: Line, index: int) -> str:
        """Describe one point."""
        x, value = line.points[index]
        chosen = ", chosen" if index in line.chosen else ""
        return f"{line.name}, {self.x_name} {show(x, self.x_unit)}: {value.tip(self.y_unit)}{chosen}"

    def to_csv(self) -> str:
        """Return all points with full precision; an undefined number is an empty field."""
        rows = [
            [panel.title, line.name, *_exact(x), *numbers_of(value)]
            for panel in self.panels
            for line in panel.lines
            for x, value in line.points
        ]
        return to_csv(["panel", "model", self.x_name, self.y_name, "std", "runs"], rows)


@dataclass(frozen=True)
class Grid:
    """One heatmap.

    Attributes:
        title: Text above it.
        cells: Rows of values; rows may be fewer than columns.
    """

    title: str
    cells: Sequence[Sequence[Value]]


@dataclass(frozen=True)
class HeatChart:
    """Heatmaps with one colour scale.

    Attributes:
        grids: In reading order.
        row_name: Name of the vertical axis.
        column_name: Name of the horizontal axis.
        rows: Labels of the rows.
        columns: Labels of the columns.
        value_name: Name of the coloured value; also a column of the CSV.
        value_range: Ends of the colour scale.
        unit: Unit of the values.
        diagonal: Outline the cells on the diagonal.
        shown: Number of grids that a page shows at once; the others are collapsed.
    """

    grids: Sequence[Grid]
    row_name: str
    column_name: str
    rows: Sequence[str]
    columns: Sequence[str]
    value_name: str = "accuracy"
    value_range: tuple[float, float] = (0.0, 1.0)
    unit: Unit = "share"
    diagonal: bool = True
    shown: int = 4

    def tip(self, grid: Grid, row: int, column: int) -> str:
        """Describe one cell."""
        title = f"{grid.title}, " if grid.title else ""
        where = f"{self.row_name} {self.rows[row]}, {self.column_name} {self.columns[column]}"
        return f"{title}{where}: {grid.cells[row][column].tip(self.unit)}"

    def thinned(self, most: int) -> "HeatChart":
        """Return the chart with so many rows and columns at most, evenly spaced, of the rows that have numbers.

        A chart that has no more is returned as it is.
        """
        if max(len(self.rows), len(self.columns)) <= most:
            return self
        known = known_rows([grid.cells for grid in self.grids]) or [*range(len(self.rows))]
        rows, columns = (some[:: math.ceil(len(some) / most)] for some in (known, range(len(self.columns))))
        grids = [
            Grid(grid.title, [[grid.cells[row][column] for column in columns] for row in rows if row < len(grid.cells)])
            for grid in self.grids
        ]
        return replace(
            self,
            grids=grids,
            rows=[self.rows[row] for row in rows],
            columns=[self.columns[column] for column in columns],
            diagonal=False,
        )

    def to_csv(self) -> str:
        """Return all cells with full precision; an undefined number is an empty field.

        Rows in which no grid has a number are left out: of a long stream, moments at which it was not evaluated.
        """
        known = set(known_rows([grid.cells for grid in self.grids]))
        rows = [
            [grid.title, self.rows[index], column_label, *numbers_of(value)]
            for grid in self.grids
            for index, row in enumerate(grid.cells[: len(self.rows)])
            if index in known
            for column_label, value in zip(self.columns, row, strict=True)
        ]
        return to_csv(["panel", self.row_name, self.column_name, self.value_name, "std", "runs"], rows)


Chart: TypeAlias = LineChart | HeatChart


def known_rows(matrices: Sequence[Sequence[Sequence[Value]]]) -> list[int]:
    """Return the indices of the rows in which some matrix has a number."""
    rows = range(max(map(len, matrices), default=0))
    return [
        index
        for index in rows
        if any(value.is_defined for matrix in matrices for value in (matrix[index] if index < len(matrix) else ()))
    ]


def numbers_of(value: Value) -> list[str]:
    """Return mean, standard deviation and number of runs as text that parses to the same numbers."""
    return [*_exact(value.mean), *_exact(value.std), str(value.runs)]


def _exact(value: float) -> list[str]:
    if math.isnan(value):
        return [""]
    return [str(int(value)) if float(value).is_integer() else repr(float(value))]


def to_csv(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""Return rows as CSV text in which spreadsheets recognise no formula.

    Text that begins like a formula gets an apostrophe before it, with which spreadsheets mark text; numbers stay
    unchanged.

    Example:
        >>> to_csv(["a", "b"], [["=1+1", "-0.5"]])
        "a,b\n'=1+1,-0.5\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_harmless(cell) for cell in row] for row in (heading, *rows))
    return text.getvalue()


def _harmless(cell: str) -> str:
    cell = visible(cell)
    return f"'{cell}" if cell.startswith(_FORMULA) and not _NUMBER.fullmatch(cell) else cell
