"""What stands in an HTML page, for tests: tables, charts, pictures, paragraphs."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_EMPTY = {"meta", "img", "rect", "path", "circle", "link"}


@dataclass
class PageParts(HTMLParser):
    """Parse a page; tags must close in order."""

    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    charts: list[str] = field(default_factory=list)  # what stands instead of each
    pictures: list[dict] = field(default_factory=list)
    paragraphs: list[tuple[str, str]] = field(default_factory=list)  # (class, text)
    headings: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self):
        HTMLParser.__init__(self, convert_charrefs=True)
        self._open: list[str] = []
        self._caught = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self._class = ""

    @classmethod
    def of(cls, page: str) -> "PageParts":
        found = cls()
        found.feed(page)
        found.close()
        assert found._open == [], found._open
        return found

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        for name in values:
            assert not name.startswith("on"), (tag, name)
        for name in ("src", "href"):
            assert values.get(name, "#").startswith(("data:image/", "#")), values
        if tag == "svg":
            assert values["role"] == "img" and values["aria-label"].strip()
            self.charts.append(values["aria-label"])
        if tag == "img":
            assert values["alt"].strip()
            self.pictures.append(values)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th", "caption", "p", "h1", "h2", "h3", "figcaption"):
            self._caught, self._class = "", values.get("class", "")
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in _EMPTY:
            return
        assert self._open.pop() == tag
        text = " ".join(self._caught.split())
        if tag in ("td", "th"):
            self._rows[-1].append(text)
        elif tag == "caption":
            self._caption = text
        elif tag == "table":
            assert self._caption not in self.tables, self._caption
            assert len({len(row) for row in self._rows}) == 1, self._caption
            self.tables[self._caption] = self._rows
        elif tag == "p":
            self.paragraphs.append((self._class, text))
        elif tag in ("h1", "h2", "h3"):
            self.headings.append(text)

    def handle_data(self, data):
        self._caught += data
        if not self._open or self._open[-1] != "style":
            self.text += data

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """Return a table whose caption begins so: first column -> header -> text."""
        (rows,) = [rows for name, rows in self.tables.items() if name.startswith(caption)]
        header = rows[0][1:]
        return {row[0]: dict(zip(header, row[1:], strict=True)) for row in rows[1:]}

    @property
    def warnings(self) -> list[str]:
        return [text for name, text in self.paragraphs if name == "warning"]
