"""`ich view`: the slices of a folder or file in one page, without a network."""

from pathlib import Path

import pandas as pd

from ich_keras.ct.rejects import NothingUsable, Reject, joined
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.verdict import OK
from ich_keras.data.cache.tables import verdicts_after_reading
from ich_keras.data.reading import indexed_slices
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.files import atomic_write, require_absent, require_creatable
from ich_keras.notices import NOT_CLINICAL
from ich_keras.pages.study import NO_SERIES, SeriesPart, study_page
from ich_keras.prediction_journal import inside
from ich_keras.progress import Progress
from ich_keras.shown_series import (
    PRESETS,
    about,
    drawn_warnings,
    facts_of,
    faults_of,
    read_series,
    reject_part,
    rooms,
    why_without,
)

_FAILED_BYTES = 2**20  # of a page without a series, at most


def view(
    dicom: Path | str,
    out: Path | str,
    workers: int = 0,
    any_image_type: bool = False,
    show_patient: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a page with the slices of all series of a folder, an archive or a file.

    Series of all kinds are shown, heads or not; what speaks against each is said in words.

    Args:
        dicom: as for `index_folder`.
        out: the new page; one that an earlier call left without a series is replaced.
        workers: processes that read headers.
        any_image_type: as for `index_folder`.
        show_patient: tell the PatientID of each series.
        progress: called as progress(step, done, total).

    Returns:
        `out`.

    Raises:
        UsageError: `dicom` does not exist, or `out` does.
        NothingUsable: there is no slice to show; the page is written, and says why.
        EnvironmentProblem: the page cannot be written, or the disk is full.
    """
    out, dicom = Path(out), Path(dicom).absolute()
    if out.is_dir():
        raise UsageError(f"{out} is a folder; expected the name of a new file.")
    if not _is_without_series(out):
        require_absent(out)
    require_creatable(out)
    root = dicom if dicom.is_dir() else dicom.parent
    title = f"Head CT: {dicom.name or dicom}"
    try:
        index = index_folder(dicom, workers, None, progress, False, None, any_image_type)
        parts, rejects = _parts(index, show_patient, progress)
    except NothingUsable as error:
        _write(out, title, [], [], error.rejects, root)
        if error.rejects.empty:
            raise
        raise NothingUsable(
            error.message, f"{error.hint} {out} names every file.", error.rejects
        ) from error
    _write(out, title, parts, drawn_warnings(index.series), rejects, root)
    return out


def _is_without_series(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size > _FAILED_BYTES:
        return False
    content = path.read_bytes()
    return content.startswith(b"<!doctype html>") and NO_SERIES.encode() in content


def _write(
    out: Path,
    title: str,
    parts: list[SeriesPart],
    warnings: list[str],
    rejects: pd.DataFrame,
    root: Path,
) -> None:
    told = reject_part(rejects, lambda path: inside(path, root))
    page = study_page(
        title, parts, PRESETS, notices=[NOT_CLINICAL], warnings=warnings, rejects=told
    )
    try:
        atomic_write(out, page)
    except OSError as error:
        reason = error.strerror or str(error)
        raise EnvironmentProblem(f"{out} cannot be written: {reason}.") from error


def best_first(series: pd.DataFrame) -> pd.DataFrame:
    """Sort series: the best first (ok, then the most slices), those of a study together.

    Args:
        series: of an index.

    Returns:
        They with a column `study`, which counts from 1; series without a UID of a study have one
        each.
    """
    is_worse = series["verdict"] != OK
    ordered = series.assign(is_worse=is_worse).sort_values(
        ["is_worse", "num_slices"], ascending=[True, False], kind="stable"
    )
    uids = ordered["study_instance_uid"]
    studies = pd.factorize(uids.where(uids != "", ordered["series_uid"]))[0]
    return ordered.assign(study=studies + 1).sort_values("study", kind="stable")


def _parts(
    index: SeriesIndex, show_patient: bool, progress: Progress | None
) -> tuple[list[SeriesPart], pd.DataFrame]:
    sources = indexed_slices(index)
    parts, found = [], list[Reject]()
    table = best_first(index.series)
    total = len(table)
    for number, (series, has_room) in enumerate(
        zip(table.itertuples(), rooms(table), strict=True), 1
    ):
        if progress is not None:
            progress("reading series", number - 1, total)
        picture, verdict = None, series.verdict
        if has_room:
            read = read_series(index, series, sources)
            picture = read.picture
            found += read.rejects
            own = index.slices["series_uid"] == series.series_uid
            kept = index.slices.index.isin(read.rows)[own]
            verdicts = pd.Series({series.series_uid: verdict})
            (verdict,) = verdicts_after_reading(verdicts, index.slices[own], kept)
        text = about(series, verdict)
        if series.study_instance_uid and table["study"].iloc[-1] > 1:
            text = f"study {series.study}: {text}"
        parts.append(
            SeriesPart(
                f"Series {number}",
                text,
                facts_of(series, verdict, picture, show_patient),
                faults_of(verdict),
                picture,
                why_without(has_room),
            )
        )
    if progress is not None:
        progress("reading series", total, total)
    return parts, joined(index.rejects, found)
