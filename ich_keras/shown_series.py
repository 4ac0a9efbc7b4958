"""The series of an index as parts of a page: their slices, and what is known of them, in words."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.geometry import TILT_DEGREES, is_axial, slice_normal
from ich_keras.ct.plausibility import Content, content_of_reject, implausible_rows
from ich_keras.ct.rejects import REJECT_CODES, Reject, RejectedFile
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.tables import COSINES
from ich_keras.ct.verdict import MEANINGS, shown, words_of
from ich_keras.ct.window import BRAIN, SOFT_TISSUE, SUBDURAL, Window
from ich_keras.data.reading import IndexedSlice, read_whole
from ich_keras.pages.packing import MAX_VOXELS, pack_slice, shrinking, shrunk
from ich_keras.pages.study import Picture, RejectKind, RejectPart
from ich_keras.phantom.dicom import is_synthetic

BONE = Window(level=600, width=2800)
# Of the window, in a viewer: (name, level, width).
PRESETS = tuple(
    (name, window.level, window.width)
    for name, window in (
        ("Brain", BRAIN),
        ("Subdural", SUBDURAL),
        ("Soft tissue", SOFT_TISSUE),
        ("Bone", BONE),
    )
)
SHOWN_REJECTS = 200  # files, on a page
_NONE_READ = "None of its slices could be read."
_NO_ROOM = "Its slices are left out: a page holds {:.0f} million pixels. Give this series alone."
# What the patient's axes x, y, z lead to, and what they come from.
_SIDES = ("LR", "PA", "HF")
_TOWARDS = {
    **{"L": "the left", "R": "the right", "P": "the back", "A": "the front"},
    **{"H": "the head", "F": "the feet"},
}
_OBLIQUE = 0.5  # of a direction: beyond 30 degrees, as no gantry tilts, a second letter tells it


def letters_of(cosines: Sequence[float]) -> tuple[str, str, str, str]:
    """Return the patient's sides at the left, right, upper and lower edge of a slice.

    Args:
        cosines: direction cosines along a row (x, y, z), then along a column (x, y, z).

    Source:
        DICOM PS3.3 C.7.6.1.1.1 (R, L, A, P, H, F).

    >>> letters_of((1, 0, 0, 0, 1, 0))
    ('R', 'L', 'A', 'P')
    """
    row, column = np.asarray(cosines[:3]), np.asarray(cosines[3:])
    return _side(-row), _side(row), _side(-column), _side(column)


def _side(direction: np.ndarray) -> str:
    order = np.argsort(-abs(direction), kind="stable")
    chosen = [axis for place, axis in enumerate(order) if not place or _is_oblique(direction[axis])]
    return "".join(_SIDES[axis][int(direction[axis] < 0)] for axis in chosen)


def ends_of(cosines: Sequence[float]) -> tuple[str, str]:
    """Return what the first and the last slice of a series lie towards.

    Args:
        cosines: as for `letters_of`.

    >>> ends_of((0, 1, 0, 0, 0, -1))
    ('towards the right', 'towards the left')
    """
    normal = slice_normal(cosines)
    first, last = (_TOWARDS[_side(direction)[0]] for direction in (-normal, normal))
    return f"towards {first}", f"towards {last}"


def _is_oblique(part: float) -> bool:
    return abs(part) > _OBLIQUE


@dataclass(frozen=True, eq=False)
class SeriesRead:
    """A series as it was read for a page.

    Args:
        picture: its slices; None where there are none.
        rows: of these slices, in the index' table of slices; int64.
        rejects: what was refused.
        hu: int16 (slices, rows, columns), HU, at their own matrix; None unless it was asked for.
    """

    picture: Picture | None
    rows: np.ndarray
    rejects: Sequence[Reject]
    hu: np.ndarray | None


NOT_READ = SeriesRead(None, np.zeros(0, np.int64), (), None)


def read_series(
    index: SeriesIndex,
    series: Any,
    sources: Sequence[IndexedSlice],
    left_out: Collection[str] = (),
    keep_hu: bool = False,
) -> SeriesRead:
    """Read the slices of a series for a page, as a cache or a network's input gets them.

    Args:
        index: which it is of.
        series: its row in the index.
        sources: from `ich_keras.data.reading.indexed_slices`.
        left_out: paths of files that are refused already, as `shown_path` has them.
        keep_hu: whether to return the slices also as they are.
    """
    of_series = np.flatnonzero((index.slices["series_uid"] == series.series_uid).to_numpy())
    rows = [row for row in of_series.tolist() if sources[row].path not in left_out]
    factor = shrinking(len(rows), series.rows, series.columns)
    lines, rejects = [""] * len(rows), list[Reject]()
    contents, whole = list[Content | None](), dict[int, np.ndarray]()
    shape = (0, 0)
    for number, row in enumerate(rows):
        try:
            read = read_whole(sources[row])
        except RejectedFile as reject:
            rejects.append(Reject.of(sources[row].path, reject))
            contents.append(content_of_reject(reject))
        else:
            small = shrunk(read.hu, factor)
            lines[number], shape = pack_slice(small), small.shape
            contents.append(read.content)
            if keep_hu:
                whole[number] = read.hu
    for number, reason in implausible_rows([series.series_uid] * len(rows), contents).items():
        if lines[number]:
            rejects.append(Reject(sources[rows[number]].path, *reason))
            lines[number] = ""
    places = [number for number, line in enumerate(lines) if line]
    kept = np.array([rows[number] for number in places], np.int64)
    if not places:
        return SeriesRead(None, kept, rejects, None)
    table = index.slices.iloc[kept]
    along, z = table["position_mm"], table["image_position_z_mm"]
    cosines = _cosines(series)
    picture = Picture(
        [lines[number] for number in places],
        *shape,
        float(series.row_spacing_mm) * factor,
        float(series.column_spacing_mm) * factor,
        letters_of(cosines),
        z.where(np.isfinite(z), along).tolist(),
        along.tolist(),
        table["instance_number"].tolist(),
        is_axial(cosines),
        ends_of(cosines),
    )
    hu = np.stack([whole[number] for number in places]) if keep_hu else None
    return SeriesRead(picture, kept, rejects, hu)


def _cosines(series: Any) -> list[float]:
    return [float(getattr(series, name)) for name in COSINES]


def rooms(series: pd.DataFrame) -> list[bool]:
    """Say which series of a page have room for their slices, the first ones first.

    Args:
        series: rows of an index, in the order of the page.
    """
    found, used = [], 0
    for one in series.itertuples():
        factor = shrinking(one.num_slices, one.rows, one.columns)
        voxels = one.num_slices * (one.rows // factor) * (one.columns // factor)
        found.append(not used or used + voxels <= MAX_VOXELS)
        used += voxels if found[-1] else 0
    return found


def why_without(has_room: bool) -> str:
    """Say why a series is shown without its slices."""
    return _NONE_READ if has_room else _NO_ROOM.format(MAX_VOXELS / 1e6)


def about(series: Any, verdict: str) -> str:
    """Describe a series in a few words.

    Args:
        series: its row in an index.
        verdict: on it, after its files were read.
    """
    slices = _slices(series.num_slices)
    spacing = f" of {abs(series.slice_spacing_mm):.3g} mm" if _has_spacing(series) else ""
    kernel = f", {series.kernel}" if series.kernel else ""
    return f"{slices}{spacing}{kernel}; {shown(verdict)}"


def facts_of(
    series: Any, verdict: str, picture: Picture | None, show_patient: bool = False
) -> list[tuple[str, str]]:
    """Return what is known of a series: (name, text).

    Args:
        series: its row in an index.
        verdict: on it, after its files were read.
        picture: its slices in the page.
        show_patient: also tell its PatientID.
    """
    spacing = f"{series.row_spacing_mm:.4g} × {series.column_spacing_mm:.4g} mm each"
    count = series.num_slices if picture is None else len(picture.lines)
    matrix = f"{series.rows} × {series.columns} pixels"
    found = [
        ("PatientID", (series.patient_id or "none") if show_patient else ""),
        ("Slices", f"{_slices(count)} of {matrix}, {spacing}"),
    ]
    if picture is not None and (picture.rows, picture.columns) != (series.rows, series.columns):
        small = f"{picture.rows} × {picture.columns}"
        found.append(("On this page", f"{small} pixels, the means of those of the files"))
    if _has_spacing(series):
        found.append(("Slice distance", f"{abs(series.slice_spacing_mm):.4g} mm (median)"))
    if series.tilt_degrees > TILT_DEGREES and is_axial(_cosines(series)):
        found.append(("Tilt", f"{series.tilt_degrees:.1f} degrees"))
    found += [
        ("Kernel", series.kernel),
        ("Body part", series.body_part),
        ("Verdict", shown(verdict)),
        ("Series UID", series.series_uid),
        ("Study UID", series.study_instance_uid),
    ]
    return [(name, text) for name, text in found if text]


def faults_of(verdict: str) -> list[str]:
    """Say in sentences what a verdict means; none for "ok"."""
    return [MEANINGS[word] for word in words_of(verdict)]


def _slices(number: int) -> str:
    return f"{number:,} {'slice' if number == 1 else 'slices'}"


def _has_spacing(series: Any) -> bool:
    return bool(np.isfinite(series.slice_spacing_mm) and series.num_slices > 1)


def drawn_warnings(series: pd.DataFrame) -> list[str]:
    """Say that series are phantoms, for the top of their page; nothing of others.

    Args:
        series: rows of an index.
    """
    is_drawn = [is_synthetic(one) for _, one in series.groupby("series_uid")]
    if not any(is_drawn):
        return []
    which = "These slices are" if all(is_drawn) else "Some of these series are"
    return [f"{which} drawn phantoms, which show no patient."]


def reject_part(
    table: pd.DataFrame, told: Callable[[str], str] = str, note: str = ""
) -> RejectPart:
    """Say in words which files were not used.

    Args:
        table: of rejects.
        told: makes of a path what people read.
        note: see `RejectPart`.
    """
    numbers = Counter(table["code"].tolist())
    order = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    hints: Mapping[str, str] = table.drop_duplicates("code").set_index("code")["hint"].to_dict()
    kinds = [RejectKind(c, number, REJECT_CODES[c].meaning, hints[c]) for c, number in order]
    few = table.iloc[:SHOWN_REJECTS]
    rows = [
        (told(path), detail or REJECT_CODES[code].meaning)
        for path, code, detail in zip(few["path"], few["code"], few["detail"], strict=True)
    ]
    return RejectPart(kinds, rows, len(table), note)
