"""Commands of sequence heads: features."""

from pathlib import Path

import click

from ich_keras.cli.options import BACKEND, DEVICE, FOLDER, RUN
from ich_keras.terminal import Command, open_terminal


@click.command(cls=Command)
@RUN
@click.option(
    "--cache",
    "cache_dir",
    type=FOLDER,
    required=True,
    metavar="DIR",
    help="From `ich cache`; of the run's size, any patients.",
)
@click.option("--out", type=FOLDER, required=True, metavar="FILE", help="New file, .h5.")
@click.option("--half", is_flag=True, help="Keep features in float16, half the space.")
@BACKEND
@DEVICE
def features(
    run_dir: Path, cache_dir: Path, out: Path, half: bool, backend: str | None, device: str
) -> None:
    """Compute the features of every slice of a cache once, with the network of a run.

    A sequence head is trained on them. The same command resumes an interrupted one.
    """
    from ich_keras.environment import choose_backend

    choose_backend(backend)
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.features import extract_features

    with open_terminal() as terminal:
        found = extract_features(
            run_dir, CTCache.open(cache_dir), out, half, device, terminal.progress
        )
    click.echo(f"Features: {found}; {found.path}")
