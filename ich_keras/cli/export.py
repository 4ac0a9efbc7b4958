"""The command `ich export`."""

from pathlib import Path

import click

from ich_keras.cli.options import FOLDER, RUN
from ich_keras.terminal import Command

_WORDS = {"hu": "int16 Hounsfield units", "prepared": "prepared input, float32"}


@click.command(cls=Command)
@RUN
@click.option(
    "--out",
    type=FOLDER,
    required=True,
    metavar="FILE",
    help="New file; its ending says the format: .onnx, .pt2 (torch) or .keras.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torch", "keras"]),
    help="Default: as FILE ends.",
)
@click.option(
    "--input",
    "takes",
    type=click.Choice(["hu", "prepared"]),
    help="hu: int16 Hounsfield units, everything else is inside (default; not for keras). prepared:"
    " the network's own input, float32.",
)
@click.option(
    "--side",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Rows and columns of the slices of Hounsfield units, pixels.",
)
@click.option(
    "--cache",
    "cache_dir",
    type=FOLDER,
    metavar="DIR",
    help="Compare file and run on a series of this cache; default: on a phantom.",
)
def export(
    run_dir: Path, out: Path, kind: str | None, takes: str | None, side: int, cache_dir: Path | None
) -> None:
    """Write a run as one file for others: ONNX, torch or Keras.

    The file is read again and compared with the run. It computes in float32 and takes any number
    of samples. Not for clinical use. Needs `pip install 'ich_keras[export]'` for ONNX.
    """
    from ich_keras.environment import choose_backend

    choose_backend("torch")
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.export.runs import export_run

    chosen = kind or {".pt2": "torch", ".keras": "keras"}.get(out.suffix, "onnx")
    made = export_run(
        run_dir,
        out,
        chosen,
        takes or ("prepared" if chosen == "keras" else "hu"),
        side,
        None if cache_dir is None else CTCache.open(cache_dir),
    )
    shape = "x".join(map(str, made.shape))
    click.echo(f"Written: {made.path} ({made.path.stat().st_size / 2**20:.1f} MiB)")
    click.echo(f"It takes {_WORDS[made.takes]}: any number of {shape}.")
    for one in made.differences:
        click.echo(
            f"Largest difference from the run on {one.samples} samples of {one.inputs}:"
            f" {one.largest:.1e}"
        )
