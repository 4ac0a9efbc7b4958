"""Charts as inline SVG: their colours come from the page's style, for light and dark alike."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from ich_keras.pages.document import true_minus

COLOURS = 8  # classes s0 to s7 of report.css
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 44  # around the axes, for ticks and labels


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        label: what it shows, with units.
        low, high: its ends; `low` below `high`.
        ticks: where it has marks.
        texts: beside the marks; empty writes the numbers.
    """

    label: str
    low: float = 0.0
    high: float = 1.0
    ticks: tuple[float, ...] = (0.0, 0.5, 1.0)
    texts: tuple[str, ...] = ()

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Each tick with its text."""
        texts = self.texts or tuple(true_minus(f"{tick:.6g}") for tick in self.ticks)
        return list(zip(self.ticks, texts, strict=True))


@dataclass(frozen=True, eq=False)
class Line:
    """A line through points; a point that is not finite interrupts it.

    Args:
        across, up: float (n,).
        style: CSS classes: s0 to s7 for a colour, "rule" for a guide, "dashed".
        has_dots: whether the points are marked, too.
    """

    across: Sequence[float] | np.ndarray
    up: Sequence[float] | np.ndarray
    style: str
    has_dots: bool = False


@dataclass(frozen=True, eq=False)
class Dots:
    """Points; arguments as `Line`."""

    across: Sequence[float] | np.ndarray
    up: Sequence[float] | np.ndarray
    style: str


@dataclass(frozen=True, eq=False)
class Band:
    """What lies between two lines.

    Args:
        across, low, high: float (n,); points that are not finite are left out.
        style: as of `Line`.
    """

    across: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray
    high: Sequence[float] | np.ndarray
    style: str


Mark = Line | Dots | Band


def colour(number: int) -> str:
    """Return the class of a colour; there are `COLOURS`, which then come again."""
    return f"s{number % COLOURS}"


def text_width(text: str) -> float:
    """Return about how wide a text of a chart is, rather too wide: units of its viewBox.

    >>> text_width("0.5") < text_width("WWW") < text_width("\u8133\u8133\u8133\u8133")
    True
    """
    return float(sum(_character_width(character) for character in text))


def _character_width(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    if unicodedata.east_asian_width(character) in "WF":
        return 14.0
    if character in "MW@%\u2014\u2026":
        return 13.0
    return 10.0 if character.isupper() or character in "mw" else 7.5


def fitted(text: str, room: float) -> str:
    """Return a text that is at most about so wide: a longer one loses its middle.

    >>> fitted("subdural", 100), fitted("a very long name of a finding", 100)
    ('subdural', 'a very…nding')
    """
    if text_width(text) <= room:
        return text
    kept = len(text) - 1
    while kept > 2:
        start = (kept + 1) // 2
        short = f"{text[:start].rstrip()}\u2026{text[len(text) - kept // 2 :].lstrip()}"
        if text_width(short) <= room:
            return short
        kept -= 1
    return "\u2026"


def chart(
    across: Axis, up: Axis, marks: Iterable[Mark], alt: str, width: int = 260, height: int = 240
) -> Markup:
    """Draw a chart.

    Args:
        across, up: the axes.
        marks: what is drawn, the last one on top.
        alt: what the chart shows, in a sentence, for those who cannot see it.
        width, height: its shape; it takes the width that the page gives it.

    Returns:
        An svg element. All texts are escaped.
    """
    frame = _Frame(across, up, width, height)
    left = frame.left(up)
    frame = _Frame(across, up, width, height, left)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">',
        *frame.lines(),
        *(part for mark in marks for part in _drawn(mark, frame)),
        "</svg>",
    ]
    return Markup("\n".join(parts))


@dataclass(frozen=True)
class _Frame:
    across: Axis
    up: Axis
    width: int
    height: int
    start: float = _LEFT

    @staticmethod
    def left(up: Axis) -> float:
        """Return the room that the texts of the upward axis need."""
        widest = max((text_width(text) for _, text in up.marks), default=0)
        return max(_LEFT, 24 + widest)

    def x(self, value: float) -> float:
        share = (value - self.across.low) / (self.across.high - self.across.low)
        return self.start + share * (self.width - self.start - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.up.low) / (self.up.high - self.up.low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def lines(self) -> list[str]:
        floor, end = self.y(self.up.low), self.x(self.across.high)
        parts = [f'<rect class="field" {_box(self.start, _TOP, end - self.start, floor - _TOP)}/>']
        for value, text in self.across.marks:
            x = self.x(value)
            parts.append(f'<path class="grid" d="M{x:.1f} {floor:.1f}V{_TOP}"/>')
            anchor = "end" if x > self.width - _RIGHT - 10 and len(text) > 3 else "middle"
            parts.append(_text(x, floor + 15, text, anchor))
        for value, text in self.up.marks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.start:.1f} {y:.1f}H{end:.1f}"/>')
            parts.append(_text(self.start - 5, y + 4, text, "end"))
        middle = (self.start + end) / 2
        parts.append(_text(middle, self.height - 8, self.across.label, "middle"))
        if self.up.label:
            y = (_TOP + floor) / 2
            turn = f' transform="rotate(-90 11 {y:.1f})"'
            parts.append(_text(11, y, self.up.label, "middle", turn))
        return parts

    def points(self, across: Iterable[float], up: Iterable[float]) -> list[tuple[float, float]]:
        return [(self.x(float(a)), self.y(float(b))) for a, b in zip(across, up, strict=True)]


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _drawn(mark: Mark, frame: _Frame) -> list[str]:
    style = escape(mark.style)
    if isinstance(mark, Band):
        low, high = np.asarray(mark.low, float), np.asarray(mark.high, float)
        kept = np.isfinite(low) & np.isfinite(high)
        across = np.asarray(mark.across, float)[kept]
        if not len(across):
            return []
        upper = frame.points(across, high[kept])
        lower = frame.points(across[::-1], low[kept][::-1])
        return [f'<path class="band {style}" d="{_path([*upper, *lower])}Z"/>']
    points = frame.points(mark.across, mark.up)
    dots = [
        f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        for x, y in points
        if np.isfinite((x, y)).all()
    ]
    if isinstance(mark, Dots):
        return dots
    line = f'<path class="line {style}" d="{_path(points)}"/>'
    return [line, *(dots if mark.has_dots else [])]


def _path(points: Sequence[tuple[float, float]]) -> str:
    parts, is_down = [], False
    for x, y in points:
        if not np.isfinite((x, y)).all():
            is_down = False
            continue
        parts.append(f"{'L' if is_down else 'M'}{x:.1f} {y:.1f}")
        is_down = True
    return "".join(parts)


def round_ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Return round numbers from at most `low` to at least `high`.

    >>> round_ticks(0.13, 0.52)
    (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    >>> round_ticks(1, 1)
    (0.0, 0.5, 1.0, 1.5, 2.0)
    """
    if not high > low:
        low, high = low - 1, high + 1
    rough = (high - low) / count
    unit = 10.0 ** np.floor(np.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return tuple(float(f"{step * n:.10g}") for n in np.arange(first, last + 1))
