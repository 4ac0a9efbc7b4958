"""`ich predict --report`: one page per study, with its slices and the answers to them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.answer_rules import DECISION, GROUP, RAW
from ich_keras.answers import LOOK_FIRST
from ich_keras.ct.rejects import Reject, joined
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.tables import shown_paths
from ich_keras.data.reading import IndexedSlice, indexed_slices
from ich_keras.data.thin_series import AVERAGE
from ich_keras.domain import VERDICT
from ich_keras.files import atomic_write
from ich_keras.labels import LabelSet
from ich_keras.leftovers import remove_leftovers
from ich_keras.model_card import model_card
from ich_keras.notices import NOT_CLINICAL, TRAINED_ON_PHANTOMS
from ich_keras.pages.document import render
from ich_keras.pages.study import Answer, Card, SeriesPart, study_page
from ich_keras.prediction_journal import inside, written
from ich_keras.prediction_members import Member
from ich_keras.prediction_tables import FolderPrediction
from ich_keras.progress import Progress
from ich_keras.shown_series import (
    NOT_READ,
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
from ich_keras.thin_tables import AVERAGED_MM, NUM_AVERAGED, rows_seen

REPORTS_FOLDER = "reports"
START = "index.html"
REPORT = "report"  # a column of studies.csv
_UID = "series_instance_uid"
_NO_ANSWER = "This run gives no answer to this series; rejects.csv says why."
_NO_SLICES = "This run answers for whole series: it says nothing of single slices."
_OUTSIDE = (
    "This series is unlike those of the training (domain: outside). Its probabilities, decisions"
    " and groups promise nothing."
)
# How sentences of a notice begin that count all series of the predicted folder.
_COUNTED = ("Domain: ", "Thin series: ")
_WHOLE = "In the whole folder: "

# Heat maps: of a series (its row in the index), its slices that are shown (int16, HU; their
# positions, mm) and labels, the most wanted first: label -> float32 (slices, rows, columns), 0..1.
MapsOf = Callable[[Any, np.ndarray, np.ndarray, Sequence[str]], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, eq=False)
class Reports:
    """What the pages of a prediction hold beside it.

    Args:
        cards: of the runs.
        show_patient: tell the PatientID of each series.
        maps_of, maps_method: heat maps, and the name of their method; None and "" without.
    """

    cards: Sequence[Card]
    show_patient: bool = False
    maps_of: MapsOf | None = None
    maps_method: str = ""

    @classmethod
    def of(
        cls,
        members: Sequence[Member],
        show_patient: bool = False,
        heat_maps: str | None = None,
        thin: str = AVERAGE,
    ) -> "Reports":
        """Prepare the pages of what some runs predict.

        Args:
            members: the runs.
            show_patient: see `Reports`.
            heat_maps: their method (`ich_keras.relevance.MapOptions`); None makes none.
            thin: what was done with thin series.

        Raises:
            StaleError: a file of a run is damaged.
            UsageError: as `ich_keras.report_maps.MapMaker`.
        """
        number = len(members)
        titles = [f"Model card {n} of {number}" for n in range(1, number + 1)]
        titles = titles if number > 1 else ["Model card"]
        cards = [model_card(one.run, title) for one, title in zip(members, titles, strict=True)]
        if heat_maps is None:
            return cls(cards, show_patient)
        from ich_keras.report_maps import MapMaker  # torch comes with it

        return cls(cards, show_patient, MapMaker(members, heat_maps, thin), heat_maps)


def write_reports(
    reports: Reports,
    folder: Path,
    prediction: FolderPrediction,
    index: SeriesIndex,
    root: Path,
    progress: Progress | None = None,
) -> FolderPrediction:
    """Write a page for each study of a prediction, reports/1.html, ..., and one that leads there.

    Args:
        reports: what they hold beside it.
        folder: of the prediction.
        prediction: finished, with its studies; its paths are inside `root`.
        index: what was predicted.
        root: the predicted folder.
        progress: called as progress("writing reports", done, total).

    Returns:
        The prediction; its studies name their page in a last column, `report`.

    Raises:
        EnvironmentProblem: a page cannot be written.
    """
    assert prediction.studies is not None
    studies = prediction.studies
    sources = indexed_slices(index)
    rejected = set(prediction.rejects["path"])
    left_out = {path for path in shown_paths(index.slices) if inside(path, root) in rejected}
    with written(folder / REPORTS_FOLDER):
        (folder / REPORTS_FOLDER).mkdir(exist_ok=True)
    remove_leftovers(folder / REPORTS_FOLDER, is_alone=True)
    names = []
    for number, study in enumerate(studies.itertuples(), 1):
        if progress is not None:
            progress("writing reports", number - 1, len(studies))
        maker = _StudyMaker(reports, prediction, index, sources, left_out, root)
        page = maker.page(study, f"Head CT, study {number} of {len(studies)}")
        name = f"{number}.html"
        with written(folder / REPORTS_FOLDER / name):
            atomic_write(folder / REPORTS_FOLDER / name, page)
        names.append(f"{REPORTS_FOLDER}/{name}")
    with written(folder / REPORTS_FOLDER / START):
        atomic_write(folder / REPORTS_FOLDER / START, _start_page(prediction, reports.cards))
    if progress is not None:
        progress("writing reports", len(studies), len(studies))
    return dataclasses.replace(prediction, studies=studies.assign(**{REPORT: names}))


def _start_page(prediction: FolderPrediction, cards: Sequence[Card]) -> str:
    """Return the page that leads to the others."""
    assert prediction.studies is not None
    label = prediction.labels.shown
    columns = {
        label: label,
        f"{DECISION}{label}": "decision",
        f"{GROUP}{label}": "group",
        "num_series": "series",
        "num_slices": "slices",
        "verdict": "verdict",
        "disagreement": "series disagree on",
        "study_instance_uid": "study",
    }
    studies = prediction.studies
    told = [name for name in columns if name in studies and studies[name].ne("").any()]
    table = studies[told]
    rows = []
    for number, row in enumerate(table.to_dict("records"), 1):
        cells = [f"{row[name]:.3f}" if name == label else str(row[name]) for name in table]
        rows.append((f"{number}.html", cells))
    return render(
        "studies.html.j2",
        title=f"Head CT, {len(rows):,} {'study' if len(rows) == 1 else 'studies'}",
        warnings=_warnings(cards),
        notices=[NOT_CLINICAL],
        header=["page", *(columns[name] for name in table)],
        long=[columns[name] for name in ("disagreement", "study_instance_uid")],
        rows=rows,
    )


def _warnings(cards: Sequence[Card]) -> list[str]:
    return list(dict.fromkeys(text for card in cards for text in card.warnings))


@dataclasses.dataclass(frozen=True, eq=False)
class _StudyMaker:
    """What the pages of a prediction are made of; see `write_reports`."""

    reports: Reports
    prediction: FolderPrediction
    index: SeriesIndex
    sources: Sequence[IndexedSlice]
    left_out: set[str]
    root: Path

    def page(self, study: Any, title: str) -> str:
        """Return the page of one study, a row of the prediction's studies."""
        cards = self.reports.cards
        table = self._series_of(study)
        found: list[Reject] = []
        parts = []
        for number, (series, has_room) in enumerate(
            zip(table.itertuples(), rooms(table), strict=True), 1
        ):
            name = f"Series {number}"
            if len(table) > 1 and series.series_uid == study.series_instance_uid:
                name += " (the one that counts)"
            parts.append(self._part(series, name, has_room, found))
        uids = set(table["series_instance_uid"])
        own = self.prediction.rejects[self.prediction.rejects[_UID].isin(uids)]
        own = joined(own, found)
        rest = len(self.prediction.rejects) + len(found) - len(own)
        note = f"{rest:,} more files of the folder were not used: see rejects.csv." if rest else ""
        first, *told = self.prediction.notice.splitlines()
        if not self.prediction.series[_UID].isin(uids).all():
            told = [f"{_WHOLE}{one}" if one.startswith(_COUNTED) else one for one in told]
        warnings = _warnings(cards) + drawn_warnings(table)
        notices = [NOT_CLINICAL]
        if study.disagreement:
            names = study.disagreement.replace(";", ", ")
            warnings.append(f"The series of this study disagree on: {names}.")
        if len(cards) > 1:
            notices += [_without(first, NOT_CLINICAL, TRAINED_ON_PHANTOMS, *warnings)]
        return study_page(
            title,
            parts,
            PRESETS,
            notices=notices,
            warnings=warnings,
            told=told,
            cards=cards,
            rejects=reject_part(own, lambda path: inside(path, self.root), note),
            maps_method=self.reports.maps_method,
        )

    def _series_of(self, study: Any) -> pd.DataFrame:
        """Return the series of a study in the index: the one that counts, answered ones, others."""
        series = self.index.series
        counts = series["series_uid"] == study.series_instance_uid
        is_own = counts
        if study.study_instance_uid:
            is_own = is_own | (series["study_instance_uid"] == study.study_instance_uid)
        answered = series["series_uid"].isin(self.prediction.series[_UID])
        rank = np.where(counts, 0, np.where(answered, 1, 2))
        return series.assign(rank=rank)[is_own].sort_values("rank", kind="stable")

    def _part(self, series: Any, title: str, has_room: bool, found: list[Reject]) -> SeriesPart:
        maps_of = self.reports.maps_of
        read = NOT_READ
        if has_room:
            left_out = self._left_out(series)
            read = read_series(self.index, series, self.sources, left_out, maps_of is not None)
            # Those of a series that was skipped were refused before.
            found += [reject for reject in read.rejects if reject.path not in self.left_out]
        picture, rows = read.picture, read.rows
        uids = self.index.slices["sop_instance_uid"].to_numpy()[rows].tolist()
        labels = self.prediction.labels
        answers = self.prediction.series[self.prediction.series[_UID] == series.series_uid]
        if answers.empty:
            return SeriesPart(
                title,
                about(series, series.verdict),
                facts_of(series, series.verdict, picture, self.reports.show_patient),
                faults_of(series.verdict),
                picture,
                why_without(has_room),
                _NO_ANSWER,
            )
        answer = answers.iloc[0]
        verdict = answer["verdict"]
        curves, first, seen = self._slices(series.series_uid, uids)
        shown = _shown(answer, first, labels)
        if not first and curves:
            first = [(shown, _highest(curves[shown], seen))]
        maps = None
        if maps_of is not None and read.hu is not None:
            wanted = [shown, *(label for label, _ in first), *labels.names]
            positions = self.index.slices["position_mm"].to_numpy()[rows]
            maps = maps_of(series, read.hu, positions, list(dict.fromkeys(wanted)))
        notes = [_OUTSIDE] if answer[VERDICT] == "outside" else []
        notes += [] if self.prediction.slices is not None else [_NO_SLICES]
        notes += _averaged(answer) if len(self.reports.cards) == 1 else []
        facts = facts_of(series, verdict, picture, self.reports.show_patient)
        if answer[VERDICT]:
            facts.append(("Domain", answer[VERDICT]))
        return SeriesPart(
            title,
            f"{about(series, verdict)}; {_headline(answer, shown)}",
            facts,
            faults_of(verdict),
            picture,
            why_without(has_room),
            " ".join(notes),
            _answers(answer, labels),
            curves,
            first,
            shown,
            maps,
        )

    def _left_out(self, series: Any) -> set[str]:
        """Return the files of a series that were refused; none if all were: it was skipped."""
        own = self.index.slices["series_uid"] == series.series_uid
        paths = set(shown_paths(self.index.slices[own]))
        return set() if paths <= self.left_out else paths & self.left_out

    def _slices(
        self, series_uid: str, uids: list[str]
    ) -> tuple[dict[str, list[float | None]], list[tuple[str, list[tuple[int, float]]]], list[int]]:
        """Return the probabilities of the slices of a picture, those to look at first, and those
        that stand for what the network saw."""
        slices, look_first = self.prediction.slices, self.prediction.look_first
        if slices is None:
            return {}, [], []
        rows = slices[slices[_UID] == series_uid]
        own = rows.set_index("sop_instance_uid")
        curves: dict[str, list[float | None]] = {
            name: [None if value != value else value for value in own[name].reindex(uids).tolist()]
            for name in self.prediction.labels.names
        }
        first: dict[str, list[tuple[int, float]]] = {}
        place = {uid: number for number, uid in enumerate(uids)}
        for row in () if look_first is None else look_first.itertuples():
            if row.series_instance_uid == series_uid and row.sop_instance_uid in place:
                first.setdefault(row.label, []).append(
                    (place[row.sop_instance_uid], float(row.probability))
                )
        seen = rows["sop_instance_uid"].iloc[rows_seen(rows)]
        return curves, list(first.items()), [place[uid] for uid in seen if uid in place]


def _answers(answer: pd.Series, labels: LabelSet) -> list[Answer]:
    found = []
    for name in labels.names:
        raw = answer.get(f"{RAW}{name}")
        decided = (answer.get(f"{kind}{name}", "") for kind in (DECISION, GROUP))
        found.append(
            Answer(name, float(answer[name]), None if raw is None else float(raw), *decided)
        )
    return found


def _headline(answer: pd.Series, label: str) -> str:
    decision = answer.get(f"{DECISION}{label}", "")
    return f"{label} {answer[label]:.3f}{', ' if decision else ''}{decision}"


def _shown(answer: pd.Series, first: Sequence[tuple[str, Any]], labels: LabelSet) -> str:
    """Return the label to show at first: one whose slices are to be looked at."""
    names = [label for label, _ in first] or list(labels.names)
    if labels.any_label in names:
        return str(labels.any_label)
    return max(names, key=lambda name: answer[name])


def _averaged(answer: pd.Series) -> list[str]:
    """Say that a thin series was averaged before the network saw it."""
    number = answer.get(NUM_AVERAGED, 0)
    if pd.isna(number) or not number:
        return []
    return [
        f"The network saw {number:,} slices of {answer[AVERAGED_MM]:.3g} mm, each averaged of thin"
        " ones, which share its answer."
    ]


def _highest(curve: Sequence[float | None], seen: Sequence[int]) -> list[tuple[int, float]]:
    found = [(number, value) for number in seen if (value := curve[number]) is not None]
    return sorted(found, key=lambda one: -one[1])[:LOOK_FIRST]


def _without(text: str, *parts: str) -> str:
    """Return the first line of a notice without the sentences that stand elsewhere."""
    for part in parts:
        text = text.replace(part, "")
    return " ".join(text.split())
