"""Real slices in the order of a network's probabilities."""

from pathlib import Path

import numpy as np
import pandas as pd

from ich_keras.labels import ANY, SUBTYPES
from ich_keras.run_folder import RunFolder


def rank_real(
    run: RunFolder, folder: Path, labels: Path | None = None, device: str = "auto"
) -> pd.DataFrame:
    """Rank real slices by their probability of any bleed.

    Args:
        run: of phantoms.
        folder: of DICOM files.
        labels: RSNA's csv of them; None knows none.
        device: "auto", "cpu" or "cuda".

    Returns:
        A row per slice, most suspicious first: rank, probability, label ("" where unknown),
        series (its number). Neither identifiers nor names of files.
    """
    from ich_keras.data.rsna_labels import read_rsna_labels
    from ich_keras.prediction import predict_folder

    found = predict_folder(run.path, folder, device=device).slices
    raw = f"raw_{ANY}"
    table = pd.DataFrame({"probability": found[raw if raw in found else ANY].to_numpy()})
    table["series"] = pd.factorize(found["series_instance_uid"])[0] + 1
    table["label"] = ""
    if labels is not None:
        known = read_rsna_labels(labels).table
        table["label"] = [_label_text(known, uid) for uid in found["sop_instance_uid"]]
    table = table.sort_values("probability", ascending=False, kind="stable", ignore_index=True)
    table.insert(0, "rank", np.arange(1, len(table) + 1))
    return table


def _label_text(known: pd.DataFrame, uid: str) -> str:
    """Return the bleeds of a slice in words.

    Args:
        known: labels by SOPInstanceUID.
        uid: of the slice.
    """
    if uid not in known.index:
        return ""
    row = known.loc[uid]
    return ", ".join(name for name in SUBTYPES if row[name] == 1) or "no bleed"
