"""Commands on data: phantom, index, cache, audit, doctor."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ich_keras.cli.configuration import names_of
from ich_keras.cli.options import (
    ANY_BODY_PART,
    ANY_IMAGE_TYPE,
    CACHE,
    DICOM,
    EXECUTOR,
    FOLDER,
    LABELS,
    LABELS_BESIDE,
    MAX_REJECTS,
    NAME_OR_PATH,
    SCHEDULER,
    WORKERS,
    chosen_executor,
    num_workers,
    required,
    share_of_rejects,
)
from ich_keras.errors import EXIT_ENVIRONMENT, DataError, UsageError
from ich_keras.labels import LabelSource
from ich_keras.progress import Progress
from ich_keras.terminal import Command, open_terminal

if TYPE_CHECKING:
    from ich_keras.data.cache.cache import CTCache

# Up to this many series, `ich index` describes the spacing and tilt of each.
DESCRIBED_SERIES = 20


@click.command(cls=Command)
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="New folder.")
@click.option("--series", "num_series", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--matrix", type=int, default=512, show_default=True, help="Rows and columns of a slice."
)
@click.option(
    "--spacing",
    "slice_spacing_mm",
    type=float,
    nargs=2,
    default=(5.0, 8.0),
    show_default=True,
    metavar="LOW HIGH",
    help="Smallest and largest distance between slices, mm.",
)
@click.option(
    "--mix",
    type=click.Choice(["even", "rsna"]),
    default="even",
    show_default=True,
    help="How often each subtype occurs: equally often, or as in the RSNA 2019 data.",
)
@click.option(
    "--prevalence",
    type=float,
    help="Share of patients with a bleed; default: 0.5, or 0.4 with --mix rsna.",
)
@click.option(
    "--series-per-patient",
    type=float,
    default=1.3,
    show_default=True,
    help="Average number, from 1 to 4.",
)
@WORKERS
def phantom(out: Path, num_series: int, seed: int, workers: int | None, **options: Any) -> None:
    """Make synthetic head CT in the RSNA layout: images, stage_2_train.csv, masks."""
    from ich_keras.phantom.dicom import write_phantoms

    with open_terminal() as terminal:
        write_phantoms(
            out,
            num_series,
            seed,
            workers=num_workers(workers),
            progress=terminal.progress,
            **options,
        )
        terminal.tell(f"{num_series} synthetic series: {out}")


@click.command(cls=Command)
@DICOM
@LABELS
@click.option("--out", type=FOLDER, required=True, metavar="INDEX", help="New folder.")
@ANY_BODY_PART
@ANY_IMAGE_TYPE
@MAX_REJECTS
@WORKERS
@EXECUTOR
@SCHEDULER
def index(
    dicom: Path | None,
    labels: LabelSource | None,
    out: Path,
    any_body_part: bool,
    any_image_type: bool,
    max_rejects: float | None,
    workers: int | None,
    executor: str | None,
    scheduler: str | None,
) -> None:
    """Find, order and check the series in a folder of DICOM files.

    After an interruption, the same command resumes it.
    """
    from ich_keras.ct.rejects import TooManyRejects, rejects_kept, summary
    from ich_keras.ct.series import LOCK, MANIFEST, SeriesIndex, require_new
    from ich_keras.ct.verdict import shown
    from ich_keras.files import lock
    from ich_keras.workflow import prepare_index

    out = out.absolute()
    # Next to the folder: it survives an interruption and is removed at the end.
    journal = out.with_name(f"{out.name}.journal")
    # Killed between the last two steps, an earlier run has left both.
    is_saved = journal.exists() and (out / MANIFEST).is_file()
    if not is_saved:
        require_new(out)
    with lock(journal.with_name(f"{journal.name}{LOCK}"), is_kept=False) as is_alone:
        try:
            with (
                open_terminal() as terminal,
                rejects_kept(out),
                chosen_executor(executor, scheduler, workers) as cluster,
            ):
                indexed = prepare_index(
                    required(dicom, "--dicom"),
                    labels,
                    workers=num_workers(workers),
                    journal=journal,
                    progress=terminal.progress,
                    tell=terminal.tell,
                    any_body_part=any_body_part,
                    any_image_type=any_image_type,
                    max_rejects=share_of_rejects(max_rejects),
                    executor=cluster,
                )
        except TooManyRejects:
            raise  # the journal stays: another try need not read all headers again
        except DataError:
            journal.unlink(missing_ok=True)
            raise
        if not (is_saved and SeriesIndex.load(out).equals(indexed)):
            indexed.save(out, is_alone)
    journal.unlink(missing_ok=True)  # the very last: whoever finds it knows that there is more
    if len(indexed.series) <= DESCRIBED_SERIES:
        for series_uid in indexed.series["series_uid"]:
            click.echo(f"  {indexed.describe(series_uid)}")
    for verdict, count in indexed.series["verdict"].value_counts().items():
        click.echo(f"  {count:,} series: {shown(verdict)}")
    for line in summary(indexed.rejects):
        click.echo(line)
    click.echo(f"Index: {out}")


@click.command(cls=Command)
@click.option("--index", "index_dir", type=FOLDER, metavar="INDEX", help="From `ich index`.")
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="New folder.")
@click.option(
    "--size",
    type=click.IntRange(min=16),
    default=256,
    show_default=True,
    help="Rows and columns of a cached slice.",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "gzip", "blosc2"]),
    default="none",
    show_default=True,
    help="none is read fastest, by memory map. blosc2 is 2.6 times smaller, is read at about 600"
    " MB/s per core, and needs `pip install 'ich_keras[compression]'`. gzip is as small, is read"
    " and written less than half as fast, and needs nothing. Both are lossless.",
)
@click.option("--verify", is_flag=True, help="Only verify the checksums of the cache in --out.")
@click.option(
    "--restart", is_flag=True, help="Remove what an interrupted build of --out left; start over."
)
@click.option(
    "--shard",
    "part",
    metavar="i/N",
    help="Build only part i of N, beside --out; jobs on several machines may each build one.",
)
@click.option("--join", is_flag=True, help="Make the cache of the parts that --shard built.")
@MAX_REJECTS
@WORKERS
@EXECUTOR
@SCHEDULER
def cache(index_dir: Path | None, out: Path, verify: bool, **options: Any) -> None:
    """Cache the Hounsfield units of an index at one size, or verify a cache.

    An interrupted build goes on from its finished shards.
    """
    from ich_keras.data.cache.cache import CTCache

    cached: CTCache | None
    with open_terminal() as terminal:
        if verify:
            _refuse(("index_dir", *(name for name in options)), "--verify", "It takes --out only.")
            cached = CTCache.open(out)
            cached.verify(progress=terminal.progress)
        else:
            cached = _build(required(index_dir, "--index"), out, terminal.progress, **options)
    if cached is None:
        return
    click.echo(str(cached))
    click.echo(f"{'Verified' if verify else 'Cache'}: {out}")


def _build(
    index_dir: Path,
    out: Path,
    progress: Progress,
    size: int,
    compression: str,
    restart: bool,
    part: str | None,
    join: bool,
    max_rejects: float | None,
    workers: int | None,
    executor: str | None,
    scheduler: str | None,
) -> "CTCache | None":
    """Build a cache, a part of one (returns None), or join its parts."""
    from ich_keras.ct.series import SeriesIndex
    from ich_keras.data.cache.parts import Part, build_part, join_parts, settings_of_parts
    from ich_keras.workflow import make_cache

    settings: dict[str, Any] = {
        "size": size,
        "compression": None if compression == "none" else compression,
        "workers": num_workers(workers),
        "progress": progress,
    }
    if part is not None:
        _refuse(("join",), "--shard", "Build the parts first, then --join alone.")
        _refuse(("max_rejects",), "--shard", "It is for --join, when all parts are there.")
    if join:
        _refuse(("restart", "executor", "scheduler"), "--join", "It reads no DICOM files.")
        given = {name: settings[name] for name in _given(("size", "compression"))}
        settings |= settings_of_parts(out) | given
        index = SeriesIndex.load(index_dir)
        return join_parts(index, out, max_rejects=share_of_rejects(max_rejects), **settings)
    chosen = None if part is None else Part.parse(part)
    with chosen_executor(executor, scheduler, workers) as cluster:
        settings |= {"restart": restart, "executor": cluster}
        index = SeriesIndex.load(index_dir)
        if chosen is None:
            return make_cache(index, out, max_rejects=share_of_rejects(max_rejects), **settings)
        built = build_part(index, out, part=chosen, **settings)
    click.echo(f"{built}: {built.folder}")
    click.echo(f"When all are there: ich cache --index {index_dir} --out {out} --join")
    return None


def _given(names: Iterable[str]) -> list[str]:
    """Return those of the options that were given on the command line."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return [name for name in names if context.get_parameter_source(name) == source]


def _refuse(names: Iterable[str], option: str, hint: str) -> None:
    """Refuse options that do nothing beside another one."""
    told = {"part": "shard"}
    if given := _given(names):
        names = (told.get(name, name.removesuffix("_dir")) for name in given)
        raise UsageError(f"{names_of(dict.fromkeys(names, True))} given with {option}.", hint)


# What `audit_data` counts, in words.
_FINDINGS = {
    "any_without_subtype": "slices with `any` but no subtype",
    "subtype_without_any": "slices with a subtype but not `any`",
    "unlabelled": "slices without labels",
    "partly_labelled_series": "series with labels for only some of their slices",
    "same_place_other_labels": "pairs of slices at one position with different labels",
    "groups": "groups of slices with equal pixels",
    "slices": "slices in these groups",
    "of_different_patients": "groups from more than one patient",
    "of_different_series": "groups from more than one series",
    "with_different_labels": "groups with contradictory labels",
}


@click.command(cls=Command)
@CACHE
@LABELS_BESIDE
@click.option(
    "--split",
    type=NAME_OR_PATH,
    help="patient, thesis-slices, ..., a file, or a run's split.json.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=FOLDER, metavar="JSON", help="Also write all findings to this file.")
def audit(
    cache_dir: Path, labels: LabelSource | None, split: str | None, seed: int, out: Path | None
) -> None:
    """Check for leakage between splits, and for contradictory labels.

    Looks for patients, studies, series and slices in more than one split, for slices with equal
    pixels, and for faults in the labels. Fails (exit code 3) when the split leaks, unless it is one
    of the splits known to leak.
    """
    from ich_keras.data.leakage import audit_data
    from ich_keras.data.split import LEAKING, find_split
    from ich_keras.files import require_absent, write_json
    from ich_keras.workflow import open_cache

    if out is not None:
        out = require_absent(out)
    cached = open_cache(cache_dir, labels)
    chosen = None if split is None else find_split(split, cached.slices, seed, cached.labels)
    with open_terminal() as terminal:
        result = audit_data(cached, chosen, terminal.progress)
    if out is not None:
        write_json(out, result)
    for title, counts in (("labels", result["labels"]), ("equal pixels", result["equal_pixels"])):
        click.echo(f"{title}:")
        for name, count in counts.items():
            click.echo(f"  {count:,} {_FINDINGS[name]}")
    if chosen is None:
        return
    click.echo(f"split {chosen.name}:")
    if chosen.note:
        click.echo(f"  {chosen.note}")
    for part, counts in result["split"]["parts"].items():
        groups = ", ".join(f"{counts[name]:,} {name}" for name in counts if name != "positive")
        click.echo(f"  {part:5} {groups}")
    for leak in result["leaks"]:
        click.echo(f"  LEAK: {leak}")
    if result["leaks"] and chosen.name not in LEAKING:
        raise DataError(
            f"split {chosen.name!r} leaks.", "Put all data of a patient into one split."
        )
    if not result["leaks"]:
        click.echo("  no leak found")


@click.command(cls=Command)
@click.option("--folder", type=FOLDER, default=Path(), help="Where runs would be written.")
@click.pass_context
def doctor(ctx: click.Context, folder: Path) -> None:
    """Check versions, backend, device, decoders and disk; exit code 4 when something is missing."""
    from ich_keras import environment

    rows = environment.doctor(folder)
    for what, is_well, detail in rows:
        is_absent = detail.startswith(("not installed", "no:"))
        mark = ("-" if is_absent else "ok") if is_well else "BAD"
        click.echo(f"{mark:3}  {what:28} {detail}")
    if not all(is_well for _, is_well, _ in rows):
        ctx.exit(EXIT_ENVIRONMENT)
