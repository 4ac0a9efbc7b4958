"""The command line: `weights-convert`. Each command calls one function and prints the result."""

from pathlib import Path
from typing import Any

import click

from ich_keras import __version__
from ich_keras.models.spec import PerAxis
from ich_keras.terminal import HELP, Group, PathType, catch_termination

_MAX_DIGITS = 4


class PerAxisType(click.ParamType):
    """A stride or dilation: one number, or one per axis (slices, rows, columns) like 1x2x2."""

    name = "N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> PerAxis:
        """Return an int or a tuple of ints."""
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split("x")]
        if not all(p.isascii() and p.isdecimal() and len(p) <= _MAX_DIGITS for p in parts):
            self.fail(f"{value!r}; expected a number like 2, or one per axis like 1x2x2.")
        numbers = tuple(map(int, parts))
        return numbers[0] if len(numbers) == 1 else numbers


class PerStageType(PerAxisType):
    """A stride or dilation for each stage, separated by commas."""

    name = "A,B,C,D"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple: an entry for each stage."""
        if not isinstance(value, str):
            return value
        return tuple(super(PerStageType, self).convert(v, param, ctx) for v in value.split(","))


FILE = PathType()
PER_AXIS, PER_STAGE = PerAxisType(), PerStageType()
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
@click.option(
    "--checkpoint",
    type=FILE,
    metavar="FILE",
    help="A .pth, .pt or .safetensors file; or --weights.",
)
@click.option(
    "--weights",
    type=FILE,
    metavar="FILE",
    help="A .weights.h5 file instead, which knows its own network.",
)
@PREFIX
def verify(
    source: str | None,
    preset_name: str | None,
    checkpoint: Path | None,
    weights: Path | None,
    prefix: str | None,
) -> None:
    """Compare torch and Keras on the weights of a file, without writing anything."""
    from ich_keras.errors import UsageError
    from ich_keras.models.weights_file import read_record
    from weights_convert.conversion import verify as verify_checkpoint
    from weights_convert.conversion import verify_weights
    from weights_convert.restriding import RESTRIDED_FROM

    if checkpoint is not None and weights is not None:
        raise UsageError("both --checkpoint and --weights; expected one of them.")
    if weights is not None and (source or preset_name or prefix):
        raise UsageError(
            "--source, --preset and --prefix are about a checkpoint; a .weights.h5 file says itself"
            " which network it belongs to.",
            "Give --weights alone.",
        )
    if checkpoint is not None:
        parity, record = verify_checkpoint(checkpoint, source, preset_name, prefix), {}
    elif weights is not None:
        parity, record = verify_weights(weights), read_record(weights)
    else:
        raise UsageError("the file is missing; expected --checkpoint or --weights.")
    click.echo(str(parity))
    click.echo(f"The networks agree: {parity.worst:.2e} relative at worst.")
    if RESTRIDED_FROM in record:
        click.echo(
            "Note: restrided. Both networks have the strides and dilations of the file; the one"
            " that its weights were made for computes something else."
        )


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
@click.argument("file", type=FILE, required=False)
@click.option("--weights", type=FILE, metavar="FILE", help="The same as FILE.")
@click.option(
    "--to",
    "--preset",
    "preset_name",
    metavar="PRESET",
    help="A network of the same tensors, such as resnet18_3d_thin; see `ich presets`.",
)
@click.option("--strides", type=PER_STAGE, help="Strides of the stages: numbers like 2, or 1x2x2.")
@click.option("--dilations", type=PER_STAGE, help="Dilations of the stages, likewise.")
@click.option("--stem-stride", type=PER_AXIS, help="Stride of the first convolution.")
@click.option("--pool-stride", type=PER_AXIS, help="Stride of the max pooling.")
@click.option(
    "--out",
    type=FILE,
    metavar="FILE",
    help="New .weights.h5 file; with --to default: beside FILE, where --weights SOURCE finds it.",
)
def restride(
    file: Path | None,
    weights: Path | None,
    preset_name: str | None,
    strides: tuple[PerAxis, ...] | None,
    dilations: tuple[PerAxis, ...] | None,
    stem_stride: PerAxis | None,
    pool_stride: PerAxis | None,
    out: Path | None,
) -> None:
    """Give the weights of a .weights.h5 FILE to a network with other strides or dilations.

    The same numbers, another network, which computes something else on purpose.
    """
    from ich_keras.errors import UsageError
    from weights_convert.restriding import restride as restride_weights

    given = [path for path in (file, weights) if path is not None]
    if len(given) != 1:
        raise UsageError(
            f"{len(given)} weights files; expected one.",
            "weights-convert restride FILE --to PRESET",
        )
    made = restride_weights(
        given[0],
        preset_name,
        out,
        strides=strides,
        dilations=dilations,
        stem_stride=stem_stride,
        pool_stride=pool_stride,
    )
    click.echo(str(made.parity))
    for change in made.record["changes"]:
        click.echo(f"changed: {change}")
    click.echo("Note: the network computes something else than the one of the file.")
    click.echo(f"Weights: {made.path}")


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
