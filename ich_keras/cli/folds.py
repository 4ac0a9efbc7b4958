"""`ich folds`: a cross-validation, trained fold by fold and joined."""

import subprocess
import sys
from pathlib import Path

import click

from ich_keras.cli.options import FOLDER, LABELS_BESIDE, required
from ich_keras.errors import UsageError
from ich_keras.labels import LabelSource
from ich_keras.terminal import Command, open_terminal, terminal_width

_KEPT_BY_FOLDS = ("--fold", "--split", "--out", "--resume", "--cache", "--labels", "--plan")


@click.command(
    cls=Command, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option("--cache", "cache_dir", type=FOLDER, metavar="DIR", help="From `ich cache`.")
@LABELS_BESIDE
@click.option("--folds", "count", type=int, default=5, show_default=True, help="How many.")
@click.option(
    "--join-only", is_flag=True, help="Join runs that are there: OUT/fold-1, OUT/fold-2, ..."
)
@click.option("--out", type=FOLDER, metavar="DIR", help="Folder of the runs and of the result.")
@click.pass_context
def folds(
    context: click.Context,
    cache_dir: Path | None,
    labels: LabelSource | None,
    count: int,
    join_only: bool,
    out: Path | None,
) -> None:
    """Train a network for each fold of a cross-validation by patient, and score all patients.

    All other options are those of `ich train`: --preset, --epochs, --seed, ... The same command
    resumes: finished folds are kept. The result lies in OUT/joined.
    """
    from ich_keras.folds import METRICS, join_folds
    from ich_keras.run_folder import RunFolder
    from ich_keras.summary import evaluation_summary
    from ich_keras.workflow import open_cache

    cache_dir, out = required(cache_dir, "--cache"), required(out, "--out")
    if count < 3:
        raise UsageError(f"--folds is {count}; expected at least 3.")
    for word in context.args:
        if word.partition("=")[0] in _KEPT_BY_FOLDS:
            raise UsageError(f"{word} is decided by `ich folds`.", "Leave it out.")
    open_cache(cache_dir, labels)
    runs = [RunFolder(out / f"fold-{number}") for number in range(1, count + 1)]
    with open_terminal() as terminal:
        for number, run in enumerate(runs, 1):
            if run.is_finished or join_only:
                continue
            terminal.tell(f"Fold {number} of {count}: {run}")
            words = [sys.executable, "-m", "ich_keras.cli.train"]
            if run.is_interrupted:
                words += ["--resume", str(run)]
            else:
                words += ["--fold", f"{number}/{count}", "--out", str(run), *context.args]
            words += ["--cache", str(cache_dir), *([] if labels is None else labels.words())]
            # Of its own: Keras keeps its global state, and the memory of a network.
            code = subprocess.run(words, check=False).returncode
            if code:
                context.exit(code)
        result = join_folds(runs, open_cache(cache_dir, labels), out / "joined")
    click.echo(evaluation_summary(result.metrics, "out of fold", terminal_width()))
    click.echo(f"Written to {out / 'joined'}: {METRICS} and the predictions")
