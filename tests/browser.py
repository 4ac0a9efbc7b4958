"""A real browser for tests of pages: the system's Chromium, driven by Playwright."""

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Of the browser itself: it must not ask for updates, nor need a GPU or a sandbox (CI runs as root).
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
HELP = (
    "no Chromium for the tests of pages: apt-get install chromium, or name one in ICH_CHROMIUM."
    " ICH_NO_BROWSER=1 skips these tests."
)
_VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(event.violatedDirective + " " + event.blockedURI);
});
"""


def chromium() -> str:
    """The program to test with; without one the test fails, or is skipped where that was asked."""
    found = os.environ.get("ICH_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("ICH_NO_BROWSER") == "1":
        pytest.skip(HELP)
    if found is None:
        pytest.fail(HELP)
    return found


@contextmanager
def running_browser() -> Iterator:
    program = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*ARGUMENTS])
        yield browser
        browser.close()


@contextmanager
def opened(browser, path: Path, width=1280, height=900, **settings) -> Iterator:
    """Open a page; at the end, nothing may have gone wrong or been asked of a network."""
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    context.set_default_timeout(10_000)
    context.add_init_script(_VIOLATIONS)
    page = context.new_page()
    wrong, asked = [], []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
        assert page.evaluate("window.violations") == []
        assert wrong == []
        assert asked == [path.as_uri()]
    finally:
        context.close()


def canvas_pixels(page) -> np.ndarray:
    """What the canvas holds: uint8 (rows, columns, 4)."""
    raw = page.evaluate(
        """() => {
          const canvas = document.getElementById("canvas");
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          let text = "";
          for (const byte of data) text += String.fromCharCode(byte);
          return [canvas.height, canvas.width, btoa(text)];
        }"""
    )
    rows, columns, text = raw
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(rows, columns, 4)
