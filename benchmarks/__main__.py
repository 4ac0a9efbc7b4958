"""The command line: `python -m benchmarks`. Nothing heavy is imported before a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ich_keras.processes import usable_threads
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
    "--cases", "names", default="", metavar="A,B", help="Only these cases; see the README."
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


@main.command(hidden=True)
@TINY
@PRECISION
@THREADS
@click.option("--case", "name", required=True)
@click.option("--variant", required=True)
@click.option("--steps", type=click.IntRange(min=0), required=True)
def peak(is_tiny: bool, precision: str, threads: int, name: str, variant: str, steps: int) -> None:
    """Print the peak memory in bytes of this process, which trains one variant on the CPU."""
    from benchmarks.cases import choose_cases

    setting = _setting(precision, "cpu", threads)
    from benchmarks.model import take_steps

    click.echo(take_steps(choose_cases(name, is_tiny=is_tiny)[0], variant, setting, steps))


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
