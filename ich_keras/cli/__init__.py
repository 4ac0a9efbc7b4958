"""The command line: `ich` and its commands; `ich-train` is `ich train`.

Every command parses its options, calls one public function and prints the result. Nothing heavy is
imported before a command runs: `--help` answers at once, and `--backend` takes effect before Keras
is loaded.
"""

import click

from ich_keras import __version__
from ich_keras.cli.checks import verify
from ich_keras.cli.data import audit, cache, doctor, index, phantom
from ich_keras.cli.results import evaluate, predict, presets, submission
from ich_keras.cli.train import train_main
from ich_keras.terminal import HELP, Group, catch_termination

__all__ = ["main", "train_main"]


@click.group(cls=Group, context_settings=HELP)
@click.version_option(__version__, prog_name="ich")
def main() -> None:
    """Detect intracranial haemorrhage and its five subtypes on head CT.

    Not a medical device; not for clinical use.
    """
    catch_termination()


for _command in (
    phantom,
    index,
    cache,
    train_main,
    evaluate,
    predict,
    audit,
    verify,
    submission,
    presets,
    doctor,
):
    main.add_command(_command)
