"""Reading a label file of any known format."""

from pathlib import Path

from ich_keras.data.labels import LabelTable
from ich_keras.data.rsna_labels import read_rsna_labels


def read_labels(path: Path | str) -> LabelTable:
    """Read a label file, whatever its format.

    Raises:
        UsageError: the file cannot be opened.
        DataError: its content is refused; the message names the first lines.
    """
    return read_rsna_labels(path)
