"""The command `pretrain`. Nothing heavy is imported before it runs."""

from pathlib import Path

import click

from ich_keras.processes import usable_threads
from ich_keras.terminal import Command, PathType

RESULTS = Path(__file__).parent / "results"
WORK = Path("runs")
_FOLDER = PathType(file_okay=False)


@click.command(cls=Command)
@click.option("--tiny", "is_tiny", is_flag=True, help="Minutes: a trial run, no conclusions.")
@click.option(
    "--preset",
    type=click.Choice(["resnet18_2d", "resnet18_3d_slab"]),
    default="resnet18_2d",
    show_default=True,
    help="The network.",
)
@click.option(
    "--series", type=click.IntRange(min=8), metavar="N", help="Phantom series to learn from."
)
@click.option("--size", type=click.IntRange(min=32), metavar="N", help="Rows and columns, pixels.")
@click.option("--epochs", type=click.IntRange(min=1), metavar="N", help="Of the pretraining.")
@click.option(
    "--work",
    type=_FOLDER,
    metavar="DIR",
    help="Folder of caches and runs; default: runs/pretrain-PRESET.",
)
@click.option(
    "--out",
    type=_FOLDER,
    metavar="DIR",
    help="Folder of the page; default: results/pretrain-PRESET, with --tiny WORK/results.",
)
@click.option(
    "--weights",
    type=PathType(dir_okay=False),
    metavar="FILE",
    help="The new weights file; default: WORK/phantoms_PRESET.weights.h5.",
)
@click.option(
    "--real",
    type=PathType(file_okay=False, exists=True),
    metavar="DIR",
    help="DICOM files whose slices are ranked.",
)
@click.option(
    "--real-labels",
    type=PathType(dir_okay=False, exists=True),
    metavar="CSV",
    help="RSNA's labels of them.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to train.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=usable_threads,
    show_default="OMP_NUM_THREADS, or one per core",
    help="Processor threads, in all.",
)
def pretrain(
    is_tiny: bool,
    preset: str,
    series: int | None,
    size: int | None,
    epochs: int | None,
    work: Path | None,
    out: Path | None,
    weights: Path | None,
    real: Path | None,
    real_labels: Path | None,
    device: str,
    threads: int,
) -> None:
    """Make weights of phantoms, which anyone may use, and measure on other phantoms what starting
    from them brings; hours on a processor, less on a GPU."""
    from experiments.pretraining import measure
    from experiments.pretraining_page import write_page
    from experiments.pretraining_plans import PLANS, resized, tiny
    from ich_keras.environment import choose_device
    from ich_keras.errors import UsageError

    if real_labels is not None and real is None:
        raise UsageError("--real-labels given without --real.")
    choose_device(device)
    plan = resized(tiny(PLANS[preset]) if is_tiny else PLANS[preset], series, size, epochs)
    scale = "-tiny" if is_tiny else ""
    work = (work or WORK / f"pretrain-{preset}{scale}").absolute()
    weights = weights or work / f"phantoms_{preset}.weights.h5"
    out = out or (work / "results" if is_tiny else RESULTS / f"pretrain-{preset}")
    import torch

    torch.set_num_threads(threads)
    measured = measure(
        plan,
        work,
        weights,
        real,
        real_labels,
        device,
        workers=threads if threads > 1 else 0,
        tell=lambda line: click.echo(line, err=True),
    )
    click.echo(f"Weights: {weights}")
    click.echo(f"Report: {write_page(out, measured)}")
