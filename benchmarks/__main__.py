"""The command line: `python -m benchmarks`. Nothing heavy is imported before a command runs."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.cases import CASES, MONAI, OURS, PLAIN, STOCK
from benchmarks.report.jobs import TASKS
from ich_keras.processes import usable_cores, usable_threads
from ich_keras.terminal import HELP, Group, PathType, catch_termination

if TYPE_CHECKING:
    from benchmarks.cases import Setting

PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="auto: bfloat16 where the hardware supports it.",
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
THREADS = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=usable_threads,
    show_default="OMP_NUM_THREADS, or one per core",
    help="Threads of torch on the CPU.",
)
_CUDA_STEPS = 30
TINY = click.option("--tiny", "is_tiny", is_flag=True, help="A trial: tiny inputs, one repeat.")


@click.group(cls=Group, context_settings=HELP)
def main() -> None:
    """Measure how fast ich_keras is, beside plain torch and stock Keras."""
    catch_termination()


@main.command()
@TINY
@PRECISION
@DEVICE
@THREADS
@click.option(
    "--repeats", type=click.IntRange(min=1), help="Timed runs of each variant; default: 5."
)
@click.option(
    "--cases", "names", default="", metavar="A,B", help="Only these cases; HOWTO.md lists them."
)
@click.option("--whole", is_flag=True, help="Also whole series of 60x256x256: minutes per step.")
@click.option("--no-stock", is_flag=True, help="Leave out stock Keras, which is slow.")
@click.option("--memory", is_flag=True, help="Also measure the peak memory of training.")
@click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="Folder of the CSV; default: benchmarks/results, or runs with --tiny.",
)
def model(
    is_tiny: bool,
    precision: str,
    device: str,
    threads: int,
    repeats: int | None,
    names: str,
    whole: bool,
    no_stock: bool,
    memory: bool,
    out: Path | None,
) -> None:
    """Measure training, prediction and the optimiser of the networks."""
    from benchmarks.cases import choose_cases
    from benchmarks.records import RESULTS, TRIALS, describe_place, file_name

    cases = choose_cases(names, whole, is_tiny)
    setting = _setting(precision, device, threads, not no_stock, is_tiny)
    place = describe_place(setting.device, threads)
    folder = out or (TRIALS if is_tiny else RESULTS)
    bench = "model-tiny" if is_tiny else "model"
    path = folder / file_name(bench, place, setting.precision)

    from benchmarks.model import measure

    repeats = repeats or (1 if is_tiny else 5)
    measure(cases, setting, repeats, path, place, memory, click.echo)
    click.echo(f"Results: {path}")


@main.command()
@TINY
@click.option(
    "--repeats", type=click.IntRange(min=1), help="Timed passes over all slices; default: 7."
)
@click.option("--out", type=PathType(), metavar="DIR", help="Folder of the CSV; as for model.")
def checks(is_tiny: bool, repeats: int | None, out: Path | None) -> None:
    """Measure what the checks of files and pixels cost per slice."""
    from benchmarks.checks import measure
    from benchmarks.records import RESULTS, TRIALS, describe_place, file_name

    place = describe_place("cpu", 1)
    bench = "checks-tiny" if is_tiny else "checks"
    path = (out or (TRIALS if is_tiny else RESULTS)) / file_name(bench, place, "int16")
    series, matrix = (1, 64) if is_tiny else (2, 512)
    measure(series, matrix, repeats or (1 if is_tiny else 7), path, place, click.echo)
    click.echo(f"Results: {path}")


@main.command()
@TINY
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=usable_cores,
    show_default="one per core",
    help="Processes that read; one is measured, too.",
)
@click.option("--series", type=click.IntRange(min=1), help="Series to draw; default: 30.")
@click.option("--repeats", type=click.IntRange(min=1), help="Timed runs of each way; default: 5.")
@click.option("--out", type=PathType(), metavar="DIR", help="Folder of the CSV; as for model.")
def building(
    is_tiny: bool, workers: int, series: int | None, repeats: int | None, out: Path | None
) -> None:
    """Measure how long index and cache take, beside pydicom and a process pool.

    From a folder and a zip, in processes and on a Dask cluster of this machine, uncompressed and
    compressed, and of ten times as many slices. The files are in the page cache.
    """
    from benchmarks.building import measure
    from benchmarks.records import RESULTS, TRIALS, describe_place, file_name

    place = describe_place("cpu", workers)
    bench = "building-tiny" if is_tiny else "building"
    path = (out or (TRIALS if is_tiny else RESULTS)) / file_name(bench, place, "int16")
    series, matrix = (series or 1, 64) if is_tiny else (series or 30, 512)
    measure(series, matrix, workers, repeats or (1 if is_tiny else 5), path, place, click.echo)
    click.echo(f"Results: {path}")


@main.command()
@TINY
@PRECISION
@DEVICE
@THREADS
@click.option("--repeats", type=click.IntRange(min=1), help="Timed runs of each way; default: 5.")
@click.option("--out", type=PathType(), metavar="DIR", help="Folder of the CSV; as for model.")
def sequence(
    is_tiny: bool, precision: str, device: str, threads: int, repeats: int | None, out: Path | None
) -> None:
    """Measure what a sequence head costs: in prediction, and in training end to end."""
    from benchmarks.cases import SEQUENCE_CASES, tiny_sequence
    from benchmarks.records import RESULTS, TRIALS, describe_place, file_name

    setting = _setting(precision, device, threads)
    place = describe_place(setting.device, threads)
    bench = "sequence-tiny" if is_tiny else "sequence"
    path = (out or (TRIALS if is_tiny else RESULTS)) / file_name(bench, place, setting.precision)

    from benchmarks.sequence import measure

    cases = [tiny_sequence(case) if is_tiny else case for case in SEQUENCE_CASES]
    measure(cases, setting, repeats or (1 if is_tiny else 5), path, place, click.echo)
    click.echo(f"Results: {path}")


@main.command()
@TINY
@PRECISION
@THREADS
@click.option(
    "--case",
    "name",
    type=click.Choice([case.name for case in CASES]),
    required=True,
    help="A network and its input; HOWTO.md has their sizes.",
)
@click.option(
    "--variant",
    default=OURS,
    show_default=True,
    metavar="NAME",
    help=f"A way to run it: {OURS}, {PLAIN}, {STOCK}, {MONAI}; for series also"
    f" '{OURS}, recompute stage' and '{OURS}, recompute block'.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Training steps; 0 only builds the network. From the second step on, the optimiser's"
    " state exists beside the activations.",
)
def peak(is_tiny: bool, precision: str, threads: int, name: str, variant: str, steps: int) -> None:
    """Print the peak memory of a training on the CPU, in bytes.

    It is the resident memory of this whole process: Python, torch, the network and its steps. What
    training adds is the difference to --steps 0.
    """
    from benchmarks.cases import choose_cases

    (case,) = choose_cases(name, is_tiny=is_tiny)
    setting = _setting(precision, "cpu", threads)
    from benchmarks.model import take_steps

    click.echo(take_steps(case, variant, setting, steps))


MINUTES = click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=9,
    show_default=True,
    help="The budget. What does not fit is listed; the same command goes on with it.",
)
RESUME = click.option(
    "--resume",
    type=PathType(exists=True, dir_okay=False),
    metavar="FILE",
    help="Go on with this report; default: the newest unfinished one of this machine and versions.",
)
FRESH = click.option("--fresh", "is_fresh", is_flag=True, help="Begin a new report in any case.")
ONLY = click.option(
    "--only",
    multiple=True,
    type=click.Choice(TASKS),
    help="Only this part; may be given again. HOWTO.md says what the parts are.",
)
REPORT_OUT = click.option(
    "--out",
    type=PathType(),
    metavar="DIR",
    help="Folder of the CSV; default: benchmarks/results, or runs with --tiny.",
)


def _patients(default: int) -> Any:
    return click.option(
        "--patients",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="Patients (of 60 slices) whose voxels a batch holds, in every view.",
    )


@main.command()
@TINY
@MINUTES
@_patients(4)
@THREADS
@RESUME
@FRESH
@ONLY
@REPORT_OUT
def gpu(**options: Any) -> None:
    """Measure the report on a GPU: slices, slabs and series; HOWTO.md says what.

    Each job runs in a process of its own. The first nine minutes hold ours and compiled torch, for
    all three views. Let nothing else run beside it.
    """
    _report("gpu", **options)


@main.command()
@TINY
@MINUTES
@_patients(1)
@THREADS
@RESUME
@FRESH
@ONLY
@REPORT_OUT
def cpu(**options: Any) -> None:
    """Measure the report on the processor; see gpu."""
    _report("cpu", **options)


def _report(kind: str, is_tiny: bool, out: Path | None, **options: Any) -> None:
    from benchmarks.harness import require_torch
    from benchmarks.records import RESULTS, TRIALS
    from benchmarks.report.campaign import conduct

    require_torch()
    folder = out or (TRIALS if is_tiny else RESULTS)
    path = conduct(kind, folder=folder, is_tiny=is_tiny, tell=click.echo, **options)
    click.echo(f"Results: {path}")


@main.command()
@click.option(
    "--results",
    type=PathType(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the CSVs; default: benchmarks/results.",
)
@click.option(
    "--out", type=PathType(), metavar="DIR", help="Folder of README.md; default: benchmarks."
)
def report(results: Path | None, out: Path | None) -> None:
    """Write benchmarks/README.md and its figures from the newest report of each machine."""
    from benchmarks.harness import require_torch
    from benchmarks.records import RESULTS

    require_torch()
    from benchmarks.report.page import write_page

    for path in write_page(results or RESULTS, out or RESULTS.parent):
        click.echo(f"Written: {path}")


@main.command()
@click.argument("one", type=PathType(exists=True, dir_okay=False), metavar="A.csv")
@click.argument("other", type=PathType(exists=True, dir_okay=False), metavar="B.csv")
def compare(one: Path, other: Path) -> None:
    """Compare two reports, such as yours with one in benchmarks/results.

    The ratios are B divided by A. Above 1, B is faster, and takes more memory.
    """
    from benchmarks.report.comparison import compared
    from benchmarks.report.measurement import read_report

    click.echo(compared(read_report(one), read_report(other)))


@main.command(hidden=True)
@DEVICE
@THREADS
def place(device: str, threads: int) -> None:
    """Print where this runs and its fast precision, as JSON."""
    from benchmarks.records import describe_place

    setting = _setting("auto", device, threads)
    found = asdict(describe_place(setting.device, threads))
    click.echo(json.dumps({"place": found, "precision": setting.precision}))


@main.command(hidden=True)
@TINY
@DEVICE
@THREADS
@_patients(1)
@click.option("--name", required=True)
@click.option("--seconds", type=float, required=True)
def job(is_tiny: bool, device: str, threads: int, patients: int, name: str, seconds: float) -> None:
    """Run one job of a report and print its measurements, a line of JSON each."""
    end = time.monotonic() + seconds
    setting = _setting("auto", device, threads)
    from benchmarks.report.perform import Conditions, perform

    conditions = Conditions(setting.device, threads, patients, is_tiny, end)
    for found in perform(name, setting.precision, conditions):
        click.echo(json.dumps(found))


def _setting(
    precision: str, device: str, threads: int, has_stock: bool = True, is_tiny: bool = False
) -> "Setting":
    """Choose backend and device before keras is imported."""
    from benchmarks.cases import Setting
    from benchmarks.harness import require_torch
    from ich_keras.environment import choose_device, choose_precision

    require_torch()
    device = choose_device(device)
    least_steps = _CUDA_STEPS if device == "cuda" and not is_tiny else 1
    return Setting(device, threads, choose_precision(precision, device), has_stock, least_steps)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
