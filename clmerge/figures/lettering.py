"""Prepare names for Matplotlib, which parses ``$`` as mathematics and draws boxes for letters its font lacks."""

from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

from clmerge.names import shorten

_NO_GLYPH = "\N{WHITE SQUARE}"


def label(name: str, length: int, *, on_page: bool = False) -> str:
    r"""Escape a name so that Matplotlib draws it literally, and cut it to ``length`` characters.

    Letters that no installed font has are replaced by squares, except on pages, whose readers have other fonts.

    Example:
        >>> print(label("$x^2$", 10))
        \$x^2\$
    """
    text = shorten(name, length)
    if not on_page:
        text = "".join(letter if _font_of(letter) is not None else _NO_GLYPH for letter in text)
    return text.replace("$", r"\$")


def lettered(figure: Figure) -> Figure:
    """Set the fonts of every text in a figure to ones that have its letters; return the figure."""
    own = _own_font()
    for text in figure.findobj(Text):
        letters = text.get_text()
        fonts = dict.fromkeys(font for letter in letters if (font := _font_of(letter)) not in (None, own))
        if fonts:
            text.set_fontfamily([own, *fonts])
    return figure


def _own_font() -> str:
    return FontProperties().get_name()


@cache
def _font_of(letter: str) -> str | None:
    """Return the name of a font that has a letter, preferably Matplotlib's own; None if there is none."""
    own = findfont(FontProperties())
    if letter.isspace() or ord(letter) in _letters(own):
        return _own_font()
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        # The font of last resort draws boxes only.
        if not font.name.startswith("Last Resort") and ord(letter) in _letters(font.fname):
            return font.name
    return None


@cache
def _letters(file: str) -> frozenset[int]:
    return frozenset(get_font(file).get_charmap())
