"""The slice viewer, in a real browser: what it shows, how it is operated, and what it refuses."""

import json
import re
import zipfile

import browser as browser_module
import keras
import numpy as np
import pandas as pd
import pytest
from browser import canvas_pixels, opened, running_browser
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import head_volume, image_of, write_nifti
from playwright.sync_api import expect
from tiny_dicom import head_hu, tiny_file
from untrained_runs import copy_series, untrained_run

from ich_keras import report_maps, shown_series, study_reports
from ich_keras.cli import main
from ich_keras.ct.dicom import read_hu
from ich_keras.ct.series import index_folder
from ich_keras.ct.window import BRAIN, SOFT_TISSUE, SUBDURAL
from ich_keras.data.thin_series import SliceDistances
from ich_keras.errors import UsageError
from ich_keras.explanation import explain_series
from ich_keras.labels import SIX, LabelSet
from ich_keras.models.spec import ModelSpec
from ich_keras.pages import packing
from ich_keras.pages.study import Answer, Card, Picture, SeriesPart, study_page
from ich_keras.phantom.dicom import PATIENT_PREFIX
from ich_keras.prediction import predict_folder
from ich_keras.shown_series import PRESETS, letters_of

SPEC = ModelSpec((48, 48, 3), depth=10, width=4)
RIGHT_TO_LEFT = "\u202e"
HOSTILE = f"<script>alert(1)</script><img src=x onerror=alert(2)>{RIGHT_TO_LEFT}\"'`-->"


def ich(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def browser():
    with running_browser() as found:
        yield found


# Packing


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9))
def test_slices_come_back_cut_off_at_12_bits(seed, rows, columns):
    hu = np.random.default_rng(seed).integers(-3000, 6000, (rows, columns)).astype(np.int16)
    hu.flat[0], hu.flat[-1] = -32768, 32767
    found = packing.unpack_slice(packing.pack_slice(hu), rows, columns)
    assert found.dtype == np.int16
    assert np.array_equal(found, np.clip(hu, -1024, 3071))


def test_a_damaged_slice_is_noticed():
    line = packing.pack_slice(np.arange(64, dtype=np.int16).reshape(8, 8))
    place = len(line) // 2
    damaged = line[:place] + ("A" if line[place] != "A" else "B") + line[place + 1 :]
    with pytest.raises(ValueError, match="damaged"):
        packing.unpack_slice(damaged, 8, 8)


def test_heat_maps_come_back_within_half_a_level():
    values = np.random.default_rng(0).random((3, 7, 5)).astype(np.float32)
    lines, rows, columns = packing.pack_map(values)
    assert (len(lines), rows, columns) == (3, 7, 5)
    assert abs(packing.unpack_map(lines, rows, columns) / 255 - values).max() <= 0.5 / 255 + 1e-6
    lines, rows, columns = packing.pack_map(np.full((1, 512, 256), 0.4, np.float32))
    assert (rows, columns) == (128, 64)
    assert (packing.unpack_map(lines, rows, columns) == 102).all()


def test_huge_matrices_are_shrunk_to_the_means_of_their_pixels():
    assert packing.shrinking(1, 4096, 64) == 4
    assert packing.shrinking(2000, 512, 512) == 3
    hu = np.random.default_rng(0).integers(-1000, 2000, (7, 5)).astype(np.int16)
    found = packing.shrunk(hu, 2)
    assert found.shape == (4, 3)
    assert found[1, 1] == np.rint(hu[2:4, 2:4].mean())
    assert found[3, 2] == hu[6, 4]


def test_json_cannot_end_its_element():
    text = packing.json_block({"a": HOSTILE, "b": "</SCRIPT>\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text)["a"] == HOSTILE


def test_the_letters_are_those_of_the_patients_sides():
    assert letters_of((1, 0, 0, 0, 1, 0)) == ("R", "L", "A", "P")
    assert letters_of((1, 0, 0, 0, 0.948, 0.317)) == ("R", "L", "A", "P")  # a tilted gantry
    assert letters_of((1, 0, 0, 0, 0, -1)) == ("R", "L", "H", "F")  # coronal
    assert letters_of((0, 1, 0, 0, 0, -1)) == ("A", "P", "H", "F")  # sagittal
    assert letters_of((0, 0.8, -0.6, 1, 0, 0)) == ("AH", "PF", "R", "L")


def test_the_presets_are_the_librarys_windows():
    windows = [(name, level, width) for name, level, width in PRESETS]
    for name, window in (("Brain", BRAIN), ("Subdural", SUBDURAL), ("Soft tissue", SOFT_TISSUE)):
        assert (name, window.level, window.width) in windows
    assert ("Bone", 600, 2800) in windows


# A page of our own making


ROWS, COLUMNS, SLICES = 40, 48, 9


def volume():
    hu = np.stack([head_hu(COLUMNS, seed=n)[:ROWS] for n in range(SLICES)])
    hu[0, 0, :6] = (-1024, -1023, 3071, 3070, 0, 40)
    return hu.astype(np.int16)


def heat():
    """A map as large as its slices, and a smaller one."""
    ramp = np.linspace(0, 1, ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
    small = np.random.default_rng(5).random((SLICES, 5, 6)).astype(np.float32)
    nothing = np.zeros((SLICES, 4, 4), np.float32)
    return {"bleed": np.repeat(ramp[np.newaxis], SLICES, axis=0), "any": small, "none": nothing}


def picture(hu, along=None):
    z = np.arange(len(hu)) * 5.0 - 20 if along is None else np.asarray(along, float)
    return Picture(
        [packing.pack_slice(one) for one in hu],
        *hu.shape[1:],
        1.0,
        0.5,
        ("R", "L", "A", "P"),
        (z + 100).tolist(),
        z.tolist(),
        [str(100 - n) for n in range(len(hu))],
    )


CURVES = {
    "bleed": [0.1, 0.2, 0.3, 0.9, 0.8, 0.2, 0.1, 0.05, 0.01],
    "old": [0.01] * 4 + [None] + [0.01] * 4,
    "any": [0.2, 0.3, 0.4, 0.95, 0.85, 0.3, 0.2, 0.1, 0.02],
}


def answered(**more):
    answers = [
        Answer("bleed", 0.9, 0.8, "yes", "high"),
        Answer("old", 0.01, 0.02, "no", "low"),
        Answer("any", 0.95, 0.9, "yes", "unsure"),
        Answer("none", 0.0, 0.0),
    ]
    first = [("bleed", [(3, 0.9), (4, 0.8)]), ("any", [(3, 0.95), (4, 0.85), (2, 0.4)])]
    # Nothing lies between the last two slices, and 40 mm.
    along = [-20, -15, -10, -5, 0, 5, 10, 15, 55]
    settings = {
        "facts": [("Slices", "9")],
        "picture": picture(volume(), along),
        "answers": answers,
        "curves": CURVES,
        "first": first,
        "shown": "any",
        "maps": heat(),
    }
    return SeriesPart("Series 1", "9 slices; ok", **settings | more)


@pytest.fixture(scope="module")
def own_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "page.html"
    plain = SeriesPart("Series 2", "3 slices; ok", picture=picture(volume()[:3, :20, :30]))
    path.write_text(study_page("Head CT", [answered(), plain], PRESETS, maps_method="Grad-CAM"))
    return path


def greys(hu, level, width):
    """By the definition, and rounded half up."""
    low = level - width / 2
    share = ((np.clip(hu, -1024, 3071).astype(np.float64) - low) / width).clip(0, 1)
    return np.floor(255 * share + 0.5).astype(np.uint8)


def warmed(grey, values, opacity):
    """What the canvas shows under a heat map: float64, bilinear, each pixel by itself."""
    rows, columns = grey.shape
    found = np.zeros((rows, columns, 3), np.uint8)
    for row in range(rows):
        y = min(len(values) - 1, max(0, (row + 0.5) * len(values) / rows - 0.5))
        for column in range(columns):
            wide = values.shape[1]
            x = min(wide - 1, max(0, (column + 0.5) * wide / columns - 0.5))
            top, left = int(y), int(x)
            below, right = min(top + 1, len(values) - 1), min(left + 1, wide - 1)
            down, over = y - top, x - left
            upper = values[top, left] * (1 - over) + values[top, right] * over
            lower = values[below, left] * (1 - over) + values[below, right] * over
            share = (upper * (1 - down) + lower * down) / 255
            alpha = share * opacity
            colour = (255, 220 * (1 - share), 0)
            found[row, column] = [
                np.floor(grey[row, column] * (1 - alpha) + c * alpha + 0.5) for c in colour
            ]
    return found


def drawn(page, slice_number, level=40, width=80, series=0):
    expect(page.locator("#stage")).to_have_attribute(
        "data-drawn", f"{series}/{slice_number}/{level}/{width}"
    )


def wait_until_drawn(page):
    expect(page.locator("#stage")).to_have_attribute("data-drawn", re.compile("/"))


def test_the_canvas_shows_the_windowed_values(browser, own_page):
    hu = volume()
    with opened(browser, own_page) as page:
        drawn(page, 3)
        found = canvas_pixels(page)
        assert found.shape == (ROWS, COLUMNS, 4) and (found[..., 3] == 255).all()
        for channel in range(3):
            assert np.array_equal(found[..., channel], greys(hu[3], 40, 80))
        page.locator("#stage").press("Home")
        for name, level, width in PRESETS:
            page.get_by_role("button", name=name).click()
            drawn(page, 0, level, width)
            assert np.array_equal(canvas_pixels(page)[..., 0], greys(hu[0], level, width)), name
            expect(page.get_by_role("button", name=name)).to_have_attribute("aria-pressed", "true")


def test_wheel_and_keys_scroll(browser, own_page):
    with opened(browser, own_page) as page:
        drawn(page, 3)
        stage = page.locator("#stage")
        stage.hover()
        before = page.evaluate("window.scrollY")
        page.mouse.wheel(0, -100)
        drawn(page, 4)
        page.mouse.wheel(0, 100)
        drawn(page, 3)
        page.mouse.wheel(0, 20)  # a trackpad: many small steps
        page.mouse.wheel(0, 20)
        drawn(page, 3)
        page.mouse.wheel(0, 20)
        drawn(page, 2)
        assert page.evaluate("window.scrollY") == before
        for key, expected in [
            ("ArrowUp", 3),
            ("ArrowRight", 4),
            ("ArrowDown", 3),
            ("ArrowLeft", 2),
            ("PageUp", 7),
            ("PageUp", 8),
            ("ArrowUp", 8),
            ("PageDown", 3),
            ("Home", 0),
            ("ArrowDown", 0),
            ("End", 8),
        ]:
            stage.press(key)
            drawn(page, expected)
        expect(page.locator("#where")).to_have_text("Slice 9 of 9\nz 155.0 mm\nimage 92")
        expect(page.locator("#spoken")).to_have_text("Slice 9 of 9, z 155.0 mm, any 0.020")
        assert page.locator("#slice").get_attribute("aria-valuetext").startswith("Slice 9 of 9")


def test_fingers_scroll_and_window(browser, own_page):
    with opened(browser, own_page, 390, 844, has_touch=True, is_mobile=True) as page:
        drawn(page, 3)
        box = page.locator("#stage").bounding_box()
        session = page.context.new_cdp_session(page)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def touch(kind, *points):
            places = [{"x": x + right, "y": y + down, "id": n} for n, (right, down) in points]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        touch("touchStart", (0, (0, 0)))
        touch("touchMove", (0, (0, -25)))
        drawn(page, 5)
        touch("touchMove", (0, (0, 15)))
        drawn(page, 2)
        touch("touchEnd")
        touch("touchStart", (0, (-20, 0)))
        touch("touchStart", (0, (-20, 0)), (1, (20, 0)))
        touch("touchMove", (0, (-10, 0)), (1, (30, 0)))
        touch("touchEnd")
        expect(page.locator("#window-told")).to_have_text("L 40\nW 90")
        assert page.evaluate("window.scrollY") == 0


def test_dragging_and_keys_and_numbers_set_the_window(browser, own_page):
    hu = volume()
    with opened(browser, own_page) as page:
        drawn(page, 3)
        box = page.locator("#stage").bounding_box()
        page.mouse.move(box["x"] + 100, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 130, box["y"] + 90)
        page.mouse.up()
        page.mouse.move(box["x"] + 200, box["y"] + 200)  # the button is up
        drawn(page, 3, 30, 110)
        assert np.array_equal(canvas_pixels(page)[..., 0], greys(hu[3], 30, 110))
        stage = page.locator("#stage")
        stage.press("Shift+ArrowUp")
        stage.press("Shift+ArrowRight")
        drawn(page, 3, 35, 120)
        page.get_by_label("Level").fill("-100")
        page.get_by_label("Level").press("Tab")
        page.get_by_label("Width").fill("0")
        page.get_by_label("Width").press("Enter")
        drawn(page, 3, -100, 1)
        page.get_by_label("Width").fill("")
        page.get_by_label("Width").press("Enter")
        expect(page.get_by_label("Width")).to_have_value("1")
        stage.press("4")
        drawn(page, 3, 600, 2800)


def test_the_value_under_the_pointer(browser, own_page):
    hu = volume()
    with opened(browser, own_page) as page:
        drawn(page, 3)
        page.locator("#stage").press("Home")
        drawn(page, 0)
        box = page.locator("#canvas").bounding_box()
        for row, column in [(0, 0), (0, 2), (0, 4), (20, 24), (39, 47)]:
            page.mouse.move(
                box["x"] + (column + 0.5) * box["width"] / COLUMNS,
                box["y"] + (row + 0.5) * box["height"] / ROWS,
            )
            value = int(hu[0, row, column])
            told = str(value).replace("-", "\u2212")
            sign = {-1024: "\u2264 ", 3071: "\u2265 "}.get(value, "")
            expect(page.locator("#under")).to_have_text(
                f"{sign}{told} HU\nrow {row + 1}, column {column + 1}"
            )


def test_the_value_under_a_marker_that_keys_move(browser, own_page):
    hu = volume()

    def tells(page, number, row, column):
        text = f"{int(hu[number, row, column])} HU\nrow {row + 1}, column {column + 1}"
        expect(page.locator("#under")).to_have_text(text.replace("-", "\u2212"))
        return text.replace("-", "\u2212")

    with opened(browser, own_page) as page:
        drawn(page, 3)
        stage, cross = page.locator("#stage"), page.locator("#cross")
        expect(cross).to_be_hidden()
        stage.press("l")  # where it begins: in the middle
        tells(page, 3, ROWS // 2, COLUMNS // 2)
        for key in ("l", "l", "i", "Shift+K", "Shift+J"):
            stage.press(key)
        row, column = ROWS // 2 - 1 + 10, COLUMNS // 2 + 2 - 10
        said = tells(page, 3, row, column)
        expect(page.locator("#spoken")).to_have_text(said)
        box, at = page.locator("#canvas").bounding_box(), cross.bounding_box()
        found = (
            (at["x"] + at["width"] / 2 - box["x"]) / box["width"] * COLUMNS,
            (at["y"] + at["height"] / 2 - box["y"]) / box["height"] * ROWS,
        )
        assert found == pytest.approx((column + 0.5, row + 0.5), abs=0.1)
        stage.press("ArrowUp")  # it stays where it is in the next slice
        tells(page, 4, row, column)
        for _ in range(6):
            stage.press("Shift+I")
        tells(page, 4, 0, column)
        stage.press("Escape")
        expect(cross).to_be_hidden()
        expect(page.locator("#under")).to_have_text("")
        stage.press("k")
        expect(cross).to_be_visible()
        page.mouse.move(box["x"] + 0.5 * box["width"] / COLUMNS, box["y"] + 1)
        expect(cross).to_be_hidden()  # the pointer counts again
        assert "column 1" in page.locator("#under").text_content()


def test_the_shape_follows_the_spacing(browser, own_page):
    """40 rows of 1 mm, 48 columns of 0.5 mm: the canvas is higher than wide."""
    with opened(browser, own_page) as page:
        drawn(page, 3)
        box = page.locator("#canvas").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(24 / 40, rel=0.01)
        scale = page.locator("#scale").bounding_box()
        expect(page.locator("#scale-told")).to_have_text("5 mm")
        assert scale["width"] / box["width"] == pytest.approx(5 / 24, rel=0.02)
        letters = [page.locator(f"#letter-{side}") for side in ("left", "right", "top", "bottom")]
        assert [letter.inner_text() for letter in letters] == ["R", "L", "A", "P"]
        places = [letter.bounding_box() for letter in letters]
        assert places[0]["x"] < places[1]["x"] and places[2]["y"] < places[3]["y"]


def test_the_curve_leads_to_a_slice(browser, own_page):
    with opened(browser, own_page) as page:
        drawn(page, 3)
        page.locator("#plot").scroll_into_view_if_needed()
        plot = page.locator("#plot").bounding_box()

        def click(share):
            page.mouse.click(plot["x"] + share * plot["width"], plot["y"] + 20)

        click(0.999)
        drawn(page, 8)
        click(0.7)  # nothing lies between 15 and 55 mm: the nearer one
        drawn(page, 7)
        click(15.2 / 75)
        drawn(page, 3)
        curve = page.locator("#curve")
        curve.press("ArrowRight")
        drawn(page, 4)
        assert curve.get_attribute("aria-valuenow") == "5"
        assert curve.get_attribute("aria-valuetext").endswith("any 0.850")
        points = page.locator("polyline.chosen").get_attribute("points").split()
        # The last slice lies behind a gap: a dot.
        assert points[3] == "200.0,5.0" and points[-1] == "466.7,90.0" and len(points) == 8
        dot = page.locator("line.dot.chosen")
        assert [dot.get_attribute(one) for one in ("x1", "y2")] == ["1000.0", "98.0"]
        page.get_by_role("radio", name="old").check()
        expect(page.locator("#curve-value")).to_have_text("none")
        parts = page.locator("polyline.chosen").evaluate_all(
            "found => found.map((one) => one.getAttribute('points').split(' ').length)"
        )
        assert parts == [4, 3]


def test_zones_of_other_distances_are_one_curve_and_lost_slices_none(browser, tmp_path):
    path = tmp_path / "page.html"
    # 4 mm below and 8 mm above, as many scanners do; the slice at 40 mm is lost.
    along = [0, 4, 8, 12, 20, 28, 36, 52, 60]
    part = answered(picture=picture(volume(), along))
    path.write_text(study_page("Head CT", [part], PRESETS, maps_method="Grad-CAM"))
    with opened(browser, path) as page:
        wait_until_drawn(page)
        lengths = page.locator("polyline.chosen").evaluate_all(
            "found => found.map((one) => one.getAttribute('points').split(' ').length)"
        )
        assert lengths == [7, 2]
        expect(page.locator("line.dot.chosen")).to_have_count(0)


def test_slices_to_look_at_first_are_buttons(browser, own_page):
    with opened(browser, own_page) as page:
        drawn(page, 3)
        jumps = page.locator("#series-0 [data-slice]")
        assert [jumps.nth(n).get_attribute("data-slice") for n in range(5)] == list("34342")
        jumps.nth(1).click()
        drawn(page, 4)
        expect(page.get_by_role("radio", name="bleed")).to_be_checked()
        expect(page.locator("#curve-label")).to_have_text("bleed")
        expect(jumps.nth(1)).to_have_attribute("aria-current", "true")


def test_the_heat_map_lies_over_the_slice_exactly(browser, own_page):
    grey, packed = greys(volume()[3], 40, 80), {}
    for name, values in heat().items():
        packed[name] = packing.unpack_map(*packing.pack_map(values))[3].astype(np.float64)
    with opened(browser, own_page) as page:
        drawn(page, 3)
        without = canvas_pixels(page)

        def shown(label, opacity):
            expect(page.locator("#stage")).to_have_attribute("data-heat", f"{label}/{opacity}")
            wanted = warmed(grey, packed[label], opacity / 100)
            assert np.array_equal(canvas_pixels(page)[..., :3], wanted)

        page.locator("#stage").press("h")
        expect(page.locator("#heat")).to_be_checked()
        shown("any", 50)
        page.locator("#opacity").fill("80")
        shown("any", 80)
        page.get_by_role("radio", name="bleed").check()
        shown("bleed", 80)
        page.get_by_role("radio", name="old").check()
        expect(page.locator("#heat-note")).to_have_text("There is no heat map of old.")
        expect(page.locator("#stage")).to_have_attribute("data-heat", "")
        assert np.array_equal(canvas_pixels(page), without)
        page.get_by_role("radio", name="none").check()
        told = "Nothing in this series speaks for none."
        expect(page.locator("#heat-note")).to_have_text(told)
        assert np.array_equal(canvas_pixels(page), without)
        expect(page.locator("#heat-peak")).to_be_hidden()
        page.get_by_role("radio", name="any").check()
        shown("any", 80)
        peak = int(heat()["any"].max(axis=(1, 2)).argmax())
        page.get_by_role("button", name=f"Strongest: slice {peak + 1}").click()
        drawn(page, peak)
        page.locator("#slice").fill("4")
        drawn(page, 3)
        page.locator("#stage").press("h")
        expect(page.locator("#stage")).to_have_attribute("data-heat", "")
        assert np.array_equal(canvas_pixels(page), without)


def test_another_series_is_chosen(browser, own_page):
    with opened(browser, own_page) as page:
        drawn(page, 3)
        page.get_by_role("radio", name="Series 2").check()
        drawn(page, 1, series=1)
        assert np.array_equal(canvas_pixels(page)[..., 0], greys(volume()[1, :20, :30], 40, 80))
        expect(page.locator("#curves")).to_be_hidden()
        expect(page.locator("#heat-controls")).to_be_hidden()
        expect(page.get_by_role("heading", name="Series 1")).to_be_hidden()
        page.locator("#stage").press("ArrowUp")
        page.get_by_role("radio", name="Series 1").check()
        drawn(page, 3)
        page.get_by_role("radio", name="Series 2").check()
        drawn(page, 2, series=1)  # where it was left


def test_the_keyboard_alone_will_do(browser, own_page):
    with opened(browser, own_page) as page:
        drawn(page, 3)
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate(
                    """() => {
                      const at = document.activeElement;
                      if (at === document.body) return ["", true, true];
                      const box = at.getBoundingClientRect();
                      const outline = getComputedStyle(at).outlineStyle;
                      return [at.id || at.name || at.textContent.trim(), outline !== "none",
                              box.width > 0];
                    }"""
                )
            )
            if reached[-1][0] == "":
                break
        names = [name for name, _, _ in reached]
        for name in ("series", "stage", "slice", "curve", "level", "width", "heat", "label-0"):
            assert name in names, (name, names)
        assert all(outlined and is_seen for name, outlined, is_seen in reached if name)
        page.locator("#stage").focus()
        page.keyboard.press("ArrowUp")
        drawn(page, 4)
        page.locator("#slice").focus()
        page.keyboard.press("ArrowRight")
        drawn(page, 5)
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, [tabindex]")].filter((one) =>
              !(one.getAttribute("aria-label") || one.textContent.trim() ||
                (one.labels && one.labels.length && one.labels[0].textContent.trim())))
              .map((one) => one.outerHTML)"""
        )
        assert unnamed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(browser, own_page, scheme, width):
    with opened(browser, own_page, width, color_scheme=scheme, reduced_motion="reduce") as page:
        drawn(page, 3)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        lacking = page.evaluate(
            """() => {
              const light = (text) => {
                const parts = text.match(/[0-9.]+/g).slice(0, 3).map((one) => one / 255);
                const linear = parts.map((one) =>
                  one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
                return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
              };
              const behind = light(getComputedStyle(document.body).backgroundColor);
              const texts = "main p, main dt, main dd, main td, main th, h1, h2, legend";
              return [...document.querySelectorAll(texts)]
                .filter((one) => one.checkVisibility() && !one.closest(".stage")).map((one) => {
                  const own = light(getComputedStyle(one).color);
                  const [high, low] = own > behind ? [own, behind] : [behind, own];
                  return [(high + 0.05) / (low + 0.05), one.textContent.trim()];
                }).filter(([contrast]) => contrast < 4.5);
            }"""
        )
        assert lacking == []
        dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        assert dark == (scheme == "dark")


def test_a_damaged_slice_is_said_and_the_others_go_on(browser, own_page, tmp_path):
    text = own_page.read_text()
    line = packing.pack_slice(volume()[4])
    place = len(line) // 2
    assert text.count(line) == 1
    path = tmp_path / "damaged.html"
    path.write_text(text.replace(line, line[:place] + "AAAA" + line[place + 4 :]))
    with opened(browser, path) as page:
        drawn(page, 3)
        page.locator("#stage").press("ArrowUp")
        expect(page.get_by_role("alert")).to_have_text(
            "Slice 5 cannot be unpacked: the file is damaged. Make the page again."
        )
        assert not canvas_pixels(page).any()
        page.locator("#stage").press("ArrowUp")
        drawn(page, 5)
        expect(page.get_by_role("alert")).to_be_hidden()
        assert np.array_equal(canvas_pixels(page)[..., 0], greys(volume()[5], 40, 80))


def test_without_javascript_the_answers_are_there(browser, own_page):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(own_page.as_uri())
        assert "The slices need JavaScript" in page.locator("noscript").text_content()
        expect(page.locator("#series-0 .answers")).to_contain_text("0.950")
        expect(page.locator("#viewer")).to_be_hidden()
        assert page.locator("button").evaluate_all("found => found.every((b) => !b.offsetWidth)")
        expect(page.locator("#series-0 .jumps").first).to_contain_text("slice 4 (0.900)")


def test_going_back_keeps_fields_and_picture_together(browser, own_page):
    with browser.new_page() as page:
        page.goto(own_page.as_uri())
        drawn(page, 3)
        page.get_by_role("radio", name="bleed").check()
        page.get_by_label("Level").fill("200")
        page.get_by_label("Level").press("Tab")
        page.get_by_role("radio", name="Series 2").check()
        drawn(page, 1, 200, 80, series=1)
        page.goto("about:blank")
        page.go_back()
        wait_until_drawn(page)
        series, number, level, _ = page.locator("#stage").get_attribute("data-drawn").split("/")
        expect(page.locator("input[name=series]:checked")).to_have_value(series)
        expect(page.locator("#slice")).to_have_value(str(int(number) + 1))
        expect(page.locator("#level")).to_have_value(level)
        label = page.locator("#curve-label").text_content()
        expect(page.locator("input[name=label-0]:checked")).to_have_value(label)
        on = page.locator("input:not([autocomplete=off])")
        assert on.count() == 0


def test_labels_may_be_called_like_members_of_objects(browser, tmp_path):
    """Only one of them has a curve; a series of one slice has a dot."""
    names = ["constructor", "toString", "__proto__"]
    part = answered(
        picture=picture(volume()[:1]),
        answers=[Answer(name, 0.5) for name in names],
        curves={"__proto__": [0.25]},
        first=[],
        shown="toString",
        maps=None,
    )
    path = tmp_path / "page.html"
    path.write_text(study_page("Head CT", [part], PRESETS))
    with opened(browser, path) as page:
        drawn(page, 0)
        for name, told in zip(names, ("", "", "0.250"), strict=True):
            page.get_by_role("radio", name=name).check()
            expect(page.locator("#curve-label")).to_have_text(name)
            expect(page.locator("#curve-value")).to_have_text(told)
        dot = page.locator("#plot .dot")
        assert [dot.get_attribute(one) for one in ("x1", "x2", "y1")] == ["500.0", "500.0", "75.0"]


def test_what_is_operated_has_a_name(browser, own_page):
    with opened(browser, own_page) as page:
        drawn(page, 3)
        expect(page.get_by_role("radiogroup", name="Label to show of Series 1")).to_be_visible()
        expect(page.get_by_role("region", name="Answers for Series 1")).to_be_visible()
        page.get_by_role("button", name="slice 4, any, probability 0.950").click()
        page.locator("#stage").press("h")
        page.locator("#opacity").fill("80")
        expect(page.locator("#opacity")).to_have_attribute("aria-valuetext", "80 percent")
        assert page.locator(".table:not([role=region][tabindex='0'][aria-label])").count() == 0


@pytest.mark.parametrize("width", [390, 1000])
def test_tables_of_answers_fit(browser, tmp_path, width):
    """Also with the longest label; words of usual length stay whole."""
    names = [*SIX.names, "x" * 64]
    part = answered(
        answers=[
            Answer(name, 0.5, 0.25, "yes" if name in SIX.names else "unsure", "unsure")
            for name in names
        ],
        curves={},
        first=[],
        shown="any",
        maps=None,
    )
    path = tmp_path / "page.html"
    path.write_text(study_page("Head CT", [part], PRESETS))
    with opened(browser, path, width) as page:
        drawn(page, 4)
        table = page.locator(".table").first
        assert table.evaluate("one => one.scrollWidth <= one.clientWidth")
        word = page.locator(".answers bdi", has_text="intraparenchymal")
        assert word.evaluate("one => one.getClientRects().length") == 1
        assert word.bounding_box()["height"] < 30


def test_texts_cannot_do_anything(browser, tmp_path):
    """As names of series and labels, as facts, as what is said of the network."""
    hostile = HOSTILE + "\ud800" + "x" * 1_000_000
    part = SeriesPart(
        HOSTILE,
        hostile,
        [(HOSTILE, hostile)],
        [HOSTILE],
        picture(volume()[:2]),
        answers=[Answer(HOSTILE, 0.5, 0.5, HOSTILE, HOSTILE)],
        curves={HOSTILE: [0.1, 0.2]},
        first=[(HOSTILE, [(1, 0.2)])],
        shown=HOSTILE,
        maps={HOSTILE: heat()["any"][:2]},
    )
    card = Card(HOSTILE, [(HOSTILE, hostile)], [HOSTILE], HOSTILE, [HOSTILE], [[HOSTILE, HOSTILE]])
    path = tmp_path / "hostile.html"
    page_text = study_page(
        hostile, [part], PRESETS, notices=[HOSTILE], told=[HOSTILE], cards=[card]
    )
    path.write_bytes(page_text.encode())
    assert RIGHT_TO_LEFT not in page_text and len(page_text) < 200_000
    with opened(browser, path, 390) as page:
        drawn(page, 1)
        assert page.locator("img").count() == 0
        page.locator("#series-0 [data-slice]").click()
        page.locator("#stage").press("h")
        expect(page.locator("#stage")).to_have_attribute("data-heat", re.compile("<script>.*/50"))
        expect(page.locator("polyline.chosen")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("script").count() <= 4


def test_heat_maps_of_other_slices_are_refused():
    maps = {"any": np.zeros((SLICES + 1, 4, 4), np.float32)}
    with pytest.raises(UsageError, match=r"any has the shape \(10, 4, 4\); expected \(9, rows"):
        study_page("", [answered(maps=maps)], PRESETS)


# ich view


def write_scan(folder, slices=5, side=64, prefix="slice", spacing_mm=5, **tags):
    folder.mkdir(exist_ok=True, parents=True)
    volume = np.stack([head_hu(side, seed=n) for n in range(slices)])
    number = tags.pop("number", 1)
    for n, hu in enumerate(volume):
        own = {
            "SOPInstanceUID": f"1.2.{number}.{n + 1}",
            "SeriesInstanceUID": f"1.2.{number}",
            "InstanceNumber": slices - n,
            "ImagePositionPatient": [-125, -125, spacing_mm * n],
            "PatientID": "KINGFISHER",
            "PatientName": "CANARY",
            "StudyDate": "19010203",
        }
        (folder / f"{prefix}-{n}.dcm").write_bytes(tiny_file(hu + 1024, **own | tags))
    return volume


def test_view_shows_a_folder_without_a_network(browser, tmp_path):
    hu = write_scan(tmp_path / "scan")
    (tmp_path / "scan/notes.txt").write_text("no slice")
    write_scan(tmp_path / "scan", 2, prefix="cut", number=2, RescaleSlope=None)
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "page.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    for secret in ("KINGFISHER", "CANARY", "19010203", str(tmp_path)):
        assert secret not in text and secret not in done.output.replace(str(tmp_path), "")
    assert "not a DICOM file" in text and "rescale slope or intercept is absent" in text
    with opened(browser, tmp_path / "page.html") as page:
        drawn(page, 2)
        assert np.array_equal(canvas_pixels(page)[..., 0], greys(hu[2], 40, 80))
        expect(page.locator("#where")).to_have_text("Slice 3 of 5\nz 10.0 mm\nimage 3")
        expect(page.locator("#curves")).to_be_hidden()
        assert [page.locator(f"#letter-{s}").inner_text() for s in ("left", "right")] == ["R", "L"]


def test_view_says_who_it_is_when_asked(tmp_path):
    write_scan(tmp_path / "scan")
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--show-patient")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "p.html").read_text()
    assert "KINGFISHER" in text and "CANARY" not in text and "19010203" not in text


def test_view_shows_gaps_and_prone_patients_right_side_left(browser, tmp_path):
    """On the face, and feet first: the pixels are turned, and so the letters stay."""
    prone = [-1, 0, 0, 0, -1, 0]
    hu = write_scan(tmp_path / "scan", 9, ImageOrientationPatient=prone)
    (tmp_path / "scan/slice-2.dcm").unlink()
    broken = tmp_path / "scan/slice-6.dcm"
    broken.write_bytes(broken.read_bytes()[:-900])
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "p.html").read_text()
    assert "Slices are missing: a distance is a multiple" in text
    assert "Files of the series were refused" in text and "the file ends too early" in text
    with opened(browser, tmp_path / "p.html") as page:
        drawn(page, 3)
        page.locator("#stage").press("Home")
        drawn(page, 0)
        assert np.array_equal(canvas_pixels(page)[..., 0], greys(hu[0, ::-1, ::-1], 40, 80))
        assert [page.locator(f"#letter-{s}").inner_text() for s in ("left", "top")] == ["R", "A"]


def test_sagittal_series_are_not_called_axial(browser, tmp_path):
    for number in range(4):
        write_scan(
            tmp_path / "scan",
            1,
            prefix=f"sagittal-{number}",
            SOPInstanceUID=f"1.2.1.{number + 1}",
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
            ImagePositionPatient=[5 * number - 60, -125, 70],
        )
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    with opened(browser, tmp_path / "p.html") as page:
        drawn(page, 2)
        expect(page.locator("#where")).to_contain_text("position \u221250.0 mm")
        text = page.locator("main").inner_text()
        for wrong in ("Tilt", "head)", "lowest", "right is shown", " z "):
            assert wrong not in text, wrong
        assert "4 slices of 64 × 64 pixels, 0.5 × 0.5 mm each" in text


def test_the_best_series_comes_first_and_studies_are_numbered(browser, tmp_path):
    write_scan(tmp_path / "scan", 3, prefix="few")
    for number, slices in [(2, 20), (3, 22)]:
        uid = f"1.9.{number}"
        write_scan(
            *(tmp_path / "scan", slices, 64, f"b{number}"), number=number, StudyInstanceUID=uid
        )
    write_scan(tmp_path / "scan", 2, prefix="c", number=4, StudyInstanceUID="1.9.3")
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    with opened(browser, tmp_path / "p.html") as page:
        wait_until_drawn(page)
        told = [" ".join(one.split()[:5]) for one in page.locator(".choice").all_inner_texts()]
    assert told == [
        *("Series 1 study 1: 22", "Series 2 study 1: 2"),
        *("Series 3 study 2: 20", "Series 4 study 3: 3"),
    ]


def test_view_of_an_empty_folder_names_no_file(tmp_path):
    (tmp_path / "scan").mkdir()
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 3 and "names every file" not in done.output
    write_scan(tmp_path / "scan")
    again = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert again.exit_code == 0, again.output
    assert "There is no series to show" not in (tmp_path / "p.html").read_text()


def test_view_tries_its_target_before_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("ich_keras.viewing.index_folder", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "scan").mkdir()
    for out, message in [("file/p.html", "file/p.html cannot be written"), ("folder", "a folder")]:
        done = ich("view", tmp_path / "scan", "--out", tmp_path / out)
        assert done.exit_code in (1, 2, 3, 4) and message in "".join(done.output.splitlines())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder", "scan"]


def test_view_of_nothing_says_so(browser, tmp_path):
    write_scan(tmp_path / "scan", 2, RescaleSlope=None)
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 3 and "p.html names every file" in done.output
    with opened(browser, tmp_path / "p.html") as page:
        expect(page.get_by_text("There is no series to show.")).to_be_visible()
        assert page.locator("canvas").count() == 0
    write_scan(tmp_path / "scan", 2)
    again = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert again.exit_code == 0, again.output
    again = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html")
    assert again.exit_code == 2 and "already exists" in again.output
    none = ich("view", tmp_path / "none", "--out", tmp_path / "q.html")
    assert none.exit_code == 2 and "does not exist" in none.output


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_view_is_safe_from_headers_and_names(browser, tmp_path):
    folder = tmp_path / f"a{RIGHT_TO_LEFT}<img src=x onerror=alert(3)>"
    write_scan(folder, 3, ConvolutionKernel="<script>al", BodyPartExamined="HEAD", side=32)
    (folder / f"<script>alert(4)<\uff0fscript>{RIGHT_TO_LEFT}gpj.dcm").write_text("no")
    (folder / "\udcff.dcm").write_text("no")
    write_scan(
        folder, 1, prefix="bad", number=3, Modality="<script>", SeriesDescription="<img src=x>"
    )
    done = ich("view", folder, "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    with opened(browser, tmp_path / "p.html") as page:
        drawn(page, 1)
        assert page.locator("img").count() == 0
        expect(page.locator("body")).to_contain_text("<script>al")
        expect(page.locator("body")).to_contain_text("\\u202e")


def test_view_shrinks_huge_matrices_and_says_so(browser, tmp_path):
    hu = write_scan(tmp_path / "scan", 1, side=1200)
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    assert "600 × 600 pixels, the means" in (tmp_path / "p.html").read_text()
    with opened(browser, tmp_path / "p.html") as page:
        drawn(page, 0)
        found = canvas_pixels(page)
        means = hu[0].reshape(600, 2, 600, 2).mean(axis=(1, 3))
        assert np.array_equal(found[..., 0], greys(np.rint(means), 40, 80))


def test_series_without_room_are_listed(browser, tmp_path, monkeypatch):
    write_scan(tmp_path / "scan", 3, number=1)
    write_scan(tmp_path / "scan", 4, number=2, prefix="second")
    monkeypatch.setattr(shown_series, "MAX_VOXELS", 5 * 64 * 64)
    done = ich("view", tmp_path / "scan", "--out", tmp_path / "p.html", "--workers", 0)
    assert done.exit_code == 0, done.output
    with opened(browser, tmp_path / "p.html") as page:
        drawn(page, 2)
        assert page.locator("#slice").get_attribute("max") == "4"
        assert page.locator("input[name=series]").count() == 0
        expect(page.get_by_role("heading", name="Series 2")).to_be_visible()
        expect(page.locator("main")).to_contain_text("Its slices are left out: a page holds")


def test_nifti_and_archives_are_viewed_alike(tmp_path):
    write_nifti(tmp_path / "head.nii.gz", image_of(head_volume()))
    write_scan(tmp_path / "scan", 4)
    with zipfile.ZipFile(tmp_path / "scan.zip", "w") as archive:
        for path in sorted((tmp_path / "scan").iterdir()):
            archive.write(path, path.name)
    for name in ("head.nii.gz", "scan.zip", "scan"):
        done = ich("view", tmp_path / name, "--out", tmp_path / f"{name}.html", "--workers", 0)
        assert done.exit_code == 0, done.output
        text = (tmp_path / f"{name}.html").read_text()
        (block,) = re.findall(r'id="pixels-0">\n(.*?)\n</script>', text, re.S)
        found = [packing.unpack_slice(line, 64, 64) for line in block.split("\n")]
        assert np.array_equal(found, head_volume()), name


def test_the_page_is_called_after_the_scan(tmp_path, monkeypatch):
    write_scan(tmp_path / "a scan.nii", 1)
    monkeypatch.chdir(tmp_path)
    assert ich("view", "a scan.nii", "--workers", 0).output.endswith("Page: a scan.html\n")
    assert (tmp_path / "a scan.html").is_file()


# ich predict --report


@pytest.fixture(scope="module")
def images(phantom_folder, tmp_path_factory):
    return copy_series(phantom_folder / "images", 2, tmp_path_factory.mktemp("two") / "scans")


def predicted(tmp_path, images, *more, spec=SPEC, **run):
    folder = untrained_run(tmp_path / "run", "narrow", spec, **run)
    done = ich(
        *("predict", "--run", folder, "--dicom", images, "--out", tmp_path / "out"),
        *("--report", "--workers", 0, "--device", "cpu", *more),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return tmp_path / "out"


def test_predict_writes_a_page_for_each_study(browser, tmp_path, images):
    out = predicted(tmp_path, images)
    studies = pd.read_csv(out / "studies.csv")
    assert studies["report"].tolist() == [f"reports/{n + 1}.html" for n in range(len(studies))]
    with browser.new_page() as page:
        page.goto((out / "reports/index.html").as_uri())
        expect(page.locator("tbody tr")).to_have_count(len(studies))
        page.get_by_role("link", name="study 2").click()
        expect(page).to_have_title(f"Head CT, study 2 of {len(studies)}")
    slices, first = pd.read_csv(out / "predictions.csv"), pd.read_csv(out / "look_first.csv")
    index = pd.read_csv(out / "series.csv").set_index("series_instance_uid")
    for row in studies.itertuples():
        text = (out / row.report).read_text()
        uid = row.series_instance_uid
        assert "trained on drawn phantoms only" in text and "not for clinical use" in text
        with opened(browser, out / row.report) as page:
            wait_until_drawn(page)
            expect(page.locator(".warning").first).to_contain_text("drawn phantoms only")
            rows = page.locator("#series-0 .answers tbody tr")
            for number, label in enumerate(SIX.names):
                cells = rows.nth(number).locator("td").all_inner_texts()
                assert cells[0].strip() == f"{index.loc[uid, label]:.3f}"
                assert cells[3].strip() == f"{index.loc[uid, f'raw_{label}']:.3f}"
            facts = json.loads(page.locator("#facts").text_content())["series"][0]
            own = slices[slices["series_instance_uid"] == uid].sort_values("slice_index")
            assert facts["curves"]["any"] == pytest.approx(own["any"].tolist(), abs=1e-4)
            wanted = first[(first["series_instance_uid"] == uid) & (first["label"] == "any")]
            jumps = page.locator("#series-0 [data-slice]")
            places = own["sop_instance_uid"].tolist()
            assert [int(jumps.nth(n).get_attribute("data-slice")) for n in range(5)] == [
                places.index(one) for one in wanted["sop_instance_uid"]
            ]
            jumps.nth(2).click()
            drawn(page, places.index(wanted["sop_instance_uid"].iloc[2]))


def test_no_patient_is_on_the_pages_unless_asked(tmp_path, images):
    out = predicted(tmp_path, images)
    assert PATIENT_PREFIX not in (out / "reports/1.html").read_text()
    (tmp_path / "asked").mkdir()
    out = predicted(tmp_path / "asked", images, "--show-patient")
    assert f"<bdi>{PATIENT_PREFIX}" in (out / "reports/1.html").read_text()
    refused = ich("predict", "--run", "r", "--dicom", images, "--out", "o", "--show-patient")
    assert refused.exit_code == 2 and "--show-patient is about --report" in refused.output


def test_exclusive_labels(browser, tmp_path, images):
    labels = LabelSet(("none", "small bleed", "large"), exclusive=True)
    out = predicted(tmp_path, images, labels=labels)
    with opened(browser, out / "reports/1.html") as page:
        wait_until_drawn(page)
        expect(page.locator(".card")).to_contain_text("exactly one of none, small bleed, large")
        assert page.locator("#series-0 .answers tbody tr").count() == 3
        label = page.locator("#curve-label").text_content()
        expect(page.get_by_role("radio", name=label, exact=True)).to_be_checked()


def test_a_page_of_a_study_says_what_is_of_the_whole_folder(browser, tmp_path):
    """Two series of one study and one of another, thin ones; no label stands for the others."""
    for number, study in [(1, "1.9.1"), (2, "1.9.1"), (3, "1.9.2")]:
        prefix = f"s{number}"
        write_scan(*(tmp_path / "scan", 20, 64, prefix, 1), number=number, StudyInstanceUID=study)
    labels = LabelSet(("none", "small bleed", "large"), exclusive=True)
    run = untrained_run(tmp_path / "run", "narrow", SPEC, labels=labels)
    facts = json.loads((run / "data.json").read_text())
    facts["slice_spacing_mm"] = SliceDistances(5.0, 5.0).record()
    (run / "data.json").write_text(json.dumps(facts))
    out = tmp_path / "out"
    predict_folder(run, tmp_path / "scan", out, report=True, device="cpu")
    with opened(browser, out / "reports/1.html") as page:
        wait_until_drawn(page)
        told = "In the whole folder: Thin series: 3 of 3 series were averaged"
        expect(page.locator("main")).to_contain_text(told)
        label = page.locator("#curve-label").text_content()
        choice = page.locator(".choice").first
        expect(choice).to_contain_text("Series 1 (the one that counts)")
        expect(choice).to_contain_text(re.compile(rf"; {label} 0\.\d+"))


def test_the_page_of_all_studies_fits_a_phone_word_by_word(browser, tmp_path, images):
    out = predicted(tmp_path, images)
    with browser.new_page(viewport={"width": 390, "height": 800}) as page:
        page.goto((out / "reports/index.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for cell in page.locator("thead th").all():
            assert cell.bounding_box()["height"] < 60, cell.text_content()
        assert page.locator("tbody a").first.bounding_box()["height"] < 30


def test_a_run_on_whole_series_has_no_curve(browser, tmp_path, images):
    spec = ModelSpec((20, 48, 48, 1), depth=10, width=4)
    out = predicted(tmp_path, images, spec=spec, view="series", slices=20)
    with opened(browser, out / "reports/1.html") as page:
        wait_until_drawn(page)
        expect(page.locator("#series-0")).to_contain_text("it says nothing of single slices")
        expect(page.locator("#curves")).to_be_hidden()
        page.locator("#stage").press("End")
        page.get_by_role("radio", name="epidural").check()
        expect(page.locator("#where")).to_contain_text("Slice")


def test_a_series_that_a_run_skips_is_shown_without_answers(browser, tmp_path):
    """Tilted, which this run skips; and one of the same study that it takes."""
    tilt = np.radians(10)
    tilted = [1, 0, 0, 0, np.cos(tilt), np.sin(tilt)]
    write_scan(tmp_path / "scan", 9, number=5, ImageOrientationPatient=tilted)
    hu = write_scan(tmp_path / "scan", 9, prefix="other", number=4)
    spec = ModelSpec((9, 48, 48, 1), depth=10, width=4)
    settings = {"view": "series", "slices": 9, "tilted": "skip"}
    out = predicted(tmp_path, tmp_path / "scan", spec=spec, **settings)
    assert sorted(path.name for path in (out / "reports").iterdir()) == ["1.html", "index.html"]
    with opened(browser, out / "reports/1.html") as page:
        drawn(page, 4)
        assert np.array_equal(canvas_pixels(page)[..., 0], greys(hu[4], 40, 80))
        answer = pd.read_csv(out / "series.csv")["any"].iloc[0]
        expect(page.locator(".choice").first).to_contain_text(f"ok; any {answer:.3f}")
        page.get_by_role("radio", name="Series 2").check()
        drawn(page, 4, series=1)
        expect(page.locator("#series-1")).to_contain_text("gives no answer to this series")
        expect(page.locator("#series-1")).to_contain_text("tilted by more than 1 degree")
        expect(page.locator("main")).to_contain_text("9 × a slice of a tilted series")


def maps_of_page(path, facts):
    """The heat maps of the first series of a page: label -> uint8 (slices, rows, columns)."""
    (text,) = re.findall(r'id="maps-0">\n(.*?)\n</script>', path.read_text(), re.S)
    lines, count = text.split("\n"), len(facts["z_mm"])
    return {
        one["name"]: packing.unpack_map(
            lines[one["from"] : one["from"] + count], one["rows"], one["columns"]
        )
        for one in facts["maps"]
    }


@pytest.mark.parametrize("count", [1, 2])
def test_a_thin_series_is_said_to_be_averaged(browser, tmp_path, count):
    """Its slices keep their own place; each five share an answer, and one of them is looked at."""
    hu = write_scan(tmp_path / "scan", 20, spacing_mm=1)
    chosen = []
    for number in range(count):
        keras.utils.set_random_seed(number)
        run = untrained_run(tmp_path / f"run-{number}", "narrow", SPEC)
        facts = json.loads((run / "data.json").read_text())
        facts["slice_spacing_mm"] = SliceDistances(5.0, 5.0).record()
        (run / "data.json").write_text(json.dumps(facts))
        chosen.append(run)
    out = tmp_path / "out"
    more = {"heat_maps": "gradcam"} if count == 1 else {}
    predict_folder(chosen, tmp_path / "scan", out, report=True, device="cpu", **more)
    with opened(browser, out / "reports/1.html") as page:
        wait_until_drawn(page)
        facts = json.loads(page.locator("#facts").text_content())["series"][0]
        assert len(facts["z_mm"]) == 20 and facts["z_mm"][7] == 7
        assert len(set(facts["curves"]["any"])) == 4
        jumps = page.locator("#series-0 [data-slice]").evaluate_all(
            "found => found.map((one) => Number(one.dataset.slice))"
        )
        assert sorted(jumps) == [2, 7, 12, 17]
        if count == 1:
            told = "The network saw 4 slices of 5 mm, each averaged of thin ones"
            expect(page.locator("#series-0")).to_contain_text(told)
            # What is explained is what the network saw.
            averaged = np.rint(hu.reshape(4, 5, 64, 64).mean(axis=1)).astype(np.int16)
            wanted = explain_series(chosen[0], averaged, (5, 0.5, 0.5), method="gradcam").values
            packed = maps_of_page(out / "reports/1.html", facts)
            for label, values in wanted.items():
                assert abs(packed[label] / 255 - values.repeat(5, axis=0)).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("kind", ["slice", "series"])
def test_heat_maps_come_from_the_run(browser, tmp_path, images, kind, monkeypatch):
    """Those of the page are those of `explain_series`, in 8 bits and at the page's size."""
    monkeypatch.setattr(report_maps, "MOST_BYTES", 4 * 20 * 64 * 64)  # one or two labels at a time
    spec, settings = SPEC, {}
    if kind == "series":
        spec = ModelSpec((20, 48, 48, 1), depth=10, width=4)
        settings = {"view": "series", "slices": 20}
    out = predicted(tmp_path, images, "--heat-maps", "gradcam", spec=spec, **settings)
    index = index_folder(images)
    uid = pd.read_csv(out / "studies.csv")["series_instance_uid"].iloc[0]
    series = index.series[index.series["series_uid"] == uid].iloc[0]
    paths = index.slices[index.slices["series_uid"] == uid]["container"]
    hu = np.stack([read_hu(path) for path in paths])
    spacing = (series.slice_spacing_mm, series.row_spacing_mm, series.column_spacing_mm)
    wanted = explain_series(tmp_path / "run", hu, spacing, method="gradcam").values
    with opened(browser, out / "reports/1.html") as page:
        wait_until_drawn(page)
        facts = json.loads(page.locator("#facts").text_content())["series"][0]
        packed = maps_of_page(out / "reports/1.html", facts)
        assert sorted(packed) == sorted(SIX.names)
        for label, found in packed.items():
            assert abs(found / 255 - wanted[label]).max() <= 0.5 / 255 + 1e-6
        page.locator("#stage").press("h")
        expect(page.locator("#stage")).to_have_attribute("data-heat", re.compile("/50"))
        expect(page.get_by_text("Heat map (gradcam)")).to_be_visible()


def test_heat_maps_that_cannot_be_are_refused_before_anything_is_written(tmp_path, images):
    runs = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        runs.append(untrained_run(tmp_path / f"run-{seed}", "narrow", SPEC))
    for chosen, method, message in [
        (runs, "hirescam", "heat maps are asked for of 2 runs"),
        (runs[:1], "crystal-ball", "method 'crystal-ball'; expected one of gradcam, hirescam"),
    ]:
        with pytest.raises(UsageError, match=message):
            predict_folder(chosen, images, tmp_path / "out", report=True, heat_maps=method)
        assert not (tmp_path / "out").exists()
    refused = ich("predict", "--run", "r", "--dicom", images, "--out", "o", "--heat-maps")
    assert refused.exit_code == 2 and "--heat-maps is about --report" in refused.output


def test_an_ensemble_names_its_runs(browser, tmp_path, images):
    keras.utils.set_random_seed(1)
    runs = [untrained_run(tmp_path / name, "narrow", SPEC) for name in ("one", "two")]
    chosen = [word for run in runs for word in ("--run", run)]
    done = ich(
        *("predict", *chosen, "--dicom", images, "--out", tmp_path / "out", "--report"),
        *("--workers", 0, "--device", "cpu"),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    with opened(browser, tmp_path / "out/reports/1.html") as page:
        wait_until_drawn(page)
        expect(page.locator(".card")).to_have_count(2)
        expect(page.locator("main")).to_contain_text("Ensemble of 2 runs")
        assert page.locator("#series-0 [data-slice]").count() == 5
        expect(page.locator("#series-0 .answers")).to_contain_text("n/a")


def test_an_interrupted_prediction_goes_on_to_its_pages(tmp_path, images, monkeypatch):
    run = untrained_run(tmp_path / "run", "narrow", SPEC)
    whole = predict_folder(run, images, tmp_path / "whole", report=True, device="cpu")
    made = study_reports.study_page

    def stop(title, *parts, **more):
        if "study 2" in title:
            raise KeyboardInterrupt
        return made(title, *parts, **more)

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study_reports, "study_page", stop)
        predict_folder(run, images, out, report=True, device="cpu")
    assert (out / "reports/1.html").exists() and not (out / "studies.csv").exists()
    predict_folder(run, images, out, report=True, device="cpu")
    names = ["studies.csv", "series.csv", *whole.studies["report"], "reports/index.html"]
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_without_a_browser_these_tests_fail(monkeypatch):
    """Unless it was asked to skip them."""
    monkeypatch.setattr(browser_module, "NAMES", ("no-such-browser",))
    monkeypatch.delenv("ICH_CHROMIUM", raising=False)
    monkeypatch.delenv("ICH_NO_BROWSER", raising=False)
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        browser_module.chromium()
    monkeypatch.setenv("ICH_NO_BROWSER", "1")
    with pytest.raises(pytest.skip.Exception, match="ICH_NO_BROWSER=1"):
        browser_module.chromium()
    monkeypatch.setenv("ICH_CHROMIUM", "/own/chrome")
    assert browser_module.chromium() == "/own/chrome"


def test_reports_need_a_folder(images):
    with pytest.raises(UsageError, match="report needs a folder"):
        predict_folder("run", images, report=True)
