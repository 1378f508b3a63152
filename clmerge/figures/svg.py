"""Write Matplotlib figures as SVG inside a page: text as text, colours that the page sets for light and dark, tips.

Matplotlib's own SVG files hold fonts, identifiers and styles for a page of their own, and are several times as large.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from markupsafe import Markup, escape
from matplotlib.backend_bases import GraphicsContextBase, RendererBase
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Affine2D, Transform
from matplotlib.typing import ColorType
from typing_extensions import override

from clmerge.figures.axes import LETTER, SIZE
from clmerge.figures.looks import css_color
from clmerge.names import visible

CELLS = "cells"  # the kind of marks whose tips are those of areas
_ANCHORS = {"center": "middle", "right": "end"}
_COMMANDS = {int(Path.MOVETO): "M", int(Path.LINETO): "L", int(Path.CURVE3): "Q", int(Path.CURVE4): "C"}


@dataclass(frozen=True)
class Mark:
    """What a page knows about the shapes of some artists.

    Attributes:
        kind: Their class in the style sheet.
        tips: Texts for their dots, or for their areas if their kind is ``CELLS``, in the order of drawing.
        entry: The model that they belong to; empty if to none.
    """

    kind: str
    tips: Iterator[str]
    entry: str = ""


Marks: TypeAlias = dict[str, Mark]
"""What is known about artists, by :meth:`matplotlib.artist.Artist.get_gid`."""


def to_svg(figure: Figure, marks: Marks, *, kind: str, label: str = "") -> Markup:
    """Draw a figure as an element of a page, one pixel to the point.

    Args:
        figure: The figure.
        marks: What is known about its artists.
        kind: Its class in the style sheet.
        label: What it shows, for readers who do not see it; empty for ornaments.
    """
    width, height = (float(inches) * 72 for inches in figure.get_size_inches())
    renderer = _Renderer(marks, width, height)
    figure.draw(renderer)
    about = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    box = f"0 0 {_short(width)} {_short(height)}"
    return _element("svg", renderer.content(), {"viewBox": box, "class": kind, "width": _short(width), **about})


class _Renderer(RendererBase):
    """Collects what Matplotlib draws as elements of SVG."""

    def __init__(self, marks: Marks, width: float, height: float) -> None:
        super().__init__()
        self._marks = marks
        self._size = width, height
        self._flip = Affine2D().scale(1, -1).translate(0, height)
        self._open: list[str | None] = []  # the identifiers of the artists that are being drawn
        self._groups: list[tuple[Mark | None, list[Markup]]] = []

    def content(self) -> Markup:
        """Return what was drawn, consecutive shapes of one mark in one group."""
        groups = [(mark, Markup("").join(shapes)) for mark, shapes in self._groups]
        drawn = [
            _element("g", shapes, {"class": mark.kind, "data-entry": mark.entry}) if mark else shapes
            for mark, shapes in groups
        ]
        return Markup("").join(drawn)

    @override
    def open_group(self, s: str, gid: str | None = None) -> None:
        self._open.append(gid)

    @override
    def close_group(self, s: str) -> None:
        self._open.pop()

    @override
    def get_canvas_width_height(self) -> tuple[float, float]:
        return self._size

    @override
    def get_text_width_height_descent(
        self, s: str, prop: FontProperties, ismath: bool | Literal["TeX"]
    ) -> tuple[float, float, float]:
        # The reader's font is not known. A digit is about 0.73 of its font's size high, and begins at the base line.
        size = prop.get_size_in_points()
        return LETTER / SIZE * size * len(s), 0.73 * size, 0.0

    @override
    def draw_path(
        self, gc: GraphicsContextBase, path: Path, transform: Transform, rgbFace: ColorType | None = None
    ) -> None:
        mark = self._mark()
        tip = next(mark.tips) if mark and mark.kind == CELLS else ""
        self._add(mark, "path", {"d": _data(path, transform + self._flip), **_style(gc, rgbFace), "data-tip": tip})

    @override
    def draw_markers(
        self,
        gc: GraphicsContextBase,
        marker_path: Path,
        marker_trans: Transform,
        path: Path,
        trans: Transform,
        rgbFace: ColorType | None = None,
    ) -> None:
        mark, style = self._mark(), _style(gc, rgbFace)
        is_circle = marker_path is Path.unit_circle()
        radius = float(marker_trans.transform((1, 0))[0])
        data = "" if is_circle else _data(marker_path, marker_trans + Affine2D().scale(1, -1))
        for vertices, _ in path.iter_segments(trans + self._flip, simplify=False):
            x, y = map(_short, vertices[-2:])
            shape = (
                {"cx": x, "cy": y, "r": _short(radius)}
                if is_circle
                else {"d": data, "transform": f"translate({x} {y})"}
            )
            tip = next(mark.tips, "") if mark else ""
            self._add(mark, "circle" if is_circle else "path", {**shape, "class": "dot", **style, "data-tip": tip})

    @override
    def draw_text(
        self,
        gc: GraphicsContextBase,
        x: float,
        y: float,
        s: str,
        prop: FontProperties,
        angle: float,
        ismath: bool | Literal["TeX"] = False,
        mtext: Text | None = None,
    ) -> None:
        anchor = None
        if mtext is not None and (angle == 0 or mtext.get_rotation_mode() == "anchor"):
            # Matplotlib has placed the left end, by a font that is not the reader's: keep its line, take the anchor.
            anchor = _ANCHORS.get(str(mtext.get_horizontalalignment()))
            wanted = self._flip.transform(mtext.get_transform().transform(mtext.get_unitless_position()))
            across = np.array([np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))])
            x, y = wanted + ((x, y) - wanted) @ across * across
        place = {"x": _short(x), "y": _short(y)}
        if angle:
            place["transform"] = f"rotate({_short(-angle)} {_short(x)} {_short(y)})"
        size = prop.get_size_in_points()
        look = {"font-size": "" if size == SIZE else f"{size:g}", "fill": css_color(to_hex(gc.get_rgb()[:3]))}
        self._add(self._mark(), "text", {**place, "text-anchor": anchor, **look}, s)

    def _mark(self) -> Mark | None:
        return next((self._marks[gid] for gid in reversed(self._open) if gid is not None), None)

    def _add(self, mark: Mark | None, name: str, attributes: Mapping[str, str | None], content: str = "") -> None:
        if not self._groups or self._groups[-1][0] is not mark:
            self._groups.append((mark, []))
        self._groups[-1][1].append(_element(name, escape(visible(content)), attributes))


def _style(gc: GraphicsContextBase, face: ColorType | None) -> dict[str, str]:
    """Return colours, width, dashes and opacity of a shape as attributes."""
    style = {"fill": "none" if face is None else css_color(to_hex(face))}
    if face is not None and (strength := to_rgba(face)[3]) < 1:
        style["fill-opacity"] = f"{strength:.2g}"
    if gc.get_linewidth() > 0:
        edge = to_rgba(gc.get_rgb())
        style |= {"stroke": css_color(to_hex(edge)), "stroke-width": f"{gc.get_linewidth():g}"}
        if edge[3] < 1:
            style["stroke-opacity"] = f"{edge[3]:.2g}"
        if (dashes := gc.get_dashes()[1]) is not None:
            style["stroke-dasharray"] = " ".join(_short(length) for length in np.asarray(dashes, dtype=float))
    return style


def _data(path: Path, transform: Transform) -> str:
    """Return the commands of a path; lines along an axis name the coordinate that changes."""
    text, at = "", ("", "")
    for vertices, code in path.iter_segments(transform, simplify=False):
        if code == Path.CLOSEPOLY:
            text += "z"
            continue
        numbers = [_short(value) for value in vertices]
        to = (numbers[-2], numbers[-1])
        if code == Path.LINETO and to[1] == at[1]:
            text += f"H{to[0]}"
        elif code == Path.LINETO and to[0] == at[0]:
            text += f"V{to[1]}"
        else:
            text += _COMMANDS[int(code)] + " ".join(numbers)
        at = to
    return text


def _short(value: float) -> str:
    """Return a number with one decimal, or none if that is zero."""
    return f"{value + 0.0:.1f}".removesuffix(".0")


def _element(name: str, content: Markup, attributes: Mapping[str, str | None]) -> Markup:
    given = "".join(f' {key}="{escape(visible(value))}"' for key, value in attributes.items() if value)
    return Markup(f"<{name}{given}>{content}</{name}>")
