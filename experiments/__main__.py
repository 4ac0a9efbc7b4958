"""The command line: `python -m experiments`. Nothing heavy is imported before a command runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from experiments.pretrain_command import pretrain
from ich_keras.processes import usable_threads
from ich_keras.terminal import HELP, Group, PathType, catch_termination, open_terminal

if TYPE_CHECKING:
    from experiments.scales import Scale

Command = TypeVar("Command", bound=Callable[..., Any])

RESULTS = Path(__file__).parent / "results"
WORK = Path("runs")  # not part of the repository
_FOLDER = PathType(file_okay=False)


def _scale_options(command: Command) -> Command:
    """Add the options for the scale, the data and the folders."""
    for option in (
        click.option(
            "--out", type=_FOLDER, metavar="DIR", help="Folder of the results, tables and figures."
        ),
        click.option(
            "--work",
            type=_FOLDER,
            metavar="DIR",
            help="Folder of caches and runs; default: runs/experiments-SCALE.",
        ),
        click.option(
            "--labels",
            type=PathType(dir_okay=False, exists=True),
            metavar="CSV",
            help="RSNA's label file, stage_2_train.csv; needs --dicom.",
        ),
        click.option(
            "--dicom",
            type=PathType(file_okay=False, exists=True),
            metavar="DIR",
            help="Scale rsna: RSNA's DICOM files, one GPU, the thesis's settings; needs --labels.",
        ),
        click.option(
            "--small", "is_small", is_flag=True, help="Scale small: phantoms, three seeds, hours."
        ),
        click.option(
            "--tiny", "is_tiny", is_flag=True, help="Scale tiny: phantoms, minutes; a trial run."
        ),
    ):
        command = option(command)
    return command


def _run_options(command: Command) -> Command:
    """Add the options for training."""
    for option in (
        click.option(
            "--seeds",
            default="",
            metavar="0,1,...",
            help="Seeds of splits and trainings; default: the scale's.",
        ),
        click.option(
            "--weights-dir",
            type=PathType(file_okay=False, exists=True),
            metavar="DIR",
            help="Folder of converted weights; default: where ich_keras keeps them.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where to train.",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Runs trained at the same time; they share the threads.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            default=usable_threads,
            show_default="OMP_NUM_THREADS, or one per core",
            help="Processor threads, in all.",
        ),
    ):
        command = option(command)
    return _scale_options(command)


@click.group(cls=Group, context_settings=HELP)
def main() -> None:
    """Reproduce the thesis's tables, and answer the questions it left open.

    Finished runs are skipped: after an interruption, give the same command again.
    """
    catch_termination()


@main.command("all")
@_run_options
def everything(**options: Any) -> None:
    """Make tables 1 to 4 and answer the questions leak, views, stride and fractions."""
    from experiments.questions import QUESTIONS, TABLES

    asked = tuple(name for name, question in QUESTIONS.items() if question.in_all)
    _reproduce(TABLES, asked, **options)


@main.command()
@click.argument("number", type=click.IntRange(1, 4))
@_run_options
def table(number: int, **options: Any) -> None:
    """Make what one table of the thesis needs."""
    _reproduce((number,), (), **options)


@main.command()
@click.argument("name")
@_run_options
def question(name: str, **options: Any) -> None:
    """Answer one question: leak, views, stride, fractions, stride-9, memory, intensity, normalise,
    pretraining, thin, kinetics, context or labels."""
    from experiments.questions import QUESTIONS
    from ich_keras.errors import UsageError

    if name not in QUESTIONS:
        raise UsageError(f"question {name!r}; expected one of {', '.join(QUESTIONS)}.")
    _reproduce((), (name,), **options)


@main.command("list")
def show_list() -> None:
    """Print every declared run: purpose, command, machine, expected time, published number."""
    from experiments.listing import listing

    click.echo(listing())


@main.command()
@_scale_options
def report(
    is_tiny: bool,
    is_small: bool,
    dicom: Path | None,
    labels: Path | None,
    work: Path | None,
    out: Path | None,
) -> None:
    """Write tables and figures of the finished runs; --out alone is enough."""
    from experiments.report.page import write_report

    scale = None
    if out is None or is_tiny or is_small or dicom is not None:
        scale = _scale(is_tiny, is_small, dicom).name
        out = out or _out_of(scale, work or WORK / f"experiments-{scale}")
    click.echo(f"Report: {write_report(out, lambda line: click.echo(line, err=True), scale)}")


@main.command()
@click.argument("folders", nargs=-1, type=PathType(file_okay=False, exists=True))
@click.option("--out", type=PathType(dir_okay=False), required=True, metavar="PNG")
@click.option(
    "--columns", type=click.IntRange(min=2), default=8, show_default=True, help="Slices per row."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=4, show_default=True, help="Of the phantoms."
)
def sheet(folders: tuple[Path, ...], out: Path, columns: int, seed: int) -> None:
    """Show slices of DICOM FOLDERS and phantoms side by side, in the same windows."""
    from experiments.sheet import write_sheet

    write_sheet(folders, out, columns, seed)
    click.echo(f"Contact sheet: {out}")


@main.command()
@click.option(
    "--out",
    type=_FOLDER,
    metavar="DIR",
    help="Folder; default: experiments/results.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=9, show_default=True, help="Of the phantoms."
)
def figures(out: Path | None, seed: int) -> None:
    """Draw the thesis's figures 6.2 to 6.4 again, from phantoms."""
    from experiments.thesis_figures import write_figures

    for path in write_figures(out or RESULTS, seed):
        click.echo(f"Figure: {path}")


def _scale(is_tiny: bool, is_small: bool, dicom: Path | None) -> "Scale":
    from experiments.scales import require_scale
    from ich_keras.errors import UsageError

    named = [
        name
        for name, given in (("tiny", is_tiny), ("small", is_small), ("rsna", dicom is not None))
        if given
    ]
    if len(named) != 1:
        raise UsageError(
            f"{'several scales' if named else 'no scale'}; expected one of --tiny, --small,"
            " --dicom DIR.",
            "`report` accepts --out DIR instead.",
        )
    return require_scale(named[0])


def _out_of(scale_name: str, work: Path) -> Path:
    return RESULTS / scale_name if scale_name == "small" else work / "results"


def _reproduce(
    tables: tuple[int, ...],
    questions: tuple[str, ...],
    *,
    is_tiny: bool,
    is_small: bool,
    dicom: Path | None,
    labels: Path | None,
    work: Path | None,
    out: Path | None,
    threads: int,
    jobs: int,
    device: str,
    weights_dir: Path | None,
    seeds: str,
) -> None:
    from experiments.declare import Source, chosen_runs
    from experiments.place import Place
    from ich_keras.environment import choose_device
    from ich_keras.errors import UsageError
    from ich_keras.models.weights_lookup import FOLDER_VARIABLE

    source = None
    if dicom is not None and labels is not None:
        source = Source(str(dicom.absolute()), str(labels.absolute()))
    elif dicom is not None or labels is not None:
        raise UsageError("--dicom and --labels belong together.")
    scale = _scale(is_tiny, is_small, dicom)
    if weights_dir is not None:
        # Through the environment, so that worker processes use it too.
        os.environ[FOLDER_VARIABLE] = str(weights_dir.absolute())
    work = (work or WORK / f"experiments-{scale.name}").absolute()
    place = Place(
        work=work,
        out=(out or _out_of(scale.name, work)).absolute(),
        scale=scale,
        source=source,
        device=device,
        threads=threads,
        jobs=jobs,
    )
    from experiments.report.page import write_report
    from experiments.reproduce import reproduce
    from experiments.scores import sound_results

    choose_device(device)  # now rather than after hours
    sound_results(place.out, scale.name)
    with open_terminal() as terminal:
        reproduce(
            place,
            chosen_runs(scale, tables, questions),
            _seeds(seeds) or scale.seeds,
            terminal.progress,
            terminal.tell,
        )
    click.echo(f"Report: {write_report(place.out, scale=scale.name)}")


def _seeds(text: str) -> tuple[int, ...]:
    from ich_keras.errors import UsageError

    if not text:
        return ()
    parts = [part.strip() for part in text.split(",")]
    seeds = [int(part) if part.isdecimal() else -1 for part in parts]
    if not all(0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise UsageError(
            f"--seeds {text!r}; expected different whole numbers below 2^32, like 0,1,2."
        )
    return tuple(seeds)


@main.command()
@click.option(
    "--work",
    type=_FOLDER,
    default=WORK / "localisation",
    show_default=True,
    metavar="DIR",
    help="Folder of phantoms, cache and runs.",
)
@click.option(
    "--out",
    type=_FOLDER,
    default=RESULTS / "localisation",
    show_default="results/localisation",
    metavar="DIR",
    help="Folder of tables and figures.",
)
@click.option(
    "--run",
    "runs",
    type=PathType(file_okay=False, exists=True),
    multiple=True,
    metavar="RUN",
    help="Score these runs instead of training some; one for each view.",
)
def localisation(work: Path, out: Path, runs: tuple[Path, ...]) -> None:
    """Measure on phantoms whether heat maps point at the bleed; trains three small networks."""
    from experiments.localisation import measure, runs_by_view, scored_phantoms, train_networks
    from experiments.localisation_page import write_page

    def tell(line: str) -> None:
        click.echo(line, err=True)

    chosen = runs_by_view(runs) if runs else train_networks(work.absolute(), tell)
    phantoms = list(scored_phantoms())
    measured = {view: measure(run, phantoms, tell) for view, run in chosen.items()}
    click.echo(f"Report: {write_page(out, measured, phantoms, chosen)}")


@main.command("published-split")
@click.option(
    "--table",
    type=PathType(dir_okay=False, exists=True),
    required=True,
    metavar="CSV",
    help="With PatientIDs, such as slices.csv of an index.",
)
@click.option(
    "--out", type=PathType(dir_okay=False), required=True, metavar="CSV", help="New file."
)
def published_split(table: Path, out: Path) -> None:
    """Write a split that everybody with these patients can make again; prints its SHA-256."""
    from experiments.published_splits import write_split

    click.echo(f"{write_split(table, out)}  {out}")


main.add_command(pretrain)


if __name__ == "__main__":
    main(prog_name="python -m experiments")
