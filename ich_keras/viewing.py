"""`ich view`: the slices of a folder or file in one page, without a network."""

from pathlib import Path

import pandas as pd

from ich_keras.ct.rejects import NothingUsable, Reject, joined
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache.tables import verdicts_after_reading
from ich_keras.data.reading import indexed_slices
from ich_keras.files import atomic_write, require_absent
from ich_keras.notices import NOT_CLINICAL
from ich_keras.pages.study import SeriesPart, study_page
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
        out: the new page.
        workers: processes that read headers.
        any_image_type: as for `index_folder`.
        show_patient: tell the PatientID of each series.
        progress: called as progress(step, done, total).

    Returns:
        `out`.

    Raises:
        UsageError: `dicom` does not exist, or `out` does.
        NothingUsable: there is no slice to show; the page is written, and says why.
        EnvironmentProblem: the disk is full.
    """
    out, dicom = require_absent(out), Path(dicom).absolute()
    root = dicom if dicom.is_dir() else dicom.parent
    title = f"Head CT: {dicom.name or dicom}"
    try:
        index = index_folder(dicom, workers, None, progress, False, None, any_image_type)
        parts, rejects = _parts(index, show_patient, progress)
    except NothingUsable as error:
        _write(out, title, [], [], error.rejects, root)
        raise NothingUsable(
            error.message, f"{error.hint} {out} names every file.", error.rejects
        ) from error
    _write(out, title, parts, drawn_warnings(index.series), rejects, root)
    return out


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
    atomic_write(out, page)


def _parts(
    index: SeriesIndex, show_patient: bool, progress: Progress | None
) -> tuple[list[SeriesPart], pd.DataFrame]:
    sources = indexed_slices(index)
    parts, found = [], list[Reject]()
    total = len(index.series)
    for number, (series, has_room) in enumerate(
        zip(index.series.itertuples(), rooms(index.series), strict=True), 1
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
        parts.append(
            SeriesPart(
                f"Series {number}",
                about(series, verdict),
                facts_of(series, verdict, picture, show_patient),
                faults_of(verdict),
                picture,
                why_without(has_room),
            )
        )
    if progress is not None:
        progress("reading series", total, total)
    return parts, joined(index.rejects, found)
