"""The figures of a report: charts with their titles, made of the figures and models of a study."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clmerge.figures.charts import Chart, Line, Value
from clmerge.figures.looks import Look, look_of
from clmerge.report.study import UNDEFINED, Entry, Spread

_UNDEFINED = Value(math.nan)


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
    chart: Chart


def value_of(spread: Spread) -> Value:
    """Return a figure over runs as a value of a chart."""
    return Value(spread.mean, spread.std, len(spread.values))


def values_of(rows: Sequence[Sequence[Spread]]) -> list[list[Value]]:
    """Return rows of figures as rows of values."""
    return [[_UNDEFINED if spread is UNDEFINED else value_of(spread) for spread in row] for row in rows]


def line_of(entry: Entry, points: Sequence[tuple[float, Spread]], **options: Any) -> Line:
    """Return the line of an entry through figures; options are those of :class:`clmerge.figures.charts.Line`."""
    return Line(entry.name, look(entry), [(x, value_of(spread)) for x, spread in points], **options)


def look(entry: Entry) -> Look:
    """Return how an entry looks."""
    return look_of(entry.model, entry.look)
