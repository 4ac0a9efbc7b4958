"""The detector to beat: counting bright voxels inside the skull.

A network that sees no more than "many voxels at 50 to 80 HU" has learnt nothing about shape or
place. The demo and the reports show this detector beside the network, trained on the same slices.
"""

import cv2
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import is_positive
from ich_keras.errors import DataError

_SLICES_AT_A_TIME = 1000  # a whole data set does not fit into memory
BONE_HU = 300
# Edges of the bands, HU: blood is 50-80, calcifications are above.
BAND_EDGES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 150, 300)


def inside_skull(hu: np.ndarray) -> np.ndarray:
    """Return what bone encloses in a slice, without the bone and without a margin of one voxel.

    A voxel is inside if no path leads to it from the border of the image without crossing bone. A
    skull with a gap (lowest slices) encloses nothing, and neither does a slice above the head.

    Args:
        hu: int16 (rows, columns), HU.

    Returns:
        bool (rows, columns).

    >>> hu = np.full((7, 7), -1000, np.int16)
    >>> hu[1:6, 1:6] = 1000  # bone
    >>> hu[2:5, 2:5] = 40  # brain
    >>> int(inside_skull(hu).sum())
    1
    """
    bone = np.pad(hu > BONE_HU, 1).astype(np.uint8)
    outside = bone.copy()
    cv2.floodFill(outside, None, (0, 0), 1)  # the padding joins all four borders
    enclosed = (1 - outside)[1:-1, 1:-1]
    # Voxels at the table are part bone and would fill every band in every slice.
    return cv2.erode(enclosed, np.ones((3, 3), np.uint8)) == 1


def hu_band_counts(hu: np.ndarray, pixel_area_mm2: float | None = None) -> np.ndarray:
    """Count the voxels inside the skull in each band of HU, slice by slice.

    Args:
        hu: int16 (slices, rows, columns), HU.
        pixel_area_mm2: turns counts into areas, so that pixel sizes may differ.

    Returns:
        float64 (slices, bands), in voxels or mm2; bands are [low, high) of `BAND_EDGES`.
    """
    counts = np.zeros((len(hu), len(BAND_EDGES) - 1))
    # The histogram's last band would include its upper edge.
    edges = np.array(BAND_EDGES) - 0.5
    for index, image in enumerate(hu):
        counts[index] = np.histogram(image[inside_skull(image)], edges)[0]
    return counts if pixel_area_mm2 is None else counts * pixel_area_mm2


def trivial_detector(
    train_counts: np.ndarray, train_any: np.ndarray, test_counts: np.ndarray
) -> np.ndarray:
    """Fit a logistic regression on the counts and apply it.

    Args:
        train_counts: float (slices, bands) of `hu_band_counts`, of the training patients.
        train_any: int (slices,): 1 where any subtype is present.
        test_counts: float (slices, bands) of other patients.

    Returns:
        float64 (slices,): probability of any bleed.
    """
    if len(np.unique(train_any)) != 2:
        raise DataError(
            f"all {len(train_any)} training slices have the same label; expected both.",
            "Use more series.",
        )
    # Counts spread over orders of magnitude: their logarithm is what a linear model can use.
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(np.log1p(train_counts), train_any)
    return model.predict_proba(np.log1p(test_counts))[:, 1]


def cache_band_counts(cache: CTCache, rows: np.ndarray | None = None) -> np.ndarray:
    """Count the voxels of slices of a cache.

    Args:
        cache: any.
        rows: int (n,), of `cache.slices`; None takes all.

    Returns:
        float64 (n, bands), see `hu_band_counts`.
    """
    rows = np.arange(len(cache.slices)) if rows is None else np.asarray(rows)
    parts = np.array_split(rows, max(1, -(-len(rows) // _SLICES_AT_A_TIME)))
    return np.concatenate([hu_band_counts(cache.slices_hu(part)) for part in parts])


def trivial_auroc(
    cache: CTCache, train: np.ndarray, scored: np.ndarray, counts: np.ndarray | None = None
) -> dict[str, float | None]:
    """Train the detector on some slices and score it on others.

    Args:
        cache: with labels.
        train, scored: int (n,), rows of its slices.
        counts: float (slices, bands) of `cache_band_counts`, row by row; None counts now.

    Returns:
        AUROC of `any` at "slice" and at "series" level (a series is as bad as its worst slice);
        None where the training or the scored slices are all alike.
    """
    values = cache.slices[list(cache.labels.names)].to_numpy()
    truth = is_positive(values, cache.labels).astype(np.int64)
    # Where `any` is missing, only a bleed that is named is known.
    is_known = truth == 1
    if cache.labels.any_column is not None:
        is_known |= values[:, cache.labels.any_column] == 0
    train, scored = (rows[is_known[rows]] for rows in (np.asarray(train), np.asarray(scored)))
    if not len(train) or not len(scored):
        return {"slice": None, "series": None}
    if len(np.unique(truth[train])) != 2:
        return {"slice": None, "series": None}
    train_counts, scored_counts = (
        cache_band_counts(cache, rows) if counts is None else counts[rows]
        for rows in (train, scored)
    )
    values = trivial_detector(train_counts, truth[train], scored_counts)
    table = pd.DataFrame({"value": values, "truth": truth[scored]})
    levels = {
        "slice": table,
        "series": table.groupby(cache.slices["series_uid"].to_numpy()[scored]).max(),
    }
    return {
        level: float(roc_auc_score(rows["truth"], rows["value"]))
        if rows["truth"].nunique() == 2
        else None
        for level, rows in levels.items()
    }
