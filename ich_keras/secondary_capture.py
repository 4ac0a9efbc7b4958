"""Heat maps as DICOM images: secondary captures of the slices to look at first, for a PACS.

Each shows a slice in the brain window, with the heat map of one label over it, as the pages do, and
refers to the image that it was made of. It copies who the patient is from there.

Source: DICOM PS3.3 A.8.1 (Secondary Capture Image), C.7.6.1 (Source Image Sequence).
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from ich_keras.context import MAPS_ALONE
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.window import BRAIN
from ich_keras.data.reading import indexed_slices, read_whole
from ich_keras.report_maps import MapMaker

_OPACITY = 0.5
_SERIES_NUMBER = 9401
_MOST_PER_LABEL = 3
_NAME = "ich_keras"
_UID = "series_instance_uid"


# What pydicom and highdicom raise at header values that their types do not allow. Only around calls
# of theirs: around code of ours it would hide faults.
BROKEN = (ValueError, TypeError, AttributeError, KeyError, NotImplementedError)


class UnsuitableHeaders(Exception):
    """A study that no DICOM object can be made for."""


@dataclass(frozen=True, eq=False)
class _Shown:
    """A slice to capture: its series (a row of the index), HU, map (0 to 1) and label."""

    uid: str
    hu: np.ndarray
    heat: np.ndarray
    label: str
    spacing_mm: tuple[float, float]


def overlay(hu: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map over a slice in the brain window: yellow to red, the stronger the more opaque.

    Args:
        hu: int16 (rows, columns), HU.
        heat: float32 (rows, columns), 0 to 1.

    Returns:
        uint8 (rows, columns, 3), RGB.

    >>> overlay(np.array([[40, 40]], np.int16), np.array([[0, 1]], np.float32)).tolist()
    [[[128, 128, 128], [191, 64, 64]]]
    """
    grey = 255 * BRAIN(hu)[..., np.newaxis]
    share = np.clip(heat, 0, 1)[..., np.newaxis]
    colour = np.concatenate([np.full_like(share, 255), 220 * (1 - share), 0 * share], axis=-1)
    alpha = _OPACITY * share
    return np.floor(grey * (1 - alpha) + colour * alpha + 0.5).astype(np.uint8)


def captures(
    maker: MapMaker,
    answers: pd.DataFrame,
    look_first: pd.DataFrame | None,
    index: SeriesIndex,
    images: dict[str, dict[str, tuple[Dataset, int]]],
) -> Iterator[bytes]:
    """Yield the secondary captures of one study, each read again.

    Args:
        maker: of the run's heat maps.
        answers: of the study's series.
        look_first: as `FolderPrediction.look_first`; a study without it has no captures.
        index: what was predicted.
        images: series -> UID of a slice -> data set of its file, and its frame.

    Raises:
        UnsuitableHeaders: its headers make no image.
        RuntimeError: one reads otherwise than it was written.
    """
    series_uid = str(generate_uid())
    for number, shown in enumerate(_shown(maker, answers, look_first, index, images), 1):
        source, frame = next(part[shown.uid] for part in images.values() if shown.uid in part)
        yield _capture(shown, source, frame, series_uid, number, maker.is_of_slice_network)


def _shown(
    maker: MapMaker,
    answers: pd.DataFrame,
    look_first: pd.DataFrame | None,
    index: SeriesIndex,
    images: dict[str, dict[str, tuple[Dataset, int]]],
) -> Iterator[_Shown]:
    if look_first is None:
        return
    sources = indexed_slices(index)
    for series in index.series[index.series["series_uid"].isin(answers[_UID])].itertuples():
        chosen = look_first[look_first[_UID] == series.series_uid]
        chosen = chosen[chosen["rank"] <= _MOST_PER_LABEL]
        spacing = (float(series.row_spacing_mm), float(series.column_spacing_mm))
        if chosen.empty or not np.isfinite(spacing).all():
            continue
        rows = np.flatnonzero((index.slices["series_uid"] == series.series_uid).to_numpy())
        read: dict[int, np.ndarray] = {}
        for row in rows.tolist():
            try:
                read[row] = read_whole(sources[row]).hu
            except RejectedFile:
                continue  # a listed reject already
        table = index.slices.iloc[list(read)]
        hu = np.stack(list(read.values()))
        labels = chosen["label"].drop_duplicates().tolist()
        maps = maker(series, hu, table["position_mm"].to_numpy(), labels)
        place = {uid: number for number, uid in enumerate(table["sop_instance_uid"])}
        for label in labels:
            for uid in chosen.loc[chosen["label"] == label, "sop_instance_uid"]:
                if uid in place and label in maps:
                    at = place[uid]
                    yield _Shown(uid, hu[at], maps[label][at], label, spacing)


def _capture(
    shown: _Shown, source: Dataset, frame: int, series_uid: str, number: int, is_alone: bool
) -> bytes:
    from highdicom.sc import SCImage

    pixels = overlay(shown.hu, shown.heat)
    try:
        image: Any = SCImage.from_ref_dataset(
            ref_dataset=source,
            pixel_array=pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            series_instance_uid=series_uid,
            series_number=_SERIES_NUMBER,
            sop_instance_uid=str(generate_uid()),
            instance_number=number,
            manufacturer=_NAME,
            pixel_spacing=shown.spacing_mm,  # type: ignore[arg-type]  # mm; annotated as whole ones
            # Slices are turned when they are read: rows to the left, columns to the back.
            patient_orientation=("L", "P"),
        )
    except BROKEN as error:
        raise UnsuitableHeaders(
            f"its headers do not make a secondary capture ({type(error).__name__})."
        ) from error
    image.SeriesDescription = "ich_keras heat maps: research only, not for clinical use"
    told = f"Heat map of {shown.label}: what an answer rests on, no finding"
    image.DerivationDescription = f"{told}. {MAPS_ALONE}" if is_alone else told
    image.BurnedInAnnotation = "NO"
    item = Dataset()
    item.ReferencedSOPClassUID = source.SOPClassUID
    item.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if frame:
        item.ReferencedFrameNumber = frame
    image.SourceImageSequence = [item]
    stream = io.BytesIO()
    image.save_as(stream)
    stream.seek(0)
    again = pydicom.dcmread(stream)
    (of,) = again.SourceImageSequence
    if not np.array_equal(again.pixel_array, pixels) or (
        of.ReferencedSOPInstanceUID != source.SOPInstanceUID
    ):
        raise RuntimeError("a secondary capture reads otherwise than it was written")
    return stream.getvalue()
