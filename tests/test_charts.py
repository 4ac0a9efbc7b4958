"""Charts: where points come to lie, what is escaped, and round numbers on axes."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_parts import PageParts

from ich_keras.pages.chart import Axis, Band, Dots, Line, chart, round_ticks
from ich_keras.pages.content import (
    Chart,
    Charts,
    Picture,
    Pictures,
    Section,
    Table,
    Text,
    sections_page,
)

EVIL = "</svg><script>alert('a')</script>\"&"


def coordinates(svg, kind):
    found = re.search(rf'<path class="{kind}[^"]*" d="([^"]+)"', svg).group(1)
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", found)]


def test_points_lie_where_their_numbers_say():
    svg = chart(Axis("x"), Axis("y"), [Line([0, 0.5, 1], [0, 0.25, 1], "s0")], "A line.")
    start, middle, end = coordinates(svg, "line")
    assert middle[0] == pytest.approx((start[0] + end[0]) / 2, abs=0.1)
    assert start[1] - middle[1] == pytest.approx((start[1] - end[1]) / 4, abs=0.1)
    assert start[0] < end[0] and start[1] > end[1]  # y grows downwards in SVG


def test_what_is_not_finite_interrupts_a_line_and_leaves_a_band():
    line = Line([0, 0.2, 0.4, 0.6], [0.1, np.nan, 0.3, 0.4], "s1", has_dots=True)
    band = Band([0, 0.5, 1], [0.1, np.nan, 0.2], [0.3, 0.4, 0.5], "s2")
    svg = chart(Axis("x"), Axis("y"), [band, line, Dots([0.1, np.inf], [0.1, 0.1], "s3")], "All.")
    path = re.search(r'class="line s1" d="([^"]+)"', svg).group(1)
    assert path.count("M") == 2 and path.count("L") == 1
    assert svg.count("<circle") == 3 + 1
    assert len(coordinates(svg, "band")) == 4
    assert "nan" not in svg and "inf" not in svg


def test_texts_of_charts_are_escaped():
    svg = chart(Axis(EVIL), Axis(EVIL, texts=(EVIL,) * 3), [Line([0], [0], EVIL)], EVIL)
    assert "<script" not in svg and svg.count("</svg>") == 1


def test_texts_of_pages_are_escaped():
    table = Table(EVIL, [EVIL], [[EVIL]])
    charts = Charts([Chart(chart(Axis("x"), Axis("y"), [], EVIL), EVIL)], [("s0", EVIL)])
    pictures = Pictures(EVIL, [Picture("data:image/png;base64,", EVIL, EVIL)])
    parts = [Text(EVIL, True), table, Table("b", ["c"], [["d"]], is_folded=True), charts, pictures]
    page = sections_page(EVIL, [Text(EVIL)], [Section(EVIL, parts), Section("empty", [])])
    found = PageParts.of(page)
    assert "script" not in found.tags
    assert found.tables[EVIL] == [[EVIL], [EVIL]] and found.headings[0] == EVIL
    assert "empty" not in found.text
    assert found.warnings == [EVIL]


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_hold_the_range(low, width):
    ticks = round_ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + width * 1e-3 and ticks[-1] >= low + width * (1 - 1e-3)
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
