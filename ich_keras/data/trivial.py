"""The detector to beat: counting bright voxels inside the skull.

A network that sees no more than "many voxels at 50 to 80 HU" has learnt nothing about shape or
place. The demo and the reports print this detector beside the network, trained on the same slices.
"""

import cv2
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ich_keras.errors import DataError

BONE_HU = 300
# Edges of the bands, HU: blood is 50-80, calcifications are above.
BAND_EDGES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 150, 300)


def inside_skull(hu: np.ndarray) -> np.ndarray:
    """Return what bone encloses in a slice, without the bone and without a margin of one voxel.

    What cannot be reached from the border of the image without crossing bone is inside. A skull
    with a gap (lowest slices) encloses nothing; so does a slice above the head.

    Args:
        hu: int16 (rows, columns), HU.

    Returns:
        bool (rows, columns).
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
        pixel_area_mm2: makes areas of the counts, so that pixel sizes may differ.

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
