"""The results of a benchmark: one CSV per run, named by machine and versions, and a table."""

import csv
import importlib.metadata
import io
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ich_keras import __version__
from ich_keras.environment import device_name
from ich_keras.files import atomic_write

RESULTS = Path(__file__).parent / "results"
TRIALS = Path("runs")  # not part of the repository
_PACKAGES = ("keras", "torch", "torchvision", "monai")


@dataclass(frozen=True)
class Place:
    """Where and when a benchmark ran: the last columns of every row.

    Args:
        device: name of the processor or GPU.
        threads: threads of torch on the CPU.
        python: version of Python; then versions of packages, "" where one is absent.
        date: when the run began, or the row was measured; ISO 8601.
    """

    device: str
    threads: int
    python: str
    ich_keras: str
    keras: str
    torch: str
    torchvision: str
    monai: str
    date: str


def describe_place(device: str, threads: int) -> Place:
    """Describe the machine and the installed packages.

    Args:
        device: "cpu" or "cuda".
        threads: threads of torch on the CPU.
    """
    return Place(
        device=device_name(device),
        threads=threads,
        python=platform.python_version(),
        ich_keras=__version__,
        **{package: _version(package) for package in _PACKAGES},
        date=now(),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def slug(text: str) -> str:
    """Return a name in lower-case letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def file_name(bench: str, place: Place, precision: str) -> str:
    """Name a CSV by bench, device and threads, backend, versions, precision (if any) and date."""
    parts = (
        bench,
        f"{slug(place.device)}-{place.threads}t",
        f"torch-{place.torch}",
        f"keras-{place.keras}",
        precision,
        re.sub(r"[-:]", "", place.date).replace("T", "-"),
    )
    return "_".join(part for part in parts if part) + ".csv"


def write_csv(path: Path, rows: list[Any], place: Place) -> None:
    """Write all rows at once; floats have six digits, None is an empty cell.

    Args:
        path: the file; replaced as a whole.
        rows: dataclasses of one kind; their fields are the columns, followed by those of the place.
            A row that has a date keeps it.
    """
    stream = io.StringIO(newline="")
    shared = asdict(place)
    full = [asdict(row) | shared | _own_date(row) for row in rows]
    columns = [*(name for name in full[0] if name not in shared), *shared]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in full)
    atomic_write(path, stream.getvalue())


def now() -> str:
    """Return the date and time of this second, ISO 8601."""
    return datetime.now().isoformat(timespec="seconds")


def _own_date(row: Any) -> dict[str, str]:
    date = getattr(row, "date", "")
    return {"date": date} if date else {}


def cell(value: object) -> str:
    """Return one value as the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table whose cells are padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = (text.ljust(width) for text, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
