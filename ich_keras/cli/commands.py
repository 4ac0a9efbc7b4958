"""The group `ich` of all commands."""

import click

from ich_keras import __version__
from ich_keras.cli.checks import verify
from ich_keras.cli.data import audit, cache, doctor, index, phantom
from ich_keras.cli.export import export
from ich_keras.cli.folds import folds
from ich_keras.cli.pictures import compare, report, show
from ich_keras.cli.results import evaluate, predict, presets, submission
from ich_keras.cli.sequence import features
from ich_keras.cli.train import train_main
from ich_keras.cli.viewing import view
from ich_keras.terminal import HELP, Group, catch_termination


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
    folds,
    features,
    evaluate,
    predict,
    view,
    report,
    compare,
    show,
    audit,
    verify,
    submission,
    export,
    presets,
    doctor,
):
    main.add_command(_command)
