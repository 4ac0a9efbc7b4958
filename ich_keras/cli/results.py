"""Commands on runs and networks: evaluate, predict, submission, presets."""

import textwrap
from pathlib import Path
from typing import Any

import click

from ich_keras.cli.options import (
    ANY_BODY_PART,
    ANY_IMAGE_TYPE,
    BACKEND,
    DEVICE,
    DICOM,
    FOLDER,
    LABELS_BESIDE,
    MAX_REJECTS,
    RUN,
    SHOW_PATIENT,
    THIN,
    UNFINISHED_RUN,
    WORKERS,
    num_workers,
    required,
    share_of_rejects,
)
from ich_keras.errors import UsageError
from ich_keras.labels import LabelSource
from ich_keras.terminal import Command, open_terminal, terminal_width


@click.command(cls=Command)
@RUN
@click.option("--cache", "cache_dir", type=FOLDER, metavar="DIR", help="From `ich cache`.")
@click.option(
    "--dicom",
    type=FOLDER,
    metavar="DIR",
    help="With --external: data that have no cache yet; one is made in OUT-cache.",
)
@LABELS_BESIDE
@click.option("--split", help="train, valid or test; default: test.")
@click.option(
    "--external",
    is_flag=True,
    help="Score all of the data, which the training has not seen; writes into --out, not into the"
    " run.",
)
@click.option("--out", type=FOLDER, metavar="DIR", help="New folder for --external.")
@click.option(
    "--recalibrate",
    type=float,
    metavar="SHARE",
    help="With --external: fit temperature and thresholds again to this share of the patients, and"
    " score the others before and after.",
)
@THIN
@UNFINISHED_RUN
@BACKEND
@DEVICE
@WORKERS
def evaluate(
    run_dir: Path,
    cache_dir: Path | None,
    dicom: Path | None,
    labels: LabelSource | None,
    split: str | None,
    external: bool,
    out: Path | None,
    recalibrate: float | None,
    thin: str | None,
    unfinished: bool,
    backend: str | None,
    device: str,
    workers: int | None,
) -> None:
    """Evaluate a run on one split of its cache; writes metrics and predictions into the run.

    With --external, score it on other labelled data, beside its own test numbers.
    """
    from ich_keras.environment import choose_backend

    choose_backend(backend)
    for value, option in (
        (dicom, "--dicom"),
        (out, "--out"),
        (recalibrate, "--recalibrate"),
        (thin, "--thin"),
        (workers, "--workers"),
    ):
        if value is not None and not external:
            raise UsageError(f"{option} is for --external.", "Add it, or leave the option out.")
    if external:
        if split is not None or unfinished:
            option = "--split" if split is not None else "--unfinished"
            raise UsageError(f"{option} does not go with --external.", "Leave it out.")
        if dicom is None and cache_dir is None:
            raise UsageError("--external needs either --cache or --dicom.")
        if dicom is not None and cache_dir is not None:
            raise UsageError(
                "--cache and --dicom are both given with --external.", "Leave one of them out."
            )
        settings = {"recalibrate": recalibrate, "thin": thin or "average"}
        _evaluate_external(run_dir, cache_dir, dicom, labels, out, device, workers, settings)
        return
    _evaluate_split(run_dir, cache_dir, labels, split or "test", unfinished, device)


def _evaluate_external(
    run_dir: Path,
    cache_dir: Path | None,
    dicom: Path | None,
    labels: LabelSource | None,
    out: Path | None,
    device: str,
    workers: int | None,
    settings: dict[str, Any],
) -> None:
    from ich_keras.external import METRICS, evaluate_external
    from ich_keras.external_summary import external_summary
    from ich_keras.files import require_absent
    from ich_keras.run_folder import RunFolder
    from ich_keras.workflow import cache_dicom, open_cache

    out = require_absent(required(out, "--out"))
    with open_terminal() as terminal:
        if dicom is not None:
            if labels is None:
                raise UsageError("--labels is missing.", "Give the labels of these data.")
            # Beside `out`, which is new: a refusal leaves the cache, not half a result.
            built = out.with_name(f"{out.name}-cache")
            size = RunFolder.at(run_dir).require_finished().recipe().inputs.cache_size
            if built.exists():
                raise UsageError(
                    f"{built} exists already.", f"If it is the cache of {dicom}: --cache {built}"
                )
            cache_dicom(
                dicom,
                labels,
                built,
                size,
                workers=num_workers(workers),
                progress=terminal.progress,
                tell=terminal.tell,
            )
            cache_dir = built
        cached = open_cache(required(cache_dir, "--cache"), labels)
        result = evaluate_external(run_dir, cached, out, device, terminal.progress, **settings)
    click.echo(external_summary(result.metrics, terminal_width()))
    click.echo(f"Written to {out}: {METRICS} and the predictions")


def _evaluate_split(
    run_dir: Path,
    cache_dir: Path | None,
    labels: LabelSource | None,
    split: str,
    unfinished: bool,
    device: str,
) -> None:
    from ich_keras import evaluation
    from ich_keras.notices import UNFINISHED
    from ich_keras.run_folder import RunFolder
    from ich_keras.summary import evaluation_summary
    from ich_keras.workflow import open_cache

    with open_terminal() as terminal:
        metrics = evaluation.evaluate(
            run_dir,
            open_cache(required(cache_dir, "--cache"), labels),
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
    "--specificity",
    type=float,
    metavar="SHARE",
    help="Decide with the lowest threshold that has this specificity on validation; default 0.9.",
)
@click.option(
    "--sensitivity",
    type=float,
    metavar="SHARE",
    help="Instead, with the highest threshold that has this sensitivity on validation.",
)
@click.option(
    "--error-rate",
    type=float,
    metavar="SHARE",
    help="Of the groups: low and high are each wrong for about this share at most; default 0.1.",
)
@click.option(
    "--tta",
    type=click.Choice(["flip", "reverse"]),
    multiple=True,
    help="Average with the input flipped left-right, or with volumes upside down; may be given"
    " twice. Each doubles the computation.",
)
@THIN
@click.option(
    "--report",
    is_flag=True,
    help="Also write OUT/reports/index.html, 1.html, ...: for each study its slices, to look"
    " through, and the answers to them.",
)
@click.option(
    "--heat-maps",
    metavar="[METHOD]",
    is_flag=False,
    flag_value="hirescam",
    help="On those pages, and as images beside --sr, show what the answers rest on: hirescam"
    " (without a METHOD), gradcam or integrated-gradients. The first two take about as long as the"
    " prediction.",
)
@SHOW_PATIENT
@click.option(
    "--sr",
    is_flag=True,
    help="Also write OUT/sr/1.dcm, ...: for each study a DICOM structured report, which names the"
    " patient as its images do; needs `pip install 'ich_keras[dicom-out]'`.",
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
    specificity: float | None,
    sensitivity: float | None,
    error_rate: float | None,
    tta: tuple[str, ...],
    thin: str | None,
    report: bool,
    heat_maps: str | None,
    show_patient: bool,
    sr: bool,
    any_body_part: bool,
    any_image_type: bool,
    unfinished: bool,
    max_rejects: float | None,
    workers: int | None,
    backend: str | None,
    device: str,
) -> None:
    """Predict every head CT slice in a folder: predictions.csv, series.csv, rejects.csv.

    Each label gets a calibrated probability, the network's own (raw_*), a decision (yes, no) and a
    group (low, unsure, high); look_first.csv names the slices to look at first, decisions.json the
    thresholds. A run trained on whole series predicts series only. After an interruption, the same
    command resumes it.

    Not a medical device; not for clinical use.
    """
    from ich_keras.answer_rules import USUAL_ERROR_RATE
    from ich_keras.ct.rejects import REJECTS_FILE, summary
    from ich_keras.environment import choose_backend
    from ich_keras.prediction import predict_folder
    from ich_keras.study_reports import REPORTS_FOLDER, START
    from ich_keras.summary import answers_table, flags_line, prediction_table

    if show_patient and not report:
        raise UsageError("--show-patient is about --report, which is missing.")
    if heat_maps and not (report or sr):
        raise UsageError("--heat-maps is about --report and --sr; both are missing.")
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
            specificity=specificity,
            sensitivity=sensitivity,
            error_rate=USUAL_ERROR_RATE if error_rate is None else error_rate,
            tta=tta,
            thin=thin or "average",
            report=report,
            show_patient=show_patient,
            heat_maps=heat_maps,
            structured_reports=sr,
        )
    click.echo(prediction_table(result.series, terminal_width(), result.labels))
    if result.decisions is not None:
        click.echo(answers_table(result.series, terminal_width(), result.labels))
    if flags := flags_line(result.series):
        click.echo(textwrap.fill(flags, terminal_width()))
    for line in result.notice.splitlines():
        click.echo(textwrap.fill(line, terminal_width()))
    for line in summary(result.rejects):
        click.echo(line)
    if len(result.rejects):
        click.echo(f"Every reject: {out / REJECTS_FILE}")
    click.echo(f"Predictions: {out}")
    if report:
        click.echo(f"Pages: {out / REPORTS_FOLDER / START}")


@click.command(cls=Command)
@click.option(
    "--predictions", type=FOLDER, required=True, metavar="CSV", help="predictions.csv of a run."
)
@click.option("--out", type=FOLDER, required=True, metavar="CSV", help="New file.")
def submission(predictions: Path, out: Path) -> None:
    """Write predictions in the format of the RSNA 2019 competition.

    It takes the network's own probabilities (raw_*), not the calibrated ones.
    """
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
