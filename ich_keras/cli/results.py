"""Commands on runs and networks: evaluate, predict, submission, presets."""

import textwrap
from pathlib import Path

import click

from ich_keras.cli.options import (
    ANY_BODY_PART,
    ANY_IMAGE_TYPE,
    BACKEND,
    CACHE,
    DEVICE,
    DICOM,
    FOLDER,
    LABELS_BESIDE,
    MAX_REJECTS,
    RUN,
    UNFINISHED_RUN,
    WORKERS,
    num_workers,
    required,
    share_of_rejects,
)
from ich_keras.labels import LabelSource
from ich_keras.terminal import Command, open_terminal, terminal_width


@click.command(cls=Command)
@RUN
@CACHE
@LABELS_BESIDE
@click.option("--split", default="test", show_default=True, help="train, valid or test.")
@UNFINISHED_RUN
@BACKEND
@DEVICE
def evaluate(
    run_dir: Path,
    cache_dir: Path,
    labels: LabelSource | None,
    split: str,
    unfinished: bool,
    backend: str | None,
    device: str,
) -> None:
    """Evaluate a run on one split of its cache; writes metrics and predictions into the run."""
    from ich_keras import evaluation
    from ich_keras.environment import choose_backend
    from ich_keras.notices import UNFINISHED
    from ich_keras.run_folder import RunFolder
    from ich_keras.summary import evaluation_summary
    from ich_keras.workflow import open_cache

    choose_backend(backend)
    with open_terminal() as terminal:
        metrics = evaluation.evaluate(
            run_dir,
            open_cache(cache_dir, labels),
            split,
            device=device,
            progress=terminal.progress,
            unfinished=unfinished,
        )
    click.echo(evaluation_summary(metrics, split, terminal_width()))
    notices = {part[UNFINISHED] for part in metrics.values() if UNFINISHED in part}
    for notice in notices:
        click.echo(textwrap.fill(notice, terminal_width()))
    run = RunFolder(run_dir)
    written = [file(split, not notices).name for file in (run.metrics_file, run.predictions_file)]
    click.echo(f"Written to {run_dir}: {', '.join(written)}")


@click.command(cls=Command)
@click.option(
    "--run",
    "run_dirs",
    type=FOLDER,
    required=True,
    multiple=True,
    metavar="RUN",
    help="From `ich train`. Several (--run A --run B) make an ensemble, the mean of their logits;"
    " n runs take n times as long.",
)
@DICOM
@click.option(
    "--out", type=FOLDER, required=True, metavar="OUT", help="New folder, or one to resume."
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Samples per step; default: as in training."
)
@click.option(
    "--tta",
    type=click.Choice(["flip", "reverse"]),
    multiple=True,
    help="Average with the input flipped left-right, or with volumes upside down; may be given"
    " twice. Each doubles the computation.",
)
@ANY_BODY_PART
@ANY_IMAGE_TYPE
@UNFINISHED_RUN
@MAX_REJECTS
@WORKERS
@BACKEND
@DEVICE
def predict(
    run_dirs: tuple[Path, ...],
    dicom: Path | None,
    out: Path,
    batch_size: int | None,
    tta: tuple[str, ...],
    any_body_part: bool,
    any_image_type: bool,
    unfinished: bool,
    max_rejects: float | None,
    workers: int | None,
    backend: str | None,
    device: str,
) -> None:
    """Predict every head CT slice in a folder: predictions.csv, series.csv, rejects.csv.

    A run trained on whole series predicts series only. After an interruption, the same command
    resumes it.

    Not a medical device; not for clinical use.
    """
    from ich_keras.ct.rejects import REJECTS_FILE, summary
    from ich_keras.environment import choose_backend
    from ich_keras.prediction import predict_folder
    from ich_keras.summary import prediction_table

    choose_backend(backend)
    with open_terminal() as terminal:
        result = predict_folder(
            run_dirs,
            required(dicom, "--dicom"),
            out,
            batch_size=batch_size,
            workers=num_workers(workers),
            device=device,
            progress=terminal.progress,
            any_body_part=any_body_part,
            any_image_type=any_image_type,
            unfinished=unfinished,
            max_rejects=share_of_rejects(max_rejects),
            tell=terminal.tell,
            tta=tta,
        )
    click.echo(prediction_table(result.series, terminal_width(), result.labels))
    click.echo(textwrap.fill(result.notice, terminal_width()))
    for line in summary(result.rejects):
        click.echo(line)
    if len(result.rejects):
        click.echo(f"Every reject: {out / REJECTS_FILE}")
    click.echo(f"Predictions: {out}")


@click.command(cls=Command)
@click.option(
    "--predictions", type=FOLDER, required=True, metavar="CSV", help="predictions.csv of a run."
)
@click.option("--out", type=FOLDER, required=True, metavar="CSV", help="New file.")
def submission(predictions: Path, out: Path) -> None:
    """Write predictions in the format of the RSNA 2019 competition."""
    from ich_keras.submission_file import write_submission

    click.echo(f"Submission: {write_submission(predictions, out, tell=click.echo)}")


@click.command(cls=Command)
@click.option("--preset", "names", multiple=True, help="Show only this network; may be repeated.")
def presets(names: tuple[str, ...]) -> None:
    """List the networks: their input, depth, operations, parameters, memory and weights."""
    from ich_keras.environment import choose_backend
    from ich_keras.models.presets import PRESETS

    choose_backend()
    from ich_keras.models.cost import preset_table

    click.echo(preset_table(names or tuple(PRESETS)))
