"""Predicting a folder of DICOM files with a run: answers per slice and per series."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras.answer_rules import USUAL_ERROR_RATE, OperatingPoint, answer_rules
from ich_keras.answers import with_answers
from ich_keras.context import Context
from ich_keras.ct.rejects import (
    MAX_REJECTS,
    RefusedFolder,
    rejects_kept,
    require_few_rejects,
    require_share,
)
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache.fill import a_few
from ich_keras.data.reading import IndexedSlice, indexed_slices
from ich_keras.data.thin_series import AS_THEY_ARE, AVERAGE, ThinRule
from ich_keras.domain import Domain
from ich_keras.errors import UsageError
from ich_keras.files import fail_point
from ich_keras.inference import probabilities, tapped
from ich_keras.metrics.aggregation import DEFAULT_RULE
from ich_keras.metrics.smoothing import NO_SMOOTHING
from ich_keras.prediction_extras import Extras
from ich_keras.prediction_journal import (
    PredictionJournal,
    journal_in,
    prediction_folder,
)
from ich_keras.prediction_members import (
    AnyRun,
    averaged,
    cost_line,
    ensemble_setting,
    journal_file,
    load_members,
    require_members,
    with_marks,
    write_members,
)
from ich_keras.prediction_reading import series_reading
from ich_keras.prediction_samples import (
    SeriesReading,
    full_batches,
    inputs_of,
    judged,
    places_of,
    sample_counts,
    series_groups,
)
from ich_keras.prediction_tables import (
    FolderPrediction,
    rejects_inside,
    tables_of,
    with_paths_inside,
    write_tables,
)
from ich_keras.prediction_variants import TTA, tta_names, turns_of
from ich_keras.progress import Progress, Tell
from ich_keras.recipe import Recipe
from ich_keras.studies import RULE, study_table


def predict_index(
    model: Any,
    index: SeriesIndex,
    recipe: Recipe,
    rule: str = DEFAULT_RULE,
    batch_size: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    journal: PredictionJournal | None = None,
    tell: Tell | None = None,
    kernel: str = NO_SMOOTHING,
    tta: Sequence[str] = (),
    domain: Domain | None = None,
    thin: ThinRule = AS_THEY_ARE,
    context: Context | None = None,
) -> FolderPrediction:
    """Predict every slice or series of an index, reading the DICOM files as it goes.

    One resized series is in memory at a time. Workers read further ones ahead: two per worker, at
    most `prediction_reading.AHEAD_BYTES` in all. Batches are made within groups of series: see
    `series_groups`.

    Args:
        model: from `load_run`.
        index: localizers and non-axial series are removed first.
        recipe: from `load_run`.
        rule: from slices to series, one of `ich_keras.metrics.aggregation.ALL_RULES`.
        batch_size: samples per step; None takes the recipe's.
        workers: processes that read; 0 reads in this one. The result does not depend on it.
        progress: called as progress("predicting", done, total).
        journal: keeps every finished group, and gives back those of an interrupted prediction.
            Their files are read again only where their times differ. None keeps nothing.
        tell: called with a line of text when the prediction is resumed.
        kernel: for smoothing slices along z, a key of `ich_keras.metrics.smoothing.KERNELS`.
        tta: test-time augmentation; see `predict_folder`.
        domain: of the run; the distance of each series is then computed in the same pass.
        thin: what is done with thin series.
        context: the sequence head of the run, if it has one.

    Raises:
        UsageError: the augmentation does not suit the view.
        NothingUsable: nothing could be predicted; its `rejects` say why.
        StaleError: files of finished series were replaced.
        EnvironmentProblem: a worker process died, or the journal cannot be written.
    """
    inputs, view = recipe.inputs, recipe.inputs.view
    turns = turns_of(tta_names(tta, view), view)
    batch_size = batch_size or recipe.training.batch_size
    index = index.usable()
    rows = index.slices.groupby("series_uid", sort=False).indices
    sources = indexed_slices(index)
    series = list(index.series.itertuples())
    samples = sample_counts(index, view, thin)
    finished = {} if journal is None else journal.finished()
    to_do = [
        [series[number] for number in group]
        for group in series_groups(samples, batch_size)
        if any(series[number].series_uid not in finished for number in group)
    ]
    left = {one.series_uid for group in to_do for one in group}
    results = {uid: result for uid, result in finished.items() if uid not in left}
    if results and tell is not None:
        tell(f"Resuming after {len(results):,} of {len(series):,} series.")

    def files_of(some: Iterable[Any]) -> Iterator[list[IndexedSlice]]:
        return ([sources[row] for row in rows[one.series_uid]] for one in some)

    def reading_of(one: Any, content: tuple) -> SeriesReading:
        return judged(one, index.slices.iloc[rows[one.series_uid]], content, inputs, thin)

    def parts(group: list[Any], found: list[SeriesReading]) -> Iterator[np.ndarray]:
        for one in group:
            reading = reading_of(one, next(contents))
            found.append(dataclasses.replace(reading, hu=None))
            for start in range(0, len(reading.usable), batch_size):
                chosen = reading.usable[start : start + batch_size]
                yield inputs_of(reading.hu, reading.samples, chosen, inputs)

    def report(step: str, number: int, total: int, detail: str = "") -> None:
        if progress is not None:
            progress(step, done + number, total)

    tap = None if domain is None and context is None else tapped(model)
    longest = max(map(len, rows.values()), default=0)
    done = sum(len(result.values) for result in results.values())
    with series_reading(inputs.cache_size, len(rows), longest, workers) as read:
        times = index.slices["file_mtime_ns"].to_numpy()
        touched = [
            one
            for one in series
            if one.series_uid in results
            and list(results[one.series_uid].times) != times[rows[one.series_uid]].tolist()
        ]
        for one, content in zip(touched, read(files_of(touched)), strict=True):
            assert journal is not None  # there are results
            journal.require_same_pixels(reading_of(one, content).result)
        if journal is not None:
            used = [
                (uid, sources[row], pixels)
                for uid, result in results.items()
                for row, pixels in zip(rows[uid], result.hashes, strict=True)
                if pixels
            ]
            # Archives give all their files one time: a few are read whatever it says.
            for number in a_few(len(used)):
                journal.require_same_slice(*used[number], inputs.cache_size)
        contents = iter(read(files_of(one for group in to_do for one in group)))
        for group in to_do:
            found: list[SeriesReading] = []
            batches = full_batches(parts(group, found), batch_size)
            features: list[np.ndarray] = []
            values = probabilities(
                model, batches, sum(samples), report, turns=turns, tap=tap, take=features.append
            )
            done += len(values)
            ends = np.cumsum([len(reading.usable) for reading in found])
            heads: np.ndarray | None = None
            if context is not None and len(values):
                places = places_of(found)
                values, heads = context.answer_all(values, np.concatenate(features), *places)
            predicted = [
                dataclasses.replace(reading.result, values=part)
                for reading, part in zip(found, np.split(values, ends[:-1]), strict=True)
            ]
            if heads is not None:
                predicted = [
                    dataclasses.replace(one, head=part[0]) if len(part) else one
                    for one, part in zip(predicted, np.split(heads, ends[:-1]), strict=True)
                ]
            if domain is not None and len(values):
                own = np.split(np.concatenate(features), ends[:-1])
                predicted = [
                    dataclasses.replace(one, distance=domain.distance(part)) if len(part) else one
                    for one, part in zip(predicted, own, strict=True)
                ]
            if journal is not None:
                journal.add(predicted)
            results |= {result.series_uid: result for result in predicted}
    found_in_order = [results[one.series_uid] for one in series]
    return tables_of(index, found_in_order, view, rule, recipe.labels, kernel, domain, thin)


def predict_folder(
    run_dir: AnyRun | Sequence[AnyRun],
    dicom_dir: Path | str,
    out: Path | str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
    any_body_part: bool = False,
    unfinished: bool = False,
    max_rejects: float = MAX_REJECTS,
    tell: Tell | None = None,
    any_image_type: bool = False,
    specificity: float | None = None,
    sensitivity: float | None = None,
    error_rate: float = USUAL_ERROR_RATE,
    tta: Sequence[str] = (),
    thin: str = AVERAGE,
    report: bool = False,
    show_patient: bool = False,
    heat_maps: str | None = None,
    structured_reports: bool = False,
) -> FolderPrediction:
    """Predict every head CT slice below a folder with a trained run, or with several.

    With `out`, finished series are kept there as it goes (`ich_keras.prediction_journal`). After an
    interruption the same call resumes, and its tables are those of an uninterrupted one. Headers
    are read again, to see whether the files are still the same.

    Several runs make an ensemble: the mean over the logits of what each answers alone, per slice
    and per series. They need the same labels; size, preset and network may differ, and slices go
    with slabs. Each reads the files by itself: n runs cost n times as much.

    Args:
        run_dir: a finished run, or a sequence of them.
        dicom_dir: any folder; files that are not usable slices are listed in `rejects`.
        out: a new folder for predictions.csv and look_first.csv (not for a run on whole series),
            series.csv, studies.csv, rejects.csv, decisions.json, and notice.txt, which says what
            the network was trained on and how the answers were made; None writes nothing. Of
            several runs, members.csv says which is which, and members/1/, ... hold what each writes
            alone. If no slice is usable, only rejects.csv is written. A folder with an interrupted
            prediction, or with only the rejects.csv of a refused one, will do.
        batch_size: samples per step; None takes that of each run.
        workers: processes that read headers and slices; 0 reads them in this one.
        device: "auto", "cpu" or "cuda".
        progress: called as progress(step, done, total).
        any_body_part, any_image_type: as for `index_folder`.
        unfinished: take the best weights so far of a training that was interrupted or still runs;
            the notice and the column "unfinished" of both tables say so.
        max_rejects: the largest share of refused files; see `require_few_rejects`. Above it only
            rejects.csv is written; finished series are kept for another try with a higher one.
        tell: called with a line of text when the prediction is resumed, or costs more than once.
        specificity, sensitivity, error_rate: of decisions and groups; see `OperatingPoint`. They
            may differ when a prediction is resumed: all answers are made at its end. An ensemble
            has none.
        tta: test-time augmentation, the mean over the logits of plain and turned inputs: "flip"
            (left-right), "reverse" (upside down; not of single slices). One doubles the
            computation, both together quadruple it.
        thin: "average" the slices of series that are at most half as far apart as those of a run's
            training to the training's distance, or "keep" them
            (`ich_keras.data.thin_series`). Each run of an ensemble goes by its own training.
        report, show_patient, heat_maps, structured_reports: what is written into `out` beside the
            tables; see `ich_keras.prediction_extras.Extras`.

    Returns:
        The prediction, with answers (`ich_keras.answers.with_answers`); paths are relative to
        `dicom_dir`. Of an ensemble, without answers; `members` holds what each run predicts alone.

    Raises:
        UsageError: `out` exists, or lies in `dicom_dir` without an interrupted prediction;
            `max_rejects` is not a share, `dicom_dir` does not exist, the runs cannot be averaged,
            or `tta` does not suit them; an ensemble is asked for decisions; and as
            `OperatingPoint` and `answer_rules` raise it, before anything is written.
        StaleError: a run is not finished, another process predicts into `out`, or what lies there
            was begun with another run, other files or other options; and as `answer_rules` raises
            it.
        NothingUsable: no slice is usable; its `rejects` say why.
        TooManyRejects: too many files are refused.
        EnvironmentProblem: a worker process died, or `out` cannot be written.
    """
    require_share(max_rejects)
    extras = Extras(report, show_patient, heat_maps, structured_reports)
    extras.require(out)
    point = OperatingPoint(specificity, sensitivity, error_rate)
    ThinRule(choice=thin)
    runs = require_members(run_dir, unfinished, tta)
    if len(runs) > 1 and not point.is_usual:
        raise UsageError(
            f"{point} was asked for of {len(runs)} runs: no run's thresholds fit their mean.",
            "Leave it out, or predict with one run.",
        )
    rules = [answer_rules(run, point) for run in runs]
    tta = [name for name in TTA if name in tta]
    root = Path(dicom_dir).absolute()
    root = root.parent if root.is_file() else root  # an archive
    with contextlib.nullcontext() if out is None else prediction_folder(out, dicom_dir) as folder:
        members = load_members(runs, device, unfinished)
        beside = extras.prepared(members, thin)
        if tell is not None and (cost := cost_line(members, tta)):
            tell(cost)
        with rejects_kept(folder), _rejects_inside(root):
            index = index_folder(
                dicom_dir, workers, None, progress, any_body_part, folder, any_image_type
            ).usable()
            require_few_rejects(index.slices, index.rejects, max_rejects)
            shared = {
                "any_body_part": any_body_part,
                "any_image_type": any_image_type,
                "tta": ", ".join(tta) or None,
                "ensemble": ensemble_setting(members),
            }
            own, plain, journals = [], [], []
            for number, member in enumerate(members, 1):
                recipe, size = member.recipe, batch_size or member.recipe.training.batch_size
                rule = ThinRule(member.distances, thin)
                settings = {**member.settings(), **rule.settings(), "batch_size": size, **shared}
                step = progress if len(members) == 1 else _of_member(progress, number, len(members))
                with journal_in(folder, journal_file(number), settings, index, root) as journal:
                    answer = predict_index(
                        member.model,
                        index,
                        recipe,
                        member.rule,
                        size,
                        workers,
                        step,
                        journal,
                        tell,
                        member.kernel,
                        tta,
                        member.domain,
                        rule,
                        member.context,
                    )
                require_few_rejects(index.slices, answer.rejects, max_rejects)
                plain.append(with_paths_inside(answer, root))
                answered = with_answers(plain[-1], rules[number - 1])
                own.append(_with_studies(with_marks(answered, [member], tta), index))
                journals.append(journal)
            result = own[0]
            if len(members) > 1:
                mean = dataclasses.replace(averaged(plain), members=tuple(own))
                result = _with_studies(with_marks(mean, members, tta), index)
                require_few_rejects(index.slices, result.rejects, max_rejects)
        if folder is not None:
            if len(members) > 1:
                write_members(folder, members, own)
            result = beside.written(folder, result, index, root, progress)
            write_tables(folder, result)
            for journal in reversed(journals):
                assert journal is not None  # there is a folder
                journal.remove()  # the very last: whoever finds one knows that there is more
            fail_point("after the journal's removal")
    return result


def _with_studies(prediction: FolderPrediction, index: SeriesIndex) -> FolderPrediction:
    """Return a prediction with one answer per study."""
    studies = study_table(prediction.series, index.series, prediction.labels)
    notice = prediction.notice
    if (studies["num_series"] > 1).any():
        notice = f"{notice}\n{RULE}"
    return dataclasses.replace(prediction, studies=studies, notice=notice)


def _of_member(progress: Progress | None, number: int, total: int) -> Progress | None:
    """Name the run in the steps of a progress."""
    if progress is None:
        return None

    def report(step: str, done: int, count: int, detail: str = "") -> None:
        progress(f"{step}, run {number} of {total}", done, count)

    return report


@contextlib.contextmanager
def _rejects_inside(root: Path) -> Iterator[None]:
    """Make the paths of rejects relative when a block refuses the folder for them."""
    try:
        yield
    except RefusedFolder as error:
        rejects = rejects_inside(error.rejects, root)
        raise type(error)(error.message, error.hint, rejects) from error
