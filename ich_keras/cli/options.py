"""Options and checks that several commands share."""

from pathlib import Path
from typing import TypeVar

import click

from ich_keras.errors import UsageError
from ich_keras.processes import usable_cores

T = TypeVar("T")

# For the group, and for `ich-train`, which runs without the group.
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
    "--labels", type=FOLDER, metavar="CSV", help="Default: the labels the cache was built with."
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    help="Worker processes; default: one per core.",
)
ANY_BODY_PART = click.option(
    "--any-body-part",
    is_flag=True,
    help="Do not ask whether a series shows a head; otherwise other parts are left out.",
)
BACKEND = click.option("--backend", help="torch (default), jax or tensorflow.")
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu or cuda; cuda fails without a usable GPU.",
)


def required(value: T | None, option: str) -> T:
    """Return the value of an option, which must have been given.

    Raises:
        UsageError: it was not given.
    """
    if value is None:
        raise UsageError(f"{option} is missing.")
    return value


def num_workers(given: int | None) -> int:
    """Return the number of worker processes: as given, or one per core."""
    return usable_cores() if given is None else given
