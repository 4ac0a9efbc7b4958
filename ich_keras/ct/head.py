"""Which pixels of a slice are head: not air, table or head holder."""

import cv2
import numpy as np

# Below are air, cushions and foam; above are skin, fat and all other tissue.
HEAD_ABOVE_HU = -300
# What is thinner is the shell of a holder, a tube, or the tip of an ear.
THINNEST_MM = 8.0


def head_mask(hu: np.ndarray, row_spacing_mm: float, column_spacing_mm: float) -> np.ndarray:
    """Find the head in axial slices: the largest piece of tissue in each, its air cells included.

    Args:
        hu: (..., rows, columns), HU.
        row_spacing_mm, column_spacing_mm: distance between rows, and between columns.

    Returns:
        bool, the shape of `hu`; all False in a slice without tissue.

    >>> y, x = np.mgrid[-100:100, -100:100]  # mm
    >>> slice_hu = np.where((x / 70) ** 2 + (y / 85) ** 2 < 1, 40, -1000)
    >>> slice_hu[190:193] = 200  # a thin shell below it
    >>> mask = head_mask(slice_hu, 1.0, 1.0)
    >>> bool(mask[100, 100]), bool(mask[191, 100])
    (True, False)
    """
    disc = _disc(row_spacing_mm, column_spacing_mm)
    flat = hu.reshape(-1, *hu.shape[-2:])
    masks = np.zeros(flat.shape, bool)
    for image, mask in zip(flat, masks, strict=True):
        solid = cv2.morphologyEx((image > HEAD_ABOVE_HU).astype(np.uint8), cv2.MORPH_OPEN, disc)
        outlines, _ = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        if outlines:
            filled = np.zeros(solid.shape, np.uint8)
            cv2.drawContours(filled, [max(outlines, key=cv2.contourArea)], 0, 1, cv2.FILLED)
            mask[:] = filled == 1
    return masks.reshape(hu.shape)


def _disc(row_spacing_mm: float, column_spacing_mm: float) -> np.ndarray:
    sides = [
        max(1, round(THINNEST_MM / spacing)) | 1 for spacing in (column_spacing_mm, row_spacing_mm)
    ]
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, sides)
