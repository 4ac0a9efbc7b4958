"""Folders that hold only the rejects.csv of a command that refused its data: taken as new ones."""

from collections.abc import Collection
from pathlib import Path

from ich_keras.ct.rejects import REJECTS_FILE
from ich_keras.ct.tables import REJECT_COLUMNS
from ich_keras.files import require_absent
from ich_keras.leftovers import PARTIAL

# The columns that tables of all versions have, unquoted or as an index quotes them.
_BEGINNINGS = tuple(
    ",".join(f"{quote}{name}{quote}" for name in list(REJECT_COLUMNS)[:3]).encode()
    for quote in ("", '"')
)


def is_reject_table(path: Path) -> bool:
    """Return whether a file is a table of rejects, and not another one of that name."""
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(max(map(len, _BEGINNINGS))).startswith(_BEGINNINGS)


def require_absent_or_rejects(folder: Path | str, own: Collection[str] = ()) -> Path:
    """Return the path if nothing exists there but what `rejects_kept` left.

    Args:
        folder: the output of a command.
        own: names of other files that the command itself may have left.

    Raises:
        UsageError: something else exists there.
    """
    folder = Path(folder)
    path = folder / REJECTS_FILE
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    # A command that was killed while it wrote one of them.
    ends = tuple(f"-{name}" for name in (REJECTS_FILE, *own))
    strays = {name for name in names if name.startswith(f"{PARTIAL}-") and name.endswith(ends)}
    rest = names - strays - set(own)
    is_left = not rest or (rest == {REJECTS_FILE} and is_reject_table(path))
    return folder if names and is_left else require_absent(folder)


def remove_rejects(folder: Path) -> None:
    """Remove what `require_absent_or_rejects` lets pass."""
    if folder.is_dir() and any(require_absent_or_rejects(folder).iterdir()):
        for path in folder.iterdir():
            path.unlink()
