"""The tables of a prediction: one row per slice, per series and per refused file."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.ct.rejects import REJECTS_FILE, Reject, joined, nothing_usable
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.tables import csv_text, shown_paths
from ich_keras.data.cache.tables import verdicts_after_reading
from ich_keras.data.skull import SeriesFlags
from ich_keras.data.thin_series import AS_THEY_ARE, Blocks, ThinRule, is_thin
from ich_keras.data.views import View
from ich_keras.domain import Domain, domain_columns
from ich_keras.files import atomic_write, json_text
from ich_keras.inference import SLICE_COLUMNS, probability_table
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics.aggregation import HEAD, aggregate, head_columns
from ich_keras.metrics.smoothing import NO_SMOOTHING, smooth
from ich_keras.notices import NOT_CLINICAL
from ich_keras.prediction_journal import (
    DECISIONS_FILE,
    LOOK_FIRST_FILE,
    NOTICE_FILE,
    PREDICTIONS_FILE,
    SERIES_FILE,
    STUDIES_FILE,
    SeriesResult,
    inside,
    written,
)
from ich_keras.thin_tables import AVERAGED_SLICE, averaged_columns, seen_slices

# Columns to find it in a viewer: file, InstanceNumber, z of ImagePositionPatient.
PLACE_COLUMNS = ("path", "instance_number", "image_position_z_mm")
CONTRAST = "contrast"


@dataclass(frozen=True)
class FolderPrediction:
    """The result of `predict_folder`.

    Args:
        slices: one row per slice: `SLICE_COLUMNS`, `PLACE_COLUMNS`, `averaged_slice` (the number of
            the averaged slice whose answer it has; missing where none was averaged) and a
            probability for each label; None for a run on whole series, which does not predict
            single slices.
        series: one row per series: its UID, number of slices, verdict, number of refused files and
            a probability for each label, aggregated from its slices by the run's rule, or from a
            run on whole series; behind them `head_*` of a run with a sequence head, which is what
            the head answers to the series itself. Before them, `num_averaged` and `averaged_mm` of
            thin series (how many averaged slices the network saw, 0 for none, and how far apart:
            `ich_keras.data.thin_series`), `domain_distance` and `domain` ("inside", "outside", or
            "" where the run says nothing of it: `ich_keras.domain`). Then the flags: `contrast`
            ("yes", "no", or "" where no tag says anything; `ich_keras.ct.traits`), `operated` and
            `empty` ("yes", or "" where the pixels show nothing of the kind, or are too coarse;
            `ich_keras.data.skull`).

            `predict_folder` adds answers to both: see `ich_keras.answers.with_answers`.
        rejects: one row per file that could not be used.
        notice: for every reader of the probabilities: they are not for clinical use, and, if so,
            the network was trained only on phantoms; then how the answers were made, in lines.
        labels: the columns of probabilities.
        look_first: of each series, the slices with the most evidence for what was decided; None
            for a run on whole series.
        decisions: how the answers were made, as decisions.json holds it; None without answers.
        members: of an ensemble, what each run predicts alone, in their order.
        studies: one row per study, with the answers of the series that counts
            (`ich_keras.studies`).
    """

    slices: pd.DataFrame | None
    series: pd.DataFrame
    rejects: pd.DataFrame
    notice: str = NOT_CLINICAL
    labels: LabelSet = SIX
    look_first: pd.DataFrame | None = None
    decisions: dict[str, Any] | None = None
    members: "tuple[FolderPrediction, ...]" = ()
    studies: pd.DataFrame | None = None

    def __repr__(self) -> str:
        slices = "" if self.slices is None else f"{len(self.slices)} slices, "
        return f"FolderPrediction({slices}{len(self.series)} series, {len(self.rejects)} rejects)"


def tables_of(
    index: SeriesIndex,
    results: Sequence[SeriesResult],
    view: View,
    rule: str,
    labels: LabelSet = SIX,
    kernel: str = NO_SMOOTHING,
    domain: Domain | None = None,
    thin: ThinRule = AS_THEY_ARE,
) -> FolderPrediction:
    """Make the tables of a prediction.

    Args:
        index: what was predicted.
        results: one for each of its series, in order.
        view: what a sample of the network is.
        rule: for aggregating slices.
        labels: what the network answers.
        kernel: for smoothing slices along z.
        domain: of the run; judges the distances of the series.
        thin: by which thin series were averaged.

    Returns:
        The prediction, with absolute paths.

    Raises:
        NothingUsable: nothing was predicted; its `rejects` say why.
    """
    rows = index.slices.groupby("series_uid", sort=False).indices
    paths = shown_paths(index.slices).to_numpy()
    uids = index.slices["series_instance_uid"].to_numpy()
    positions = index.slices["position_mm"].to_numpy()
    said = dict(zip(index.series["series_uid"], index.series["verdict"], strict=True))
    kept, rejects = [], []
    blocks: list[Blocks | None] = []
    thin_ones: list[bool] = []
    for result in results:
        own = rows[result.series_uid]
        if len(result.values):
            kept.append(own[result.rows])
            facts = positions[kept[-1]], said[result.series_uid]
            blocks.append(thin.blocks(*facts))
            thin_ones.append(is_thin(*facts, thin.distances))
        for row, code, detail, hint in result.rejects:
            rejects.append(Reject(paths[own[row]], code, detail, hint, uids[own[row]]))
    rejected = joined(index.rejects, rejects)
    if not kept:
        raise nothing_usable(
            f"no slice of {len(rejected):,} files could be predicted",
            rejected,
            "There is no usable slice.",
        )
    chosen = np.concatenate(kept)
    slices = index.slices.iloc[chosen]
    values = np.concatenate([result.values for result in results if len(result.values)])
    if view.kind == "series":
        table = None
        series = _series_predictions(slices, values, labels)
    else:
        # Averaged slices are smoothed and aggregated as the slices that they are.
        seen = seen_slices(
            slices["series_uid"].to_numpy(), positions[chosen], list(map(len, kept)), blocks
        )
        values = smooth(values, seen.uids, seen.positions_mm, kernel, labels)
        table = probability_table(slices, values[seen.owner], labels)
        table = _with_places(table, slices)
        table.insert(len(SLICE_COLUMNS) + len(PLACE_COLUMNS), AVERAGED_SLICE, seen.numbers)
        head = _heads(results)
        series = aggregate(values, seen.uids.tolist(), rule, labels, head)
        series.insert(0, "num_slices", slices["series_uid"].value_counts().reindex(series.index))
        series = series.rename_axis("series_instance_uid")
        if head is not None:
            own = aggregate(values, seen.uids.tolist(), HEAD, labels, head)
            series[head_columns(labels)] = own.to_numpy(np.float32)
    is_kept = np.zeros(len(index.slices), bool)
    is_kept[chosen] = True
    distances = {result.series_uid: result.distance for result in results}
    verdicts = _with_verdicts(series, index, is_kept)
    predicted = verdicts["series_instance_uid"]
    columns = averaged_columns(blocks, thin)
    columns |= domain_columns(domain, [distances[uid] for uid in predicted])
    columns |= _flag_columns(predicted, index, results)
    for place, (name, column) in enumerate(columns.items(), 4):
        verdicts.insert(place, name, column)
    told = thin.sentence(thin_ones)
    notice = "\n".join([NOT_CLINICAL, told] if told else [NOT_CLINICAL])
    return FolderPrediction(table, verdicts, rejected, notice, labels)


def _flag_columns(
    uids: pd.Series, index: SeriesIndex, results: Sequence[SeriesResult]
) -> dict[str, list[str]]:
    """Return what tags say of contrast medium, and what pixels show of the head."""
    contrast = index.series.set_index("series_uid")[CONTRAST]
    flags = {result.series_uid: result.flags for result in results}
    found = {CONTRAST: contrast.loc[uids].tolist()}
    return found | {
        name: [getattr(flags[uid], name) for uid in uids] for name in SeriesFlags._fields
    }


def _heads(results: Sequence[SeriesResult]) -> np.ndarray | None:
    """Return the head's answer to the series of each slice, (slices, labels); None without one."""
    used = [result for result in results if len(result.values)]
    if any(result.head is None for result in used):
        return None
    heads = np.stack([result.head for result in used if result.head is not None])
    return np.repeat(heads, [len(result.values) for result in used], axis=0)


def _series_predictions(slices: pd.DataFrame, values: np.ndarray, labels: LabelSet) -> pd.DataFrame:
    counts = slices.groupby("series_uid", sort=False).size()
    series = pd.DataFrame(values, index=counts.index, columns=list(labels.names))
    series.insert(0, "num_slices", counts)
    return series.rename_axis("series_instance_uid")


def _with_places(table: pd.DataFrame, slices: pd.DataFrame) -> pd.DataFrame:
    """Add the columns a person needs to find a slice in a viewer."""
    for place, name in enumerate(PLACE_COLUMNS, len(SLICE_COLUMNS)):
        column = shown_paths(slices) if name == "path" else slices[name]
        table.insert(place, name, column.to_numpy())
    return table


def _with_verdicts(series: pd.DataFrame, index: SeriesIndex, kept: np.ndarray) -> pd.DataFrame:
    verdicts = index.series.set_index("series_uid")["verdict"]
    verdicts[:] = verdicts_after_reading(verdicts, index.slices, kept)
    series.insert(1, "verdict", verdicts.reindex(series.index))
    lost = index.slices.loc[~kept, "series_uid"].value_counts()
    rejected = index.series.set_index("series_uid")["num_rejected"].add(lost, fill_value=0)
    series.insert(2, "num_rejected", rejected.reindex(series.index).astype(int))
    return series.reset_index()


def with_paths_inside(prediction: FolderPrediction, root: Path) -> FolderPrediction:
    """Return a prediction whose paths are relative to the predicted folder."""
    slices = prediction.slices
    if slices is not None:
        slices = slices.assign(path=[inside(path, root) for path in slices["path"]])
    rejects = rejects_inside(prediction.rejects, root)
    return dataclasses.replace(prediction, slices=slices, rejects=rejects)


def rejects_inside(rejects: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Return a table of rejects whose paths are relative to the predicted folder."""
    # The details of copies and conflicts name the other file.
    details = rejects["detail"].str.replace(f"{root}{os.sep}", "", regex=False)
    return rejects.assign(path=[inside(path, root) for path in rejects["path"]], detail=details)


def write_tables(folder: Path, prediction: FolderPrediction) -> None:
    """Write predictions.csv and look_first.csv (not for a run on whole series), series.csv,
    studies.csv, rejects.csv, decisions.json and notice.txt.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    texts = {}
    if prediction.slices is not None:
        texts[PREDICTIONS_FILE] = csv_text(prediction.slices)
    if prediction.look_first is not None:
        texts[LOOK_FIRST_FILE] = csv_text(prediction.look_first)
    texts[SERIES_FILE] = csv_text(prediction.series)
    if prediction.studies is not None:
        texts[STUDIES_FILE] = csv_text(prediction.studies)
    texts[REJECTS_FILE] = csv_text(prediction.rejects)
    if prediction.decisions is not None:
        texts[DECISIONS_FILE] = json_text(prediction.decisions)
    texts[NOTICE_FILE] = f"{prediction.notice}\n"
    for name, text in texts.items():
        with written(folder / name):
            atomic_write(folder / name, text)
