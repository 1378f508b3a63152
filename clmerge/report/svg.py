"""Draw charts as SVG: shapes with classes, so that the page's style sheet sets colours for light and dark."""

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from clmerge.names import visible
from clmerge.report.charts import Line, LineChart, Panel
from clmerge.report.scales import Scale, scale_of, ticks
from clmerge.report.study import EXPERT, ZERO_SHOT, Entry
from clmerge.report.text import of_runs, percent, show, show_spread

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 42
_MARKERS: tuple[Callable[[float], str], ...] = (
    lambda r: f"M{-r} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0",  # circle
    lambda r: f"M{-r} {-r}h{2 * r}v{2 * r}h{-2 * r}z",  # square
    lambda r: f"M0 {-1.3 * r:g}L{1.2 * r:g} {r}H{-1.2 * r:g}z",  # triangle up
    lambda r: f"M0 {-1.4 * r:g}L{1.4 * r:g} 0L0 {1.4 * r:g}L{-1.4 * r:g} 0z",  # diamond
    lambda r: f"M0 {1.3 * r:g}L{1.2 * r:g} {-r}H{-1.2 * r:g}z",  # triangle down
    lambda r: f"M{-1.3 * r:g} 0L{r} {-1.2 * r:g}V{1.2 * r:g}z",  # triangle left
    lambda r: f"M{1.3 * r:g} 0L{-r} {-1.2 * r:g}V{1.2 * r:g}z",  # triangle right
    lambda r: (
        f"M{-r} {-r / 3:g}H{-r / 3:g}V{-r}H{r / 3:g}V{-r / 3:g}H{r}V{r / 3:g}H{r / 3:g}V{r}H{-r / 3:g}V{r / 3:g}H{-r}z"
    ),
)

_REFERENCE_MARKERS = {"task_oracle": 1, "ensemble": 2, "joint": 3}


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element; children and values that are not markup are escaped.

    Args:
        name: Name of the element.
        children: Text or markup.
        attributes: Values by name; an underscore stands for a hyphen, None leaves the attribute out.

    Example:
        >>> str(tag("text", "a < b", class_="x", font_size=3))
        '<text class="x" font-size="3">a &lt; b</text>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(legible(short(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(escape(legible(child)) for child in children)}</{name}>")


def legible(value: object) -> object:
    """Return text with control characters and marks that change the direction of writing as escapes.

    Markup and values that are not text are returned unchanged.
    """
    return visible(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def draw_panel(chart: LineChart, panel: Panel) -> Markup:
    """Draw one panel of a line chart."""
    across = scale_of(_positions(panel), (LEFT, WIDTH - RIGHT), log=chart.log_x, pad=0.04 if chart.log_x else 0.02)
    up = scale_of(_heights(panel), (HEIGHT - BOTTOM, TOP), fixed=panel.y_range, pad=0.06, zero=chart.y_unit != "share")
    content = [*_axes(chart, across, up)]
    if panel.rule is not None:
        content.append(_path(f"M{across(panel.rule):.1f} {TOP}V{HEIGHT - BOTTOM}", class_="rule"))
    content += [_draw_line(chart, line, across, up) for line in reversed(panel.lines)]
    label = f"{panel.title or chart.y_name}: {chart.y_name} against {chart.x_name}"
    return tag("svg", *content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart")


def draw_strip(values: Sequence[float], best: float) -> Markup:
    """Draw the position of one number among all mergers' numbers, for a tile."""
    known = [value for value in values if not math.isnan(value)]
    across = scale_of(known, (6, 194), pad=0.0)
    dots = [tag("circle", cx=across(value), cy=8, r=3, class_="other") for value in known if value != best]
    main = [tag("circle", cx=across(best), cy=8, r=5, class_="best")] if not math.isnan(best) else []
    return tag(
        "svg", _path("M2 8H198", class_="grid"), *dots, *main, viewBox="0 0 200 16", class_="strip", aria_hidden="true"
    )


def key(entry: Entry) -> Markup:
    """Draw the sample line of an entry for a legend."""
    line = _path("M1 8H27", class_="stroke")
    return tag(
        "svg", line, _marker(entry, 14, 8, 3.5), viewBox="0 0 28 16", class_=f"key {look(entry)}", aria_hidden="true"
    )


def look(entry: Entry) -> str:
    """Return the CSS classes for the colour and dashes of a line."""
    if entry.look is None:
        return {EXPERT: "expert", ZERO_SHOT: "zero"}.get(entry.model, "reference")
    return f"c{entry.look % 8} d{entry.look // 8 % 3}"


def _axes(chart: LineChart, across: Scale, up: Scale) -> Iterable[Markup]:
    for value in ticks(up, 5):
        y = up(value)
        yield _path(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}", class_="grid")
        text = (
            percent(value, 0 if up.high - up.low > 0.04 else 1)
            if chart.y_unit == "share"
            else show(value, chart.y_unit)
        )
        yield tag("text", text, x=LEFT - 6, y=y, class_="tick end middle")
    room = LEFT - 22.0
    for value in ticks(across, 6, whole=chart.x_name in ("after task", "order")):
        if across(value) >= room:
            text = show(value, chart.x_unit)
            yield tag("text", text, x=across(value), y=HEIGHT - BOTTOM + 16, class_="tick centre")
            room = across(value) + 6.5 * len(text) + 6
    yield _path(f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="baseline")
    yield tag("text", chart.x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, class_="axis centre")
    y, unit = (TOP + HEIGHT - BOTTOM) / 2, " in %" if chart.y_unit == "share" else ""
    turn = f"rotate(-90 11 {short(y)})"
    yield tag("text", chart.y_name + unit, x=11, y=y, transform=turn, class_="axis centre")


def _draw_line(chart: LineChart, line: Line, across: Scale, up: Scale) -> Markup:
    known = [(x, spread) for x, spread in line.points if spread.is_defined]
    parts: list[Markup] = []
    if not chart.dots:
        band = [(x, s) for x, s in known if not math.isnan(s.std) and x >= line.known_from]
        if len(band) > 1 and not line.faint:
            above = [f"{across(x):.1f} {up(min(s.mean + s.std, up.high)):.1f}" for x, s in band]
            below = [f"{across(x):.1f} {up(max(s.mean - s.std, up.low)):.1f}" for x, s in reversed(band)]
            parts.append(_path(f"M{'L'.join(above + below)}z", class_="band"))
        before = [point for point in known if point[0] <= line.known_from]
        after = [point for point in known if point[0] >= line.known_from]
        for piece, style in ((before, "stroke thin"), (after, "stroke")):
            if len(piece) > 1:
                parts.append(_path("M" + "L".join(f"{across(x):.1f} {up(s.mean):.1f}" for x, s in piece), class_=style))
    for index, (x, spread) in enumerate(line.points):
        if not spread.is_defined:
            continue
        where, size = f"{chart.x_name} {show(x, chart.x_unit)}", 1.6 if x < line.known_from else 3.2
        if chart.dots:
            size = 4.2
        if chart.dots and not math.isnan(spread.std):
            ends = f"M{across(x):.1f} {up(spread.mean - spread.std):.1f}V{up(spread.mean + spread.std):.1f}"
            parts.append(_path(ends, class_="stroke"))
        digits = 2 if chart.y_unit == "share" else 1
        tip = f"{line.entry.name}, {where}: {show_spread(spread, chart.y_unit, digits=digits)}"
        if index in line.chosen:
            tip, size = f"{tip}, chosen", 7.0
        dot = {"data_value": repr(spread.mean), "data_x": repr(x), "data_tip": tip + of_runs(len(spread.values))}
        parts.append(_marker(line.entry, across(x), up(spread.mean), size, **dot))
    return tag(
        "g", *parts, class_=f"line {look(line.entry)}{' faint' if line.faint else ''}", data_entry=line.entry.name
    )


def _marker(entry: Entry, x: float, y: float, size: float, **attributes: object) -> Markup:
    number = entry.look if entry.look is not None else _REFERENCE_MARKERS.get(entry.model, 0)
    shape = _MARKERS[number % 8](size)
    return _path(shape, transform=f"translate({short(x)} {short(y)})", class_="dot", **attributes)


def _path(d: str, **attributes: object) -> Markup:
    return tag("path", d=d, **attributes)


def _positions(panel: Panel) -> list[float]:
    return [x for line in panel.lines for x, _ in line.points]


def _heights(panel: Panel) -> list[float]:
    ends = []
    for line in panel.lines:
        for _, spread in line.points:
            if spread.is_defined:
                around = 0.0 if math.isnan(spread.std) else spread.std
                ends += [spread.mean - around, spread.mean + around]
    return ends


def short(value: object) -> object:
    """Return coordinates with one decimal, and other values unchanged."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value
