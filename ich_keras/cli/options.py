"""Options and checks that several commands share."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import click

from ich_keras.errors import UsageError
from ich_keras.labels import LabelSource
from ich_keras.processes import usable_cores
from ich_keras.terminal import HELP as HELP
from ich_keras.terminal import NameOrPathType, PathType

T = TypeVar("T")

FOLDER = PathType()
NAME_OR_PATH = NameOrPathType()
DICOM = click.option(
    "--dicom",
    type=FOLDER,
    metavar="DIR",
    help="Folder of DICOM files, NIfTI volumes (.nii, .nii.gz) and archives of them (zip, tar), or"
    " one such file.",
)
CACHE = click.option(
    "--cache", "cache_dir", type=FOLDER, required=True, metavar="DIR", help="From `ich cache`."
)
RUN = click.option(
    "--run", "run_dir", type=FOLDER, required=True, metavar="RUN", help="From `ich train`."
)


def label_options(text: str) -> Callable[[Callable], Callable]:
    """Add --labels, --label-map and --exclusive; the function gets `labels`, a LabelSource."""

    def add(function: Callable) -> Callable:
        @functools.wraps(function)
        def with_source(
            *args: Any, labels: Path | None, label_map: str | None, exclusive: bool, **others: Any
        ) -> Any:
            if labels is None and (label_map is not None or exclusive):
                option = "--exclusive" if label_map is None else "--label-map"
                raise UsageError(f"{option} is about --labels, which is missing.")
            source = None if labels is None else LabelSource(labels, label_map, exclusive)
            return function(*args, labels=source, **others)

        for option in (_EXCLUSIVE, _LABEL_MAP):
            with_source = option(with_source)
        return click.option("--labels", type=FOLDER, metavar="CSV", help=text)(with_source)

    return add


_LABEL_MAP = click.option(
    "--label-map",
    metavar="MAP",
    help="Columns of --labels to use, and their labels: 'ICH=any,IPH=intraparenchymal,Normal=!any'"
    " (! for the opposite), or a JSON file. RSNA's labels and their abbreviations are known.",
)
_EXCLUSIVE = click.option(
    "--exclusive", is_flag=True, help="Exactly one of the labels is 1 in every row (a softmax)."
)
LABELS = label_options(
    "Labels: RSNA's stage_2_train.csv, CQ500's reads.csv, PhysioNet's hemorrhage_diagnosis.csv, or"
    " a table with one column of identifiers and one per label."
)
LABELS_BESIDE = label_options("Default: the labels the cache was built with.")
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=None,
    help="Worker processes; default: one per core.",
)
EXECUTOR = click.option(
    "--executor",
    type=click.Choice(["dask"]),
    help="Work on a cluster instead of on this machine; its workers must see the same files under"
    " the same paths. Needs `pip install 'ich_keras[dask]'`.",
)
SCHEDULER = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Of the cluster: tcp://HOST:8786, or its scheduler file.",
)
ANY_BODY_PART = click.option(
    "--any-body-part",
    is_flag=True,
    help="Use series of any part of the body; without it, series that do not show a head are left"
    " out.",
)
ANY_IMAGE_TYPE = click.option(
    "--any-image-type",
    is_flag=True,
    help="Use images whatever their Image Type, localizers excepted; without it, those that are not"
    " acquired slices (reformatted, maps, pages) are left out.",
)
MAX_REJECTS = click.option(
    "--max-rejects",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Fail when more than this share of the files that should be slices are refused;"
    " default 0.2.",
)
THIN = click.option(
    "--thin",
    type=click.Choice(["average", "keep"]),
    help="Series whose slices are at most half as far apart as those of the training: average"
    " neighbouring slices to the training's distance (default), or keep them as they are.",
)
SHOW_PATIENT = click.option(
    "--show-patient", is_flag=True, help="Tell the PatientID of each series on the page."
)
UNFINISHED_RUN = click.option(
    "--unfinished",
    is_flag=True,
    help="Take the best weights so far of a training that was interrupted or still runs.",
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


def numbers_of_labels(
    ctx: click.Context, param: click.Parameter, given: tuple[str, ...]
) -> dict[str, float] | None:
    """Read LABEL=NUMBER options; None where none is given. Labels and ranges are checked later."""
    found: dict[str, float] = {}
    for text in given:
        label, _, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value)
        except ValueError:
            raise click.BadParameter(
                f"{text!r} is not LABEL=NUMBER, such as any=3.", ctx, param
            ) from None
        if not label or label in found:
            raise click.BadParameter(
                f"{text!r} names no label." if not label else f"{label!r} is given twice.",
                ctx,
                param,
            )
        found[label] = number
    return found or None


def num_workers(given: int | None) -> int:
    """Return the number of worker processes: as given, or one per core."""
    return usable_cores() if given is None else given


@contextlib.contextmanager
def chosen_executor(
    executor: str | None, scheduler: str | None, workers: int | None
) -> Iterator[Executor | None]:
    """Connect to the cluster that was asked for; without one, yield None.

    Raises:
        UsageError: options that do not go together.
        EnvironmentProblem: as `ich_keras.executors.dask_executor`.
    """
    if executor is None:
        if scheduler is not None:
            raise UsageError("--scheduler given without --executor.", "Add --executor dask.")
        yield None
        return
    if workers is not None:
        raise UsageError(
            "--workers given with --executor.", "The cluster decides how many workers there are."
        )
    from ich_keras.executors import dask_executor

    with dask_executor(required(scheduler, "--scheduler")) as found:
        yield found


def share_of_rejects(given: float | None) -> float:
    """Return the largest share of refused files: as given, or the usual one."""
    # Here, because pandas comes with it, which would slow down `--help`.
    from ich_keras.ct.rejects import MAX_REJECTS as USUAL

    return USUAL if given is None else given
