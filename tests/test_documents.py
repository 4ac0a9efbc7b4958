"""What people read: links lead somewhere, the README stays short, modules stay readable."""

import re
from pathlib import Path

import pytest

from ich_keras.models.cost import preset_table
from ich_keras.models.presets import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / ".github", *(p for p in ROOT.iterdir() if p.is_dir()))
    for path in (folder.rglob("*.md") if folder.name[0] not in "._" else folder.glob("*.md"))
    if folder != ROOT or path.parent == ROOT
)
README_LINES = 200
MODULE_LINES = 400
# Modules that may be longer, each with the reason.
LONGER = {}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_the_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {
        "README.md",
        "ich_keras/README.md",
        "ich_keras/models/README.md",
        "weights_convert/README.md",
        "experiments/README.md",
        "benchmarks/HOWTO.md",
        "benchmarks/README.md",
        ".github/CONTRIBUTING.md",
        ".github/CHANGELOG.md",
    } <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page if not place else page.parent / place
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_modules_are_short():
    packages = ("ich_keras", "weights_convert", "experiments", "benchmarks")
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }
    long = {name: count for name, count in lines.items() if count > MODULE_LINES}
    assert set(long) == set(LONGER), long


@pytest.mark.slow
def test_every_preset_is_in_the_readme_with_its_numbers():
    page = ROOT / "ich_keras/models/README.md"
    assert preset_table(tuple(PRESETS)) in page.read_text(encoding="utf-8")
