"""Names in pictures: Matplotlib reads ``$`` as mathematics and draws boxes for letters that its own font lacks."""

from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

from clmerge.names import shorten

_NO_GLYPH = "\N{WHITE SQUARE}"


def label(name: str, length: int) -> str:
    r"""Return a name as Matplotlib draws it literally, cut if it is longer than ``length`` characters.

    Letters that no installed font has become squares.

    Example:
        >>> print(label("$x^2$", 10))
        \$x^2\$
    """
    text = "".join(letter if _font_of(letter) is not None else _NO_GLYPH for letter in shorten(name, length))
    return text.replace("$", r"\$")


def lettered(figure: Figure) -> Figure:
    """Let every text of a figure use the fonts that have its letters; return the figure."""
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
    """Return the name of a font that has a letter, Matplotlib's own if it does; None if there is none."""
    own = findfont(FontProperties())
    if letter.isspace() or ord(letter) in _letters(own):
        return _own_font()
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        # The font of last resort has nothing but boxes.
        if not font.name.startswith("Last Resort") and ord(letter) in _letters(font.fname):
            return font.name
    return None


@cache
def _letters(file: str) -> frozenset[int]:
    return frozenset(get_font(file).get_charmap())
