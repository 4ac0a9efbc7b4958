"""The command line: `ich` and its commands; `ich-train` is `ich train`.

Every command parses, calls one public function and prints. Nothing heavy is imported before a
command runs: `--help` answers at once, and `--backend` acts before Keras is loaded.
"""

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import click

from ich_keras import __version__
from ich_keras.errors import EXIT_ENVIRONMENT, DataError, StaleError, UsageError
from ich_keras.processes import usable_cores
from ich_keras.terminal import Group, catch_termination

# `ich index` tells spacing and tilt of every series when there are no more than these.
DESCRIBED_SERIES = 20
SAMPLE_NAMES = {"slice": "slices", "slab": "slabs", "series": "series"}


FOLDER = click.Path(path_type=Path)
DICOM = click.option("--dicom", type=FOLDER, metavar="DIR", help="Folder of DICOM files.")
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
    help="auto, cpu or cuda; cuda fails when it is not there.",
)


# Of the group, and of `ich-train`, which runs without it.
HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=Group, context_settings=HELP)
@click.version_option(__version__, prog_name="ich")
def main() -> None:
    """Detect intracranial haemorrhage and its five subtypes on head CT.

    Not a medical device; not for clinical use.
    """
    catch_termination()


@main.command()
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
    help="Least and greatest distance of slices, mm.",
)
@click.option(
    "--mix",
    type=click.Choice(["even", "rsna"]),
    default="even",
    show_default=True,
    help="Subtypes equally often, or as often as in the RSNA 2019 data.",
)
@click.option(
    "--prevalence", type=float, help="Part of the patients that bleed; default: 0.5, for rsna 0.4."
)
@click.option(
    "--series-per-patient", type=float, default=1.3, show_default=True, help="On average, 1 to 4."
)
@WORKERS
def phantom(out: Path, num_series: int, seed: int, workers: int | None, **options) -> None:
    """Make synthetic head CT in the RSNA layout: images, stage_2_train.csv, masks."""
    from ich_keras.phantom.dicom import write_phantoms
    from ich_keras.terminal import terminal_progress

    with terminal_progress() as progress:
        write_phantoms(
            out,
            num_series,
            seed,
            workers=usable_cores() if workers is None else workers,
            progress=progress,
            **options,
        )
    click.echo(f"{num_series} synthetic series: {out}")


@main.command()
@DICOM
@click.option("--labels", type=FOLDER, metavar="CSV", help="RSNA's stage_2_train.csv.")
@click.option("--out", type=FOLDER, required=True, metavar="INDEX", help="New folder.")
@WORKERS
def index(dicom: Path | None, labels: Path | None, out: Path, workers: int | None) -> None:
    """Find, order and judge the series in a folder of DICOM files."""
    from ich_keras.files import require_absent
    from ich_keras.preparation import prepare_index
    from ich_keras.terminal import terminal_progress

    out = require_absent(out).absolute()
    # Beside the folder: it stays when the indexing is interrupted, and goes at its end.
    journal = out.with_name(f"{out.name}.journal")
    try:
        with terminal_progress() as progress:
            found = prepare_index(
                _required(dicom, "--dicom"),
                labels,
                workers=usable_cores() if workers is None else workers,
                journal=journal,
                progress=progress,
                tell=click.echo,
            )
    except DataError:
        journal.unlink(missing_ok=True)
        raise
    found.save(out)
    journal.unlink(missing_ok=True)
    if len(found.series) <= DESCRIBED_SERIES:
        for series_uid in found.series["series_uid"]:
            click.echo(f"  {found.describe(series_uid)}")
    for verdict, count in found.series["verdict"].value_counts().items():
        click.echo(f"  {count} series: {verdict}")
    for code, count in found.rejects["code"].value_counts().items():
        click.echo(f"  {count} rejects: {code}")
    click.echo(f"Index: {out}")


@main.command()
@click.option("--index", "index_dir", type=FOLDER, metavar="INDEX", help="From `ich index`.")
@click.option("--out", type=FOLDER, required=True, metavar="DIR", help="New folder.")
@click.option(
    "--size",
    type=click.IntRange(min=16),
    default=256,
    show_default=True,
    help="Rows and columns of a cached slice.",
)
@click.option("--verify", is_flag=True, help="Check every checksum of the cache in --out instead.")
@WORKERS
def cache(index_dir: Path | None, out: Path, size: int, verify: bool, workers: int | None) -> None:
    """Cache the Hounsfield units of an index at one size, or verify such a cache."""
    from ich_keras.ct.series import SeriesIndex
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.preparation import make_cache
    from ich_keras.terminal import terminal_progress

    with terminal_progress() as progress:
        if verify:
            made = CTCache.open(out)
            made.verify(progress=progress)
        else:
            made = make_cache(
                SeriesIndex.load(_required(index_dir, "--index")),
                out,
                size,
                workers=usable_cores() if workers is None else workers,
                progress=progress,
            )
    click.echo(repr(made))
    click.echo(f"{'Verified' if verify else 'Cache'}: {out}")


@main.command(name="train", context_settings=HELP)
@DICOM
@click.option("--labels", type=FOLDER, metavar="CSV", help="RSNA's stage_2_train.csv.")
@click.option(
    "--cache",
    "cache_dir",
    type=FOLDER,
    metavar="DIR",
    help="The cache: read when it exists, built from --dicom when not. Default: RUN-cache.",
)
@click.option("--out", type=FOLDER, metavar="RUN", help="New run folder; default: runs/DATE-TIME.")
@click.option("--config", "config_file", type=FOLDER, metavar="JSON", help="A run's config.json.")
@click.option("--preset", help="Network; default resnet18_2d.")
@click.option(
    "--weights",
    help="A .weights.h5 file, or converted weights by name (imagenet, torchvision_resnet18, ...);"
    " default: from scratch.",
)
@click.option("--download", is_flag=True, help="Fetch and convert the weights named first.")
@click.option("--norm", help="batch (default), frozen (needs weights) or group.")
@click.option("--intensity", help="windows, wide or head-z-score; default: what fits the weights.")
@click.option(
    "--size", type=int, help="Rows and columns of the input; default 256, or the cache's."
)
@click.option("--split", help="patient (default), none, thesis-slices, thesis-series, or a file.")
@click.option("--view", help="slice, slab or series; default: what the preset is for.")
@click.option("--slices", type=int, metavar="N", help="Of a slab (default 5) or series (60).")
@click.option("--edge", help="Beyond the ends of a series a slab has air (default) or repeat.")
@click.option(
    "--long-series", help="Longer series: spread (default: evenly spaced slices) or middle."
)
@click.option("--tilted", help="Tilted slabs and series: keep (default), skip or deshear.")
@click.option(
    "--reverse/--no-reverse",
    default=None,
    help="Turn every second slab or series upside down in training.",
)
@click.option("--epochs", type=int, help="Default 6.")
@click.option(
    "--batch-size", type=int, help="Samples a step; default 32 slices, 16 slabs or 1 series."
)
@click.option("--learning-rate", type=float, help="Default 1e-5 with --weights, 3e-4 without.")
@click.option(
    "--backbone-factor", type=float, metavar="X", help="Backbone at X times the rate; default 1."
)
@click.option(
    "--freeze", help="Keep all up to stem, layer1, ... layer4 as it is; default: nothing."
)
@click.option("--schedule", help="constant (default) or cosine.")
@click.option("--warmup-steps", type=int, help="Steps of linear rise; default 0.")
@click.option("--weight-decay", type=float, help="Decoupled; default 0.")
@click.option(
    "--accumulate",
    type=int,
    metavar="N",
    help="Batches that make one optimiser step; default 8 of series, else 1.",
)
@click.option(
    "--precision",
    help="auto (default: bfloat16 on torch where the hardware has it), float32, bfloat16 or"
    " float16.",
)
@click.option("--step", help="fast (default) or stock: Keras' own steps.")
@click.option(
    "--recompute", help="stage or block: less memory, a longer step; default: keep everything."
)
@click.option(
    "--compiled/--not-compiled", default=None, help="torch.compile; default: on a GPU only."
)
@click.option("--loss", help="bce (default) or rsna (any counted twice).")
@click.option("--balance/--no-balance", default=None, help="One negative slice per positive one.")
@click.option("--augment", help="thesis (default), flip (left-right only) or none.")
@click.option(
    "--loader-workers",
    type=int,
    metavar="N",
    help="Processes that make batches; default 0. The batches are the same.",
)
@click.option("--limit-series", type=int, metavar="N", help="Use the first N series only.")
@click.option("--seed", type=int, help="Default 0.")
@click.option(
    "--resume",
    type=FOLDER,
    metavar="RUN",
    help="Go on with an interrupted training; takes --cache, --labels and --device only.",
)
@BACKEND
@click.option("--device", help="auto (default), cpu or cuda; cuda fails when it is not there.")
@WORKERS
@click.option("--plan", is_flag=True, help="Say what would be done and how long; write nothing.")
def train_main(
    dicom: Path | None,
    labels: Path | None,
    cache_dir: Path | None,
    out: Path | None,
    config_file: Path | None,
    workers: int | None,
    plan: bool,
    download: bool,
    resume: Path | None,
    **options,
) -> None:
    """Train a classifier, keep its best weights, evaluate them.

    With --dicom and --labels on your data; with --cache on a cache; with neither of them the demo:
    synthetic head CT, four minutes on two cores.

    Not a medical device; not for clinical use.
    """
    catch_termination()
    from ich_keras.environment import choose_backend, choose_device
    from ich_keras.terminal import terminal_progress

    if resume is not None:
        others = {"dicom": dicom, "out": out, "config": config_file, "workers": workers}
        flags = {"plan": plan or None, "download": download or None}
        device = options.pop("device")
        _resume(resume, cache_dir, labels, device, options | others | flags)
        return
    size_is_given = options["size"] is not None or config_file is not None
    config = _run_config(config_file, options)
    backend = choose_backend(config.backend)
    workers = usable_cores() if workers is None else workers
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    with terminal_progress() as progress:
        if dicom is None and cache_dir is None:
            _refuse_without_data(
                options | {"labels": labels, "config": config_file, "download": download or None}
            )
            _demo(out, config, plan, workers, progress)
            return
        device = choose_device(config.device)
        click.echo(f"Backend {backend}, device {device}.")
        if download:
            # The one place that looks up at weights_convert, and only when asked to.
            from weights_convert.fetching import ensure_weights

            ensure_weights(_required(config.weights, "--weights"), config.preset, progress)
        _train_on_data(
            dicom, labels, cache_dir, out, config, size_is_given, workers, plan, progress
        )


def _required(value, option: str):
    if value is None:
        raise UsageError(f"{option} is missing.")
    return value


def _run_config(config_file: Path | None, options: dict):
    """Lay the given options over a config file, or over the defaults."""
    from ich_keras.config import RunConfig
    from ich_keras.files import read_json

    content = {}
    if config_file is not None:
        try:
            content = read_json(config_file)
        except (StaleError, IsADirectoryError) as error:
            raise UsageError(f"--config {config_file}: {error}") from error
    content = RunConfig.from_dict(content).to_dict()
    for name, value in options.items():
        if value is None:
            continue
        place = next(part for part in (content, content["data"], content["fit"]) if name in part)
        place[name] = value
    return RunConfig.from_dict(content)


def _resume(
    run_dir: Path, cache_dir: Path | None, labels: Path | None, device: str | None, options: dict
) -> None:
    from ich_keras.preparation import open_cache
    from ich_keras.run_folder import RunFolder
    from ich_keras.terminal import terminal_progress
    from ich_keras.training import cache_of, resume

    given = _names(options)
    if given:
        raise UsageError(
            f"{given} given with --resume: the run's own configuration holds.",
            "Leave it out, or start a new training.",
        )
    RunFolder.at(run_dir).require_interrupted()
    cache_dir = cache_dir or cache_of(run_dir) or _cache_beside(run_dir)
    if not cache_dir.exists():
        raise UsageError(
            f"the cache {cache_dir} does not exist.",
            "Give --cache: where the one that the training began with is now.",
        )
    cached = open_cache(cache_dir, labels)
    with terminal_progress() as progress, _how_to_go_on(run_dir, labels):
        resume(run_dir, cached, device, progress, tell=click.echo)
    _show_result(run_dir)


def _cache_beside(run_dir: Path) -> Path:
    # Beside the run, not in it: the next run on the same data uses it again.
    return run_dir.absolute().with_name(f"{run_dir.absolute().name}-cache")


@contextlib.contextmanager
def _how_to_go_on(run_dir: Path, labels: Path | None) -> Iterator[None]:
    """Say, when a training is interrupted (Ctrl-C or SIGTERM), which command goes on."""
    from ich_keras.run_folder import RunFolder

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if RunFolder.at(run_dir).is_interrupted:
            words = ["ich-train", "--resume", str(run_dir)]
            words += [] if labels is None else ["--labels", str(labels)]
            click.echo(f"To go on: {shlex.join(words)}", err=True)
        raise


def _show_result(run_dir: Path) -> None:
    click.echo((run_dir / "report.md").read_text(encoding="utf-8").split("## History")[0])
    click.echo(f"Run folder: {run_dir}")


def _names(options: dict, but: tuple[str, ...] = ()) -> str:
    """Return the names of the options that were given, without some."""
    given = [name for name, value in options.items() if value is not None and name not in but]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _refuse_without_data(options: dict) -> None:
    given = _names(options, but=_DEMO_OPTIONS)
    if given:
        raise UsageError(
            f"{given} given, but no data.",
            "Add --dicom DIR or --cache DIR; without data only the demo runs, which takes"
            " --out, --seed, --backend, --device and --workers.",
        )


_DEMO_OPTIONS = ("seed", "backend", "device")


def _demo(out: Path, config, plan: bool, workers: int, progress) -> None:
    if plan:
        raise UsageError("--plan needs --dicom or --cache.", "The demo takes about four minutes.")
    from ich_keras.demo import run_demo
    from ich_keras.environment import choose_backend, choose_device

    device = choose_device(config.device)
    backend = choose_backend(config.backend)
    click.echo(f"Demo on synthetic head CT; backend {backend}, device {device}.")
    began = time.monotonic()
    result = run_demo(
        out,
        seed=config.seed,
        device=config.device,
        workers=workers,
        progress=progress,
        tell=click.echo,
    )
    click.echo(f"Run folder: {result.run_dir}  ({time.monotonic() - began:.0f} s)")


def _train_on_data(
    dicom, labels, cache_dir, out, config, size_is_given, workers, plan, progress
) -> None:
    from dataclasses import replace

    from ich_keras.files import require_absent
    from ich_keras.planning import plan_of
    from ich_keras.preparation import make_cache, open_cache, prepare_index
    from ich_keras.recipe import Recipe
    from ich_keras.training import train

    require_absent(out)
    cache_dir = cache_dir or _cache_beside(out)
    if dicom is not None and labels is None:
        raise UsageError("--labels is missing.", "Training needs --labels stage_2_train.csv.")
    index = None
    if dicom is not None:
        index = prepare_index(
            dicom, labels, config.data.limit_series, workers, progress=progress, tell=click.echo
        )
    existing = cache_dir.exists()
    if existing:
        cached = open_cache(cache_dir, labels)
        if index is not None:
            cached.require(index=index.usable())
        if not size_is_given:
            config = replace(config, data=replace(config.data, size=cached.size))
        tables, cache_size = cached, cached.size
    elif index is not None:
        tables, cache_size = index.usable(), None
    else:
        raise UsageError(f"the cache {cache_dir} does not exist.", "Add --dicom to build it.")
    recipe = Recipe.of(config, cache_size)
    training = plan_of(tables.slices, tables.series, recipe)
    size = config.data.size
    _show_plan(training, recipe)
    if plan:
        _show_costs(training, recipe, None if existing else len(tables.slices) * size * size * 2)
        return
    if not existing:
        cached = make_cache(index, cache_dir, size, workers, progress)
    with _how_to_go_on(out, labels):
        train(config, cached, out, progress=progress, tell=click.echo)
    _show_result(out)


def _show_plan(training, recipe) -> None:
    for name in training.num_slices:
        click.echo(
            f"  {name:5} {training.num_patients[name]:,} patients,"
            f" {training.num_series[name]:,} series, {training.num_slices[name]:,} slices"
        )
    click.echo(
        f"  {recipe.training.epochs} epochs of {training.steps_per_epoch:,} steps,"
        f" {training.samples_per_epoch:,} {SAMPLE_NAMES[recipe.inputs.view.kind]} each"
    )
    if recipe.training.accumulate > 1:
        click.echo(
            f"  {recipe.training.accumulate} batches of {recipe.training.batch_size} per"
            " optimiser step"
        )
    if training.weights:
        click.echo(f"  weights: {training.weights}")
    if training.note:
        click.echo(f"  {training.note}")
    if training.warning:
        click.echo(f"Warning: {training.warning}", err=True)


def _show_costs(training, recipe, cache_bytes: int | None) -> None:
    from ich_keras.fitting import seconds_per_step

    if cache_bytes is not None:
        click.echo(f"  cache to build: {cache_bytes / 2**30:.2f} GiB")
    seconds = seconds_per_step(recipe) * training.total_steps
    click.echo(
        f"  about {seconds / 60:.0f} minutes of training steps here (one step measured;"
        " reading, augmentation and validation come on top)"
    )
    click.echo("Nothing was written.")


@main.command()
@click.option("--run", "run_dir", type=FOLDER, required=True, metavar="RUN", help="Run folder.")
@click.option("--cache", "cache_dir", type=FOLDER, required=True, metavar="DIR", help="Cache.")
@click.option("--labels", type=FOLDER, metavar="CSV", help="Default: those beside the cache.")
@click.option("--split", default="test", show_default=True, help="train, valid or test.")
@BACKEND
@DEVICE
def evaluate(run_dir, cache_dir, labels, split, backend, device) -> None:
    """Evaluate a run on one split of its cache; writes metrics and predictions into the run."""
    from ich_keras import evaluation
    from ich_keras.environment import choose_backend
    from ich_keras.preparation import open_cache
    from ich_keras.report import markdown_table, summary_rows, trivial_line
    from ich_keras.terminal import terminal_progress

    choose_backend(backend)
    with terminal_progress() as progress:
        metrics = evaluation.evaluate(
            run_dir, open_cache(cache_dir, labels), split, device=device, progress=progress
        )
    for level, found in metrics.items():
        click.echo(f"\nPer {level}, {split} split:\n")
        header = ["metric", "model", "prevalence", "all negative", "skill"]
        click.echo(markdown_table(header, summary_rows(found)))
        if trivial_line(found):
            click.echo(f"\n{trivial_line(found)}")
    click.echo(f"\nWritten to {run_dir}: metrics-{split}.json, predictions-{split}.csv")


@main.command()
@click.option("--run", "run_dir", type=FOLDER, required=True, metavar="RUN", help="Run folder.")
@DICOM
@click.option("--out", type=FOLDER, required=True, metavar="OUT", help="New folder.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Default: that of the run.")
@WORKERS
@BACKEND
@DEVICE
def predict(run_dir, dicom, out, batch_size, workers, backend, device) -> None:
    """Predict every head CT slice in a folder: predictions.csv, series.csv, rejects.csv.

    A run on whole series predicts series only.

    Not a medical device; not for clinical use.
    """
    from ich_keras.environment import choose_backend
    from ich_keras.prediction import predict_folder
    from ich_keras.terminal import terminal_progress

    choose_backend(backend)
    with terminal_progress() as progress:
        result = predict_folder(
            run_dir,
            _required(dicom, "--dicom"),
            out,
            batch_size=batch_size,
            workers=usable_cores() if workers is None else workers,
            device=device,
            progress=progress,
        )
    click.echo(repr(result))
    click.echo(f"Predictions: {out}")


@main.command()
@click.option("--cache", "cache_dir", type=FOLDER, required=True, metavar="DIR", help="Cache.")
@click.option("--labels", type=FOLDER, metavar="CSV", help="Default: those beside the cache.")
@click.option("--split", help="patient, thesis-slices, ..., a file, or a run's split.json.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--out", type=FOLDER, metavar="JSON", help="Write all that was found, too.")
def audit(cache_dir, labels, split, seed, out) -> None:
    """Look for leakage between splits, and for labels that contradict each other.

    Patients, studies, series and slices in two parts, slices with equal pixels, labels. Fails
    (exit code 3) when the split leaks and is none of those that are known to.
    """
    from ich_keras.data.leakage import audit_data
    from ich_keras.data.split import LEAKING, find_split
    from ich_keras.files import require_absent, write_json
    from ich_keras.preparation import open_cache
    from ich_keras.terminal import terminal_progress

    if out is not None:
        out = require_absent(out)
    cached = open_cache(cache_dir, labels)
    chosen = None if split is None else find_split(split, cached.slices, seed)
    with terminal_progress() as progress:
        found = audit_data(cached, chosen, progress)
    if out is not None:
        write_json(out, found)
    for title, counts in (("labels", found["labels"]), ("equal pixels", found["equal_pixels"])):
        click.echo(f"{title}:")
        for name, count in counts.items():
            click.echo(f"  {count:,} {name.replace('_', ' ')}")
    if chosen is None:
        return
    click.echo(f"split {chosen.name}:")
    for part, counts in found["split"]["parts"].items():
        groups = ", ".join(f"{counts[name]:,} {name}" for name in counts if name != "positive")
        click.echo(f"  {part:5} {groups}")
    for leak in found["leaks"]:
        click.echo(f"  LEAK: {leak}")
    if found["leaks"] and chosen.name not in LEAKING:
        raise DataError(f"split {chosen.name!r} leaks.", "Put all of a patient into one split.")
    if not found["leaks"]:
        click.echo("  no leak found")


@main.command()
@click.option(
    "--predictions", type=FOLDER, required=True, metavar="CSV", help="predictions.csv of a run."
)
@click.option("--out", type=FOLDER, required=True, metavar="CSV", help="New file.")
def submission(predictions, out) -> None:
    """Write predictions in the format of RSNA's 2019 competition."""
    from ich_keras.submission import write_submission

    click.echo(f"Submission: {write_submission(predictions, out)}")


@main.command()
@click.option("--preset", "names", multiple=True, help="Only this one; may be repeated.")
def presets(names: tuple[str, ...]) -> None:
    """List the networks: input, depth, operations, parameters, memory, weights."""
    from ich_keras.environment import choose_backend
    from ich_keras.models.presets import PRESETS

    choose_backend()
    from ich_keras.models.cost import preset_table

    click.echo(preset_table(names or tuple(PRESETS)))


@main.command()
@click.option("--folder", type=FOLDER, default=Path(), help="Where runs would be written.")
@click.pass_context
def doctor(ctx: click.Context, folder: Path) -> None:
    """Check versions, backend, device, decoders and disk; the exit code tells."""
    from ich_keras import environment

    rows = environment.doctor(folder)
    for what, is_well, detail in rows:
        click.echo(f"{'ok ' if is_well else 'BAD'}  {what:28} {detail}")
    if not all(is_well for _, is_well, _ in rows):
        ctx.exit(EXIT_ENVIRONMENT)
