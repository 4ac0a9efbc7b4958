"""The charts of learnable windows: grey values before and after, and their way in between."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup

from ich_keras.ct.window import Window
from ich_keras.models.windows import LearnedWindows
from ich_keras.pages.chart import Axis, Band, Line, Mark, chart, colour, round_ticks
from ich_keras.pages.content import Chart, Charts, Part

_POINTS = 241
_MOST_EPOCHS = 400  # points of a line
_MARGIN = 0.3  # of the wider window, beside both


def window_charts(
    learned: LearnedWindows,
    table: pd.DataFrame,
    moved: Sequence[tuple[Window, Window]],
    best: int,
) -> list[Part]:
    """Draw each window before and after a training, and its level and ends by epoch.

    Args:
        learned: of the network: how its windows end.
        table: as `ich_keras.learned_windows.read_windows` gives it.
        moved: each window before and after.
        best: the epoch whose weights were kept.
    """
    curves, ways = [], []
    for number, (before, after) in enumerate(moved, 1):
        style = colour(number - 1)
        said = f"{_text(before)} to {_text(after)}"
        curves.append(Chart(_curves(learned, before, after, style), f"window {number}: {said}"))
        way = table[table["window"] == number]
        ways.append(Chart(_way(way, best, style, number), f"window {number}: level and ends"))
    return [
        Charts(curves, [("rule", "before the training"), ("s0", "of the epoch that was kept")]),
        Charts(ways, [("rule", "the epoch that was kept; epoch 0 is before the training")]),
    ]


def grey_of(learned: LearnedWindows, window: Window, hu: np.ndarray) -> np.ndarray:
    """Return the grey values, 0 to 1, that a learnable window gives to HU.

    >>> grey = grey_of(LearnedWindows("sigmoid"), Window(40, 80), np.array([0, 40, 80]))
    >>> (255 * grey).round(6).tolist()
    [1.0, 127.5, 254.0]
    """
    if learned.kind == "linear":
        return np.asarray(window(hu))
    return 1 / (1 + np.exp(-learned.gain * (hu - window.level) / window.width))


def _curves(learned: LearnedWindows, before: Window, after: Window, style: str) -> Markup:
    room = _MARGIN * max(before.width, after.width)
    ticks = round_ticks(min(before.low, after.low) - room, max(before.high, after.high) + room)
    hu = np.linspace(ticks[0], ticks[-1], _POINTS)
    marks: list[Mark] = [
        Line(hu, grey_of(learned, before, hu), "rule"),
        Line(hu, grey_of(learned, after, hu), style),
    ]
    alt = f"Grey values by HU: the window was {_text(before)} and became {_text(after)}."
    return chart(Axis("HU", ticks[0], ticks[-1], ticks), Axis("grey"), marks, alt)


def _way(way: pd.DataFrame, best: int, style: str, number: int) -> Markup:
    if len(way) > _MOST_EPOCHS:
        way = way.iloc[np.unique(np.linspace(0, len(way) - 1, _MOST_EPOCHS).astype(int))]
    epochs, level, half = way["epoch"], way["level"], way["width"] / 2
    up = round_ticks(float((level - half).min()), float((level + half).max()))
    last = max(1, int(epochs.max()))
    ticks = tuple(t for t in round_ticks(0, last) if t <= last and t == int(t))
    marks: list[Mark] = [
        Line([best, best], [up[0], up[-1]], "rule"),
        Band(epochs, level - half, level + half, style),
        Line(epochs, level, style, len(way) < 30),
    ]
    alt = f"Level of window {number} between its ends, over {last} epochs."
    return chart(Axis("epoch", 0, last, ticks), Axis("HU", up[0], up[-1], up), marks, alt)


def _text(window: Window) -> str:
    return f"{window.level:.1f}/{window.width:.1f} HU"
