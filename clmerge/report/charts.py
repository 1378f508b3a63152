"""The data of a chart, independent of its drawing: the page, the PNG and the CSV are made from the same object."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from clmerge.names import visible
from clmerge.report.study import Entry, Spread

# First characters of a formula in a spreadsheet, ASCII and full-width; control characters are escaped before.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")

Unit: TypeAlias = Literal["share", "bytes", "seconds", "number"]
"""A share is shown in percent."""


@dataclass(frozen=True)
class Line:
    """One line, or a cloud of dots.

    Attributes:
        entry: The entry that it belongs to, which determines name and look.
        points: Horizontal position and figure, in order.
        known_from: Points before this position are drawn thin: the task has not been learned yet.
        chosen: Indices of the chosen points, drawn larger.
        faint: Whether to draw it faintly, as one of many lines in the background.
    """

    entry: Entry
    points: Sequence[tuple[float, Spread]]
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
    """

    panels: Sequence[Panel]
    x_name: str
    y_name: str
    x_unit: Unit = "number"
    y_unit: Unit = "share"
    log_x: bool = False
    dots: bool = False

    @property
    def entries(self) -> list[Entry]:
        """All entries with a line, without repeats."""
        return list({line.entry.name: line.entry for panel in self.panels for line in panel.lines}.values())

    def to_csv(self) -> str:
        """Return all points with full precision; an undefined number is an empty field."""
        rows = [
            [panel.title, line.entry.name, *_exact(x), *numbers_of(spread)]
            for panel in self.panels
            for line in panel.lines
            for x, spread in line.points
        ]
        return to_csv(["panel", "model", self.x_name, self.y_name, "std", "runs"], rows)


@dataclass(frozen=True)
class Grid:
    """One heatmap.

    Attributes:
        title: Text above it.
        cells: Rows of figures; rows may be fewer than columns.
        note: Text below the title.
    """

    title: str
    cells: Sequence[Sequence[Spread]]
    note: str = ""


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
        shown: Number of grids that the page shows at once; the others are collapsed.
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

    def to_csv(self) -> str:
        """Return all cells with full precision; an undefined number is an empty field."""
        rows = [
            [grid.title, row_label, column_label, *numbers_of(spread)]
            for grid in self.grids
            for row_label, row in zip(self.rows, grid.cells, strict=False)
            for column_label, spread in zip(self.columns, row, strict=True)
        ]
        return to_csv(["panel", self.row_name, self.column_name, self.value_name, "std", "runs"], rows)


@dataclass(frozen=True)
class Figure:
    """A chart with its title and description.

    Attributes:
        name: Name of its files and its anchor.
        title: Heading.
        sentence: Description of the chart in one sentence.
        chart: The chart.
    """

    name: str
    title: str
    sentence: str
    chart: LineChart | HeatChart

    @property
    def lines(self) -> LineChart | None:
        """The chart, if it is a line chart."""
        return self.chart if isinstance(self.chart, LineChart) else None

    @property
    def heat(self) -> HeatChart | None:
        """The chart, if it consists of heatmaps."""
        return self.chart if isinstance(self.chart, HeatChart) else None


def numbers_of(spread: Spread) -> list[str]:
    """Return mean, standard deviation and number of runs as text that parses to the same numbers."""
    return [*_exact(spread.mean), *_exact(spread.std), str(len(spread.values))]


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
