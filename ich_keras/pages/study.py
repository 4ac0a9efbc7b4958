"""The page of a study: its series to look at, the answers to them, and what they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from ich_keras import __version__
from ich_keras.errors import UsageError
from ich_keras.pages.document import render, short, visible
from ich_keras.pages.packing import json_block, pack_map


@dataclass(frozen=True, eq=False)
class Picture:
    """The slices of a series, packed for a page, inferior to superior.

    Args:
        lines: one per slice (`ich_keras.pages.packing.pack_slice`).
        rows, columns: as packed.
        row_spacing_mm, column_spacing_mm: between rows, and between columns, as packed.
        letters: of the patient's sides (R, L, A, P, H, F) at the left, right, upper and lower edge.
        z_mm: of each slice, as its header says (z of ImagePositionPatient).
        along_mm: of each slice, along the normal.
        images: of each slice, its InstanceNumber, or "".
        is_axial: whether the transverse plane is the nearest one.
        ends: what the first and the last slice lie towards.
    """

    lines: Sequence[str]
    rows: int
    columns: int
    row_spacing_mm: float
    column_spacing_mm: float
    letters: tuple[str, str, str, str]
    z_mm: Sequence[float]
    along_mm: Sequence[float]
    images: Sequence[str]
    is_axial: bool = True
    ends: tuple[str, str] = ("towards the feet", "towards the head")


@dataclass(frozen=True)
class Answer:
    """The answer to one label: see `ich_keras.answers.with_answers`.

    Args:
        label: its name.
        probability: calibrated, where the run can.
        raw: as the network gives it; None where there is no other.
        decision, group: "" where there is none.
    """

    label: str
    probability: float
    raw: float | None = None
    decision: str = ""
    group: str = ""


@dataclass(frozen=True, eq=False)
class SeriesPart:
    """One series of a page.

    Args:
        title: such as "Series 1".
        about: its slices and verdict, in a few words, for choosing it.
        facts: (name, text) of what is known of it.
        faults: sentences on what is wrong with it as a volume.
        picture: its slices; None where they are not in the page.
        why_not: then, why.
        note: what a reader of its answers must know, such as why there are none; "" without.
        answers: one per label; none without a network.
        curves: label -> the probability of each slice of the picture; None where it has none.
        first: (label, [(slice of the picture, probability), ...]) to look at first.
        shown: the label that is shown at first; "" without answers.
        maps: label -> float32 (slices, rows, columns) of 0 to 1; None without heat maps.
    """

    title: str
    about: str
    facts: Sequence[tuple[str, str]] = ()
    faults: Sequence[str] = ()
    picture: Picture | None = None
    why_not: str = ""
    note: str = ""
    answers: Sequence[Answer] = ()
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    first: Sequence[tuple[str, Sequence[tuple[int, float]]]] = ()
    shown: str = ""
    maps: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True)
class RejectKind:
    """The files that were refused for one reason: how many, why, and what to do."""

    code: str
    number: int
    meaning: str
    hint: str


@dataclass(frozen=True)
class RejectPart:
    """The files that were not used.

    Args:
        kinds: by reason, the most common first.
        rows: (file, what is wrong) of the first ones.
        number: of all of them.
        note: on files that the page does not speak of.
    """

    kinds: Sequence[RejectKind] = ()
    rows: Sequence[tuple[str, str]] = ()
    number: int = 0
    note: str = ""


@dataclass(frozen=True)
class Card:
    """What a network is: the model card.

    Args:
        title: such as "Model card".
        facts: (name, text).
        warnings: what nobody may miss.
        scores_title: what the scores are of.
        header: of their columns.
        scores: rows of text; none where the run holds no numbers.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str] = ()
    scores_title: str = ""
    header: Sequence[str] = ()
    scores: Sequence[Sequence[str]] = ()


NO_SERIES = '<p id="no-series">There is no series to show.</p>'  # no text of a file looks like it
_AXIAL = (
    "The patient's right is shown at the left. Slices are counted from the lowest, which is 1 here"
    " and slice_index 0 in the tables."
)
_OTHER = (
    "The letters at the edges name the patient's sides; position is along the line on which the"
    " slices lie."
)


def study_page(
    title: str,
    series: Sequence[SeriesPart],
    presets: Sequence[tuple[str, float, float]],
    *,
    notices: Sequence[str] = (),
    warnings: Sequence[str] = (),
    told: Sequence[str] = (),
    cards: Sequence[Card] = (),
    rejects: RejectPart | None = None,
    maps_method: str = "",
) -> str:
    """Return the page, one HTML file with everything inside.

    Args:
        title: its heading.
        series: those with a picture are shown in this order.
        presets: of the window: (name, level, width), HU; the first is shown at first.
        notices: sentences for every reader.
        warnings: the same, in red.
        told: sentences on how the answers were made.
        cards: of the networks; none without.
        rejects: files that were not used.
        maps_method: the name of the heat maps' method.

    Raises:
        UsageError: heat maps of a series have another number of slices than its picture.
    """
    shown = [one for one in series if one.picture is not None]
    packed = [_maps(one) for one in shown]
    facts = [_facts(one, maps) for one, (maps, _) in zip(shown, packed, strict=True)]
    texts = [
        {**vars(one), "pixel_text": _lines(one.picture.lines), "map_text": _lines(lines)}
        for one, (_, lines) in zip(shown, packed, strict=True)
        if one.picture is not None
    ]
    windows = [{"name": name, "level": level, "width": width} for name, level, width in presets]
    return render(
        "study.html.j2",
        styles=("viewer.css",),
        script="viewer.js" if shown else "",
        title=title,
        version=__version__,
        warnings=warnings,
        notices=notices,
        told=told,
        cards=cards,
        rejects=rejects or RejectPart(),
        shown=texts,
        unshown=[one for one in series if one.picture is None],
        presets=windows,
        has_maps=any(maps for maps, _ in packed),
        has_curves=any(one.curves for one in shown),
        maps_method=maps_method,
        no_series=Markup(NO_SERIES),
        **_directions(shown),
        facts=json_block({"series": facts, "presets": windows}),
    )


def _directions(shown: Sequence[SeriesPart]) -> dict[str, str]:
    """Say how the slices of a page are laid and counted: other planes have no lowest slice."""
    planes = {one.picture.is_axial for one in shown if one.picture is not None}
    up, order = "to the next slice", _OTHER
    if planes == {True, False}:
        order = f"Of axial series: {_AXIAL} Of the others: {_OTHER}"
    elif True in planes:
        up, order = "towards the head", _AXIAL
    return {"up": up, "order": order}


def _lines(lines: Sequence[str]) -> Markup:
    return Markup("\n".join(lines))  # base 64, in which no sign means anything to HTML


def _facts(one: SeriesPart, maps: list[dict]) -> dict[str, Any]:
    picture = one.picture
    assert picture is not None
    count = len(picture.lines)
    starts = [slices[0][0] for label, slices in one.first if label == one.shown and slices]
    return {
        "title": short(visible(one.title)),
        "rows": picture.rows,
        "columns": picture.columns,
        "row_mm": picture.row_spacing_mm,
        "column_mm": picture.column_spacing_mm,
        "letters": picture.letters,
        "axial": picture.is_axial,
        "ends": picture.ends,
        "z_mm": [round(float(value), 3) for value in picture.z_mm],
        "along_mm": [round(float(value), 3) for value in picture.along_mm],
        "images": [short(visible(text), 20) for text in picture.images],
        "labels": [visible(answer.label) for answer in one.answers],
        "curves": {
            visible(label): [None if value is None else round(float(value), 4) for value in values]
            for label, values in one.curves.items()
        },
        "maps": maps,
        "start": starts[0] if starts else count // 2,
        "shown": visible(one.shown),
    }


def _maps(one: SeriesPart) -> tuple[list[dict], list[str]]:
    """Pack the heat maps of a series: what the page is told, and their lines."""
    assert one.picture is not None
    told: list[dict] = []
    lines: list[str] = []
    for label, values in (one.maps or {}).items():
        if values.ndim != 3 or len(values) != len(one.picture.lines):
            raise UsageError(
                f"the heat map of {label} has the shape {values.shape}; expected"
                f" ({len(one.picture.lines)}, rows, columns), one for each slice of {one.title}."
            )
        own, rows, columns = pack_map(values)
        size = {"rows": rows, "columns": columns}
        by_slice = values.reshape(len(values), -1).max(axis=1)
        peak = int(by_slice.argmax()) if by_slice.max() > 0 else None
        told.append({"name": visible(label), **size, "from": len(lines), "peak": peak})
        lines += own
    return told, lines
