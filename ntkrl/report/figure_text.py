"""Texts of figures: lines that fit their room, numbers of ticks without an offset."""

import functools
import re
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Formatter

from ntkrl.messages import printable

MAX_CHARACTERS = 160
"""Of a user's text; what follows is cut."""
POINTS = 72
"""Per inch."""
MOST_DIGITS = 15
FALLBACKS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "WenQuanYi Zen Hei"),
    *("IPAGothic", "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Malgun Gothic"),
    *(
        "Noto Sans Devanagari",
        "Noto Sans Thai",
        "Noto Sans Arabic",
        "Noto Emoji",
        "Segoe UI Symbol",
    ),
    *("Arial Unicode MS", "Unifont"),
)
"""Fonts for characters that matplotlib's own font lacks, where they are installed."""


@functools.cache
def families() -> tuple[str, ...]:
    """Return matplotlib's font and the installed FALLBACKS."""
    installed = {font.name for font in fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in FALLBACKS if name in installed))


def plain(text: str) -> str:
    """Return a user's text, such as a name, as one line of at most MAX_CHARACTERS."""
    line = _one_line(text)
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 1] + "…"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def fitted(text: str, size: float, inches: float, weight: str = "normal") -> str:
    """Break a text into lines of at most so many inches, between words where possible.

    Args:
      text: any text.
      size: of the font, in points.
      inches: room for a line.
      weight: of the font.

    Returns:
      The lines, without control codes; dollars are escaped: matplotlib's formulas.
    """
    line = _one_line(text)
    font = FontProperties(family=families(), size=size, weight=weight)
    columns, lines = max(len(line), 1), [line]
    while columns > 1 and (widest := max(_points(each, font) for each in lines)) > inches * POINTS:
        columns = min(columns - 1, int(columns * max(inches * POINTS / widest, 0.8)) + 1)
        lines = textwrap.wrap(line, columns)
    return "\n".join(lines).replace("$", r"\$")


def _points(line: str, font: FontProperties) -> float:
    with warnings.catch_warnings():
        # boxes are drawn for characters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]


class TickNumbers(Formatter):
    """Complete numbers at ticks: no offset to add and no power to multiply with at the axis' end.

    All ticks of an axis get as many digits as distinguish them.
    """

    def __call__(self, value: float, pos: int | None = None) -> str:
        """Return the text of a single number."""
        return tick_texts([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """Return the texts of all ticks."""
        return tick_texts(values)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Return numbers with three significant digits, or as many more as distinguish them."""
    array = np.asarray(values, dtype=float)
    largest = float(np.abs(array).max(initial=0.0))
    array = np.where(np.abs(array) < 1e-12 * largest, 0.0, array)  # 0 but for rounding
    texts: list[str] = []
    for digits in range(3, MOST_DIGITS + 1):
        texts = [f"{value:.{digits}g}" for value in array.tolist()]
        if len(set(texts)) == len(set(array.tolist())):
            break
    return [short_exponent(text).replace("-", "−") for text in texts]


def short_exponent(text: str) -> str:
    """Return a number's text without the zeros and the plus of its exponent: 1e-5 for 1e-05."""
    return re.sub(r"e([+-])0*(?=\d)", lambda match: "e" + match[1].strip("+"), text)
