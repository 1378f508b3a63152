"""The looks of models and pages: one place for every colour, dash and marker, light and dark."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from matplotlib import colormaps
from matplotlib.colors import to_hex

from clmerge.results.results import EXPERT, ZERO_SHOT

INK, SOFT, LINE, CARD = "#1c1d1f", "#5d6166", "#e3e4e6", "#ffffff"
ALWAYS_WHITE = "#fefefe"  # one step from CARD, which is dark on a dark page
HEAT = colormaps["viridis"].with_extremes(bad=LINE)

Dash: TypeAlias = Literal["-", "--", ":"] | tuple[float, tuple[float, ...]]
# After the palette of Okabe and Ito, distinguishable with any kind of colour blindness: on white, and on a dark page.
_MERGERS = {
    "#0072b2": "#4da6e8",
    "#d55e00": "#ff8b45",
    "#009e73": "#2fc79a",
    "#b8568f": "#e58fc0",
    "#b97c00": "#f0b232",
    "#2f9bd6": "#86cdf7",
    "#7f3c8d": "#c58bd6",
    "#8c6d31": "#cfae6a",
}
_DARK = {INK: "#ececee", SOFT: "#a3a7ad", LINE: "#33363b", CARD: "#1c1e21", **_MERGERS}
_NAMES = dict(zip(_DARK, ("ink", "soft", "line", "card", *(f"c{index}" for index in range(8))), strict=True))
_DASHES: tuple[Dash, ...] = ("-", (0.0, (4.0, 1.0, 1.0, 1.0)), ":")


@dataclass(frozen=True)
class Look:
    """How a model looks in every chart.

    Attributes:
        color: Its colour on white.
        dash: Its line style, as Matplotlib has it.
        marker: Its marker, as Matplotlib names it.
        is_hollow: Whether its marker is an outline.
    """

    color: str
    dash: Dash
    marker: str
    is_hollow: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """Colour and marker as arguments of :class:`matplotlib.lines.Line2D`."""
        face, edge = (CARD, 1.4) if self.is_hollow else (self.color, 0.0)
        return {"color": self.color, "marker": self.marker, "markerfacecolor": face, "markeredgewidth": edge}


_REFERENCES = {
    EXPERT: Look(INK, "-", "o", is_hollow=True),
    ZERO_SHOT: Look(SOFT, "--", "o", is_hollow=True),
    "task_oracle": Look(SOFT, ":", "s"),
    "ensemble": Look(SOFT, ":", "^"),
    "joint": Look(SOFT, ":", "D"),
}


def look_of(model: str, index: int | None) -> Look:
    """Return the look of a model.

    Args:
        model: Its name in ``results.json``.
        index: Its position among the mergers; None for references.
    """
    if index is None:
        return _REFERENCES.get(model, Look(SOFT, ":", "P"))
    # After eight mergers the colours repeat, with another line style.
    return Look(list(_MERGERS)[index % 8], _DASHES[index // 8 % 3], "os^Dv<>P"[index % 8])


def css_color(color: str) -> str:
    """Return a colour for a page: a variable of :func:`css_variables` if it has a dark counterpart.

    Example:
        >>> css_color("#0072b2"), css_color("#fde725")
        ('var(--c0)', '#fde725')
    """
    return f"var(--{_NAMES[color]})" if color in _NAMES else color


def css_variables() -> str:
    """Return the colours as variables of a style sheet, for light and dark pages."""
    light = " ".join(f"--{name}: {color};" for color, name in _NAMES.items())
    dark = " ".join(f"--{name}: {_DARK[color]};" for color, name in _NAMES.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def css_gradient() -> str:
    """Return the colours of heatmaps as the background of an element, lowest at the left."""
    return f"linear-gradient(90deg, {', '.join(to_hex(HEAT(step / 8)) for step in range(9))})"


def ink_on(background: tuple[float, float, float, float]) -> str:
    """Return black or white, whichever has the higher WCAG contrast with the background."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else ALWAYS_WHITE
