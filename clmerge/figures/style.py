"""The style of all pictures: colours, axes, tick labels and legends."""

from typing import Literal, TypeAlias

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from clmerge.figures.lettering import label
from clmerge.results.results import EXPERT, ZERO_SHOT, Results

MODEL_LENGTH = 40  # largest length of a model's name in legends and titles
DARK, GREY, LIGHT = "#222222", "#767676", "#E4E4E4"
# The palette of Okabe and Ito, distinguishable with any kind of colour blindness, and two more colours.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#8C6D31")
_MARKERS = "os^Dv<>P"
Dash: TypeAlias = Literal["-", "--", "-.", ":"]
_DASHES: tuple[Dash, ...] = ("-", "-.", ":")
_REFERENCES: dict[str, tuple[str, Dash, str]] = {
    EXPERT: (DARK, "-", "x"),
    ZERO_SHOT: (GREY, "--", "_"),
    "task_oracle": (GREY, ":", "s"),
    "ensemble": (GREY, ":", "^"),
    "joint": (GREY, ":", "D"),
}


def look(results: Results, model: str) -> tuple[str, Dash, str]:
    """Return colour, line style and marker of a model, the same in every picture of a run."""
    return look_at(results.mergers.index(model) if model in results.mergers else None, model)


def look_at(index: int | None, model: str) -> tuple[str, Dash, str]:
    """Return colour, line style and marker of the merger with an index, or of a reference, which has none."""
    if index is None:
        return _REFERENCES.get(model, (GREY, ":", "+"))
    # After eight mergers the colours repeat, with another line style.
    return _COLORS[index % 8], _DASHES[index // 8 % 3], _MARKERS[index % 8]


def add_legend(figure: Figure, results: Results, kind: Literal["lines", "bars", "dots"]) -> None:
    """Put one legend for all panels above them."""
    handles: list[Line2D | Rectangle] = []
    for model in results.models:
        color, dash, marker = look(results, model)
        name = label(model, MODEL_LENGTH)
        if kind == "bars":
            handles.append(Rectangle((0, 0), 1, 1, color=color, label=name))
        elif kind == "dots":
            handles.append(
                Line2D(
                    [],
                    [],
                    color=color,
                    linestyle="",
                    marker=marker,
                    markersize=6,
                    markeredgewidth=1.5,
                    label=name,
                )
            )
        else:
            handles.append(Line2D([], [], color=color, linestyle=dash, linewidth=1.8, label=name))
    # In inches: a handle with its gaps is 0.7 wide, a letter of 9 points about 0.08.
    widest = 0.7 + 0.08 * max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / widest)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def style_axes(panel: Axes, num_tasks: int) -> None:
    """Give axes the fixed percent range, ticks at whole tasks, a faint grid and no box."""
    panel.set_ylim(-2, 102)
    panel.set_yticks(range(0, 101, 25))
    panel.set_xlim(0.7, num_tasks + 0.3)
    step = 1 if num_tasks <= 10 else 5 if num_tasks <= 25 else 10
    panel.set_xticks([task for task in range(1, num_tasks + 1) if task == 1 or task % step == 0])
    panel.grid(axis="y", color=LIGHT, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8.5, color=GREY)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(GREY)


def label_tasks(panel: Axes, results: Results) -> None:
    """Label the horizontal axis with the tasks' names, slanted if long; with every fifth number if there are many."""
    names = [label(name, 18) for name in results.tasks]
    if results.num_tasks > 25:
        numbers = range(1, results.num_tasks + 1)
        names = [str(number) if number == 1 or number % 5 == 0 else "" for number in numbers]
    panel.set_xticks(range(results.num_tasks), names, fontsize=8.5 if results.num_tasks <= 10 else 7.5)
    if max(map(len, names)) > (7 if results.num_tasks <= 10 else 3):
        for tick in panel.get_xticklabels():
            tick.set(rotation=45, ha="right", rotation_mode="anchor")


def ink_on(background: tuple[float, float, float, float]) -> str:
    """Return black or white, whichever has the higher WCAG contrast with the background."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def darker(color: str) -> str:
    """Return a colour that is readable as small text on white."""
    red, green, blue = to_rgb(color)
    return to_hex((0.7 * red, 0.7 * green, 0.7 * blue))
