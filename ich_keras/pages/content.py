"""What a page of results is made of: sections of texts, tables, charts and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from ich_keras.pages.document import render, true_minus


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Args:
        text: what it says.
        is_warning: whether it stands out in red.
    """

    text: str
    is_warning: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Args:
        caption: what it shows.
        header: of the columns.
        rows: texts, as many as the header has.
        is_folded: whether it is closed until a reader opens it.
        has_numbers: whether all columns but the first hold numbers, to be aligned right.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_folded: bool = False
    has_numbers: bool = True
    kind: ClassVar[str] = "table"

    @property
    def cells(self) -> list[list[str]]:
        """The rows as they are shown: numbers have a true minus."""
        if not self.has_numbers:
            return [list(row) for row in self.rows]
        return [[*row[:1], *map(true_minus, row[1:])] for row in self.rows]


@dataclass(frozen=True)
class Chart:
    """A chart, as `ich_keras.pages.chart.chart` draws it, and the text below it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Charts:
    """Charts side by side.

    Args:
        charts: in order.
        legend: (class of a colour, name) for all of them.
        is_wide: whether each takes the room of two.
    """

    charts: Sequence[Chart]
    legend: Sequence[tuple[str, str]] = ()
    is_wide: bool = False
    kind: ClassVar[str] = "charts"


@dataclass(frozen=True)
class Picture:
    """A picture.

    Args:
        uri: a data URI.
        alt: what it shows.
        caption: the text below it.
    """

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, under a heading."""

    title: str
    pictures: Sequence[Picture]
    kind: ClassVar[str] = "pictures"


Part = Text | Table | Charts | Pictures


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading.

    Args:
        title: the heading.
        parts: what stands below it.
    """

    title: str
    parts: Sequence[Part]


def sections_page(title: str, lead: Sequence[Text], sections: Sequence[Section]) -> str:
    """Return a page of sections, with a list of them at its top; a section without parts is left
    out.

    Args:
        title: of the page.
        lead: what stands before everything else: warnings first.
        sections: in order.
    """
    return render(
        "sections.html.j2",
        styles=("sections.css",),
        title=title,
        lead=lead,
        sections=[section for section in sections if section.parts],
    )
