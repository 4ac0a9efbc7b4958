"""`ich verify`: is what lies there what was written?"""

from pathlib import Path

import click

from ich_keras.cli.options import FOLDER
from ich_keras.terminal import Command, open_terminal


@click.command(cls=Command)
@click.argument("path", type=FOLDER, metavar="PATH")
def verify(path: Path) -> None:
    """Check a run, a cache, an index, a .weights.h5 or a .keras file against its checksums.

    Says what was checked. Fails (exit code 6) when a part is lost, damaged or not the one that was
    written, and names it.
    """
    from ich_keras import verification

    with open_terminal() as terminal:
        lines = verification.verify(path, terminal.progress)
    for line in lines:
        click.echo(line)
