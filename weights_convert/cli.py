"""The command line: `weights-convert`. Each command calls one function and prints the result."""

from pathlib import Path

import click

from ich_keras import __version__
from ich_keras.terminal import HELP, Group, PathType, catch_termination

FILE = PathType()
SOURCE = click.option(
    "--source",
    metavar="NAME",
    help="The published weights in the file; see `weights-convert list`.",
)
PRESET = click.option(
    "--preset",
    "preset_name",
    metavar="PRESET",
    help="The network of a file of your own; see `ich presets`.",
)
CHECKPOINT = click.option(
    "--checkpoint",
    type=FILE,
    required=True,
    metavar="FILE",
    help="A .pth, .pt or .safetensors file.",
)
PREFIX = click.option(
    "--prefix",
    metavar="NAME",
    help="The network that is meant, where the file holds several, such as state_dict.teacher.",
)
WEIGHTS = click.option(
    "--weights", type=FILE, required=True, metavar="FILE", help="A .weights.h5 file."
)
CHANNELS = click.option(
    "--channels",
    type=click.IntRange(min=1, max=1024),
    metavar="N",
    help="Change the number of input channels; default: keep it.",
)
NEW_WEIGHTS = click.option(
    "--out", type=FILE, required=True, metavar="FILE", help="The .weights.h5 file to write."
)


@click.group(cls=Group, context_settings=HELP)
@click.version_option(__version__, prog_name="weights-convert")
def main() -> None:
    """Carry pretrained torch weights into the networks of ich_keras, exactly.

    This command downloads nothing: `list` shows the addresses; `ich-train --download` fetches.
    """
    # So that no temporary file is left beside the weights.
    catch_termination()


@main.command(name="list")
def list_sources() -> None:
    """List the sources: network, file, address, licence, checksum, citation."""
    from weights_convert.sources import SOURCES

    for source in SOURCES.values():
        digits = source.published_sha256
        click.echo(source.name)
        click.echo(f"  for       {source.preset} ({source.channels} input channels)")
        click.echo(f"  file      {source.url}")
        click.echo(f"  sha256    {f'begins with {digits}' if digits else 'none published'}")
        click.echo(f"  licence   {source.licence}; data: {source.data_terms}")
        click.echo(f"  trained   on {source.original_input}; here: {source.intensity}")
        click.echo(f"  cite      {source.citation}")


@main.command()
@CHECKPOINT
@PREFIX
def inspect(checkpoint: Path, prefix: str | None) -> None:
    """Show what a checkpoint holds, without trusting it."""
    from ich_keras.models.weights import listed
    from weights_convert.conversion import inspect as inspect_checkpoint
    from weights_convert.structure import describe

    found = inspect_checkpoint(checkpoint, prefix)
    read = found.read
    click.echo(f"{read.path}: {read.kind} format, sha256 {read.sha256}")
    if read.prefix:
        click.echo(f"the network lies under {read.prefix}")
    click.echo(describe(found.structure))
    numbers = sum(array.size for array in read.tensors.values())
    click.echo(f"{len(read.tensors)} tensors, {numbers:,} numbers")
    click.echo(f"fits: {', '.join(found.presets) or 'no preset'}")
    click.echo(f"missing for that: {listed(found.missing)}")
    click.echo(f"beside the backbone: {listed(found.surplus)}")
    others = [name for name in read.ignored if not name.endswith("num_batches_tracked")]
    click.echo(f"not weights: {listed(others)}; {len(read.ignored) - len(others)} batch counters")


@main.command()
@SOURCE
@PRESET
@CHECKPOINT
@PREFIX
@click.option(
    "--out",
    type=FILE,
    metavar="FILE",
    help="New .weights.h5 file; with --source default: where --weights NAME finds it.",
)
@CHANNELS
@click.option(
    "--keep-head",
    is_flag=True,
    help="Keep the head of the checkpoint, which must have six outputs, or those of --labels.",
)
@click.option(
    "--labels", metavar="A,B,...", help="With --keep-head: labels of its outputs, in order."
)
def convert(
    source: str | None,
    preset_name: str | None,
    checkpoint: Path,
    prefix: str | None,
    out: Path | None,
    channels: int | None,
    keep_head: bool,
    labels: str | None,
) -> None:
    """Convert a checkpoint into a .weights.h5 file, if both networks agree."""
    from weights_convert.conversion import convert as convert_checkpoint

    names = None if labels is None else [name.strip() for name in labels.split(",")]
    made = convert_checkpoint(
        checkpoint, source, preset_name, out, channels, keep_head, prefix, names
    )
    click.echo(str(made.parity))
    click.echo(f"source: {made.record['source']}; sha256 {made.record['sha256']}")
    if made.record.get("is_published_file") is False:
        click.echo("Note: this is not the published file, so its licence is unknown.")
    if made.record.get("published_sha256") == "":
        click.echo("Note: the publisher states no checksum, so the origin cannot be verified.")
    click.echo(f"left out: {', '.join(made.dropped) or 'nothing'}")
    for change in made.record["changes"]:
        click.echo(f"changed: {change}")
    click.echo(f"Weights: {made.path}")


@main.command()
@SOURCE
@PRESET
@CHECKPOINT
@PREFIX
def verify(
    source: str | None, preset_name: str | None, checkpoint: Path, prefix: str | None
) -> None:
    """Compare torch and Keras on a checkpoint's weights, without writing anything."""
    from weights_convert.conversion import verify as verify_checkpoint

    parity = verify_checkpoint(checkpoint, source, preset_name, prefix)
    click.echo(str(parity))
    click.echo(f"The networks agree: {parity.worst:.2e} relative at worst.")


@main.command()
@click.option(
    "--source", "names", multiple=True, metavar="NAME", help="Check this source only; repeatable."
)
@click.option(
    "--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True
)
def selfcheck(names: tuple[str, ...], dtype: str) -> None:
    """Compare every network with torchvision's or a plain torch one on random weights."""
    from weights_convert.selfcheck import check_all

    for line in check_all(names, dtype):
        click.echo(line)


@main.command()
@WEIGHTS
@click.option("--preset", "preset_name", required=True, help="A 3D network of the same depth.")
@click.option(
    "--method",
    type=click.Choice(["mean", "centre"]),
    default="mean",
    show_default=True,
    help="Spread each kernel over the slices, or put it into the middle one.",
)
@CHANNELS
@NEW_WEIGHTS
def inflate(weights: Path, preset_name: str, method: str, channels: int | None, out: Path) -> None:
    """Make 3D weights from 2D ones."""
    from weights_convert.reshaping import inflate as inflate_weights

    click.echo(f"Weights: {inflate_weights(weights, preset_name, out, method, channels)}")


@main.command()
@WEIGHTS
@click.option("--preset", "preset_name", required=True, help="A 2D network of the same depth.")
@CHANNELS
@NEW_WEIGHTS
def collapse(weights: Path, preset_name: str, channels: int | None, out: Path) -> None:
    """Make 2D weights from 3D ones by summing the kernels over the slices."""
    from weights_convert.reshaping import collapse as collapse_weights

    click.echo(f"Weights: {collapse_weights(weights, preset_name, out, channels)}")


@main.command()
@WEIGHTS
@click.option(
    "--channels",
    type=click.IntRange(min=1, max=1024),
    required=True,
    metavar="N",
    help="New number of input channels.",
)
@NEW_WEIGHTS
def channels(weights: Path, channels: int, out: Path) -> None:
    """Change the number of input channels."""
    from weights_convert.reshaping import change_channels

    click.echo(f"Weights: {change_channels(weights, out, channels)}")


@main.command()
@WEIGHTS
@click.option(
    "--out",
    type=FILE,
    required=True,
    metavar="FILE",
    help="The .pth, .pt or .safetensors file to write.",
)
def export(weights: Path, out: Path) -> None:
    """Write weights as a torch state dict, bit for bit."""
    from weights_convert.conversion import export as export_weights

    click.echo(f"State dict: {export_weights(weights, out)}")
