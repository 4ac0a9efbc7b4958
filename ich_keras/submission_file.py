"""The submission file of RSNA's 2019 competition: `ID_<image>_<label>,<probability>`."""

import csv
import io
from pathlib import Path

import pandas as pd

from ich_keras.answer_rules import RAW
from ich_keras.errors import DataError, UsageError
from ich_keras.files import atomic_write, require_absent
from ich_keras.labels import LABELS
from ich_keras.notices import UNFINISHED
from ich_keras.progress import Tell

HEADER = "ID,Label"


def write_submission(
    predictions: pd.DataFrame | Path | str, out: Path | str, tell: Tell | None = None
) -> Path:
    """Write slice predictions in the format of RSNA's competition.

    Each image has six rows, in the order of `LABELS`. Its name is its SOPInstanceUID, which in
    RSNA's data reads `ID_...`. The values are the network's own (columns `raw_*`), as in a run's
    metrics, not the calibrated ones.

    Args:
        predictions: predictions.csv of `ich predict`, or a table with sop_instance_uid and six
            probabilities, which are taken as they are where it has none in columns `raw_*`.
        out: a new file.
        tell: called with a line about predictions of an unfinished training, for which the format
            has no room.

    Returns:
        The file.

    Raises:
        UsageError: `out` exists, or the predictions cannot be opened.
        DataError: a column is absent, an image has no name or occurs twice, or a value is not a
            probability.
    """
    out = require_absent(Path(out))
    if not isinstance(predictions, pd.DataFrame):
        try:
            predictions = pd.read_csv(predictions, dtype={"sop_instance_uid": "str"})
        except FileNotFoundError:
            raise UsageError(f"{predictions} does not exist.") from None
        except IsADirectoryError:
            raise UsageError(
                f"{predictions} is a folder.", "Give the predictions.csv in it."
            ) from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{predictions} cannot be read as predictions: {error}.") from error
    raw = [f"{RAW}{name}" for name in LABELS]
    columns = raw if set(raw) & set(predictions) else list(LABELS)
    absent = [name for name in ("sop_instance_uid", *columns) if name not in predictions]
    if absent:
        raise DataError(
            f"the predictions lack the column(s) {', '.join(absent)}.",
            "Give the predictions.csv of a run on slices or slabs.",
        )
    if len(predictions) == 0:
        raise DataError("the predictions have no row.", "Was anything predicted?")
    uids = predictions["sop_instance_uid"]
    is_nameless = uids.isna() | (uids == "")
    if is_nameless.any():
        raise DataError(
            f"{is_nameless.sum()} image(s) of the predictions have no sop_instance_uid."
        )
    if uids.duplicated().any():
        raise DataError(f"image {uids[uids.duplicated()].iloc[0]} is predicted more than once.")
    values = predictions[columns].apply(pd.to_numeric, errors="coerce")
    outside = ~((values >= 0) & (values <= 1)).all(axis=1)
    if outside.any():
        raise DataError(f"image {uids[outside].iloc[0]} has values outside 0 to 1.")
    text = io.StringIO(newline="")
    text.write(f"{HEADER}\n")
    writer = csv.writer(text, lineterminator="\n")  # a name may hold a comma or a quote
    for uid, row in zip(uids, values.itertuples(index=False), strict=True):
        writer.writerows(
            (f"{uid}_{label}", repr(value))
            for label, value in zip(LABELS, map(float, row), strict=True)
        )
    atomic_write(out, text.getvalue())
    if tell is not None and UNFINISHED in predictions:
        for notice in predictions[UNFINISHED].dropna().unique():
            tell(str(notice))
    return out
