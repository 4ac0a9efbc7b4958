"""Options that several commands take, and the checks they share."""

from pathlib import Path
from typing import TypeVar

import click

from ich_keras.errors import UsageError
from ich_keras.processes import usable_cores

T = TypeVar("T")

# Of the group, and of `ich-train`, which runs without it.
HELP = {"help_option_names": ["-h", "--help"]}

FOLDER = click.Path(path_type=Path)
DICOM = click.option("--dicom", type=FOLDER, metavar="DIR", help="Folder of DICOM files.")
CACHE = click.option(
    "--cache", "cache_dir", type=FOLDER, required=True, metavar="DIR", help="From `ich cache`."
)
RUN = click.option(
    "--run", "run_dir", type=FOLDER, required=True, metavar="RUN", help="From `ich train`."
)
LABELS_BESIDE = click.option(
    "--labels", type=FOLDER, metavar="CSV", help="Default: those beside the cache."
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    help="Processes that read and cache; default: one per core.",
)
BACKEND = click.option("--backend", help="torch (default), jax or tensorflow.")
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu or cuda; cuda fails where there is no usable GPU.",
)


def required(value: T | None, option: str) -> T:
    """Return the value of an option that this use of the command needs.

    Raises:
        UsageError: it was not given.
    """
    if value is None:
        raise UsageError(f"{option} is missing.")
    return value


def num_workers(given: int | None) -> int:
    """Return the number of worker processes: as given, or one per core."""
    return usable_cores() if given is None else given
