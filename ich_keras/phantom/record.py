"""How large the bleeds of phantoms are, from the record that lies beside their images."""

import math
from pathlib import Path

import pandas as pd

from ich_keras.errors import DataError, StaleError
from ich_keras.files import read_json
from ich_keras.phantom.dicom import BLEED_ML, MANIFEST, is_synthetic


def with_bleed_volumes(series: pd.DataFrame, folder: Path | str) -> pd.DataFrame:
    """Add the volume of each series' bleeds to a table of series, where phantoms are recorded.

    Args:
        series: with series_instance_uid and patient_id.
        folder: of the DICOM files, or the one above it; the record is phantoms.json there.

    Returns:
        The table with the column BLEED_ML, in ml: 0 without a bleed, NaN where a series is not in
        the record. The table as it was where no series is a phantom, or there is no record.

    Raises:
        DataError: the record is damaged.
    """
    folder = Path(folder)
    places = [place / MANIFEST for place in (folder, folder.parent)]
    path = next((place for place in places if place.is_file()), None)
    if path is None or not is_synthetic(series):
        return series
    volumes = bleed_volumes_ml(path)
    found = [volumes.get(uid, math.nan) for uid in series["series_instance_uid"]]
    return series.assign(**{BLEED_ML: pd.Series(found, series.index, "float64")})


def bleed_volumes_ml(path: Path) -> dict[str, float]:
    """Return SeriesInstanceUID -> volume of all bleeds, ml, from phantoms.json.

    Records of older versions have the volume of each bleed only; of several, their sum is taken,
    which counts blood of two subtypes in one voxel twice.

    Raises:
        DataError: the file is damaged.
    """
    try:
        found = {
            str(one["series_instance_uid"]): float(
                one[BLEED_ML]
                if BLEED_ML in one
                else sum(bleed["volume_ml"] for bleed in one["bleeds"])
            )
            for one in read_json(path)["series"]
        }
    except (StaleError, OSError, LookupError, TypeError, ValueError) as error:
        raise _damaged(path, type(error).__name__) from error
    wrong = next((uid for uid, ml in found.items() if not 0 <= ml < math.inf), None)
    if wrong is not None:
        raise _damaged(path, f"series {wrong!a} bleeds {found[wrong]} ml")
    return found


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}, the record of these phantoms, is damaged ({why}).",
        "Make them again, or remove the file: sizes of bleeds are unknown then.",
    )
