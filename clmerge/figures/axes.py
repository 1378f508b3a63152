"""Axes with their names and tick labels, in sizes of pixels: 72 to the inch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clmerge.figures.lettering import label
from clmerge.figures.looks import SOFT

SIZE = 11  # of letters
LETTER = 6.6  # mean width of a letter
LONGEST = 14  # letters of a tick label


@dataclass(frozen=True)
class Frame:
    """Size of a panel in pixels, and its margins, which hold the names and tick labels of its axes."""

    width: float
    height: float
    left: float
    below: float
    above: float = 10
    right: float = 14

    def axes(self, figure: Figure, x: float = 0, below: float = 0) -> Axes:
        """Add axes to a figure, in a panel at a distance in pixels from its left and lower end."""
        width, height = figure.get_size_inches() * 72
        inner = (self.width - self.left - self.right) / width, (self.height - self.below - self.above) / height
        return figure.add_axes(((x + self.left) / width, (below + self.below) / height, *inner))


def name_axes(axes: Axes, across: str, up: str) -> None:
    """Name both axes, and set the sizes and colours of their labels."""
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SIZE, labelcolor=SOFT, pad=6)
    axes.set_xlabel(across, fontsize=SIZE, color=SOFT, labelpad=6)
    axes.set_ylabel(up, fontsize=SIZE, color=SOFT, labelpad=6)


def name_columns(axes: Axes, names: Sequence[str], start: float, *, on_page: bool) -> None:
    """Write names below the horizontal axis, slanted if they are wider than their room, some if there are too many.

    Args:
        axes: The axes.
        names: One name for each position.
        start: Position of the first name; the others are one apart.
        on_page: Whether they are for a page.
    """
    room = axes.bbox.width / len(names)
    step = named_step(room)
    texts = [label(name, LONGEST, on_page=on_page) for name in names[::step]]
    axes.set_xticks([start + index for index in range(len(names))][::step], texts)
    if slant(names, room):
        for tick in axes.get_xticklabels():
            tick.set(rotation=45, ha="right", rotation_mode="anchor")


def named_step(room: float) -> int:
    """Return which of many names are written, the first and every so many, if each has so many pixels.

    Example:
        >>> named_step(20), named_step(6), named_step(1.5)
        (1, 5, 8)
    """
    return 1 if room >= 12 else max(5, math.ceil(12 / room))


def slant(names: Sequence[str], room: float) -> float:
    """Return how much higher names are when they are slanted because they are wider than their room, else 0."""
    return 0.75 * widest(names) if widest(names) > room else 0.0


def widest(names: Sequence[str]) -> float:
    """Return the width of the widest name in pixels."""
    return LETTER * min(LONGEST, max(map(len, names), default=0))
