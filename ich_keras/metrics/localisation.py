"""How well heat maps find what they should: scored against masks, slice by slice.

A map is any array of scores, higher where more is suspected. Only its order counts, apart from
ties: where several pixels share the highest score, or the score at a threshold, each of them counts
with its share. A map that is 0 everywhere therefore scores as chance does.

Source:
    Zhang et al., Top-Down Neural Attention by Excitation Backprop (ECCV 2016), section 4.1, for
    the pointing game.
"""

import numpy as np

from ich_keras.errors import DataError


def near(
    mask: np.ndarray, row_spacing_mm: float, column_spacing_mm: float, tolerance_mm: float
) -> np.ndarray:
    """Return the pixels whose middle lies within a distance of that of any pixel of a mask.

    Args:
        mask: bool (rows, columns).
        row_spacing_mm, column_spacing_mm: distance between rows, and between columns.
        tolerance_mm: 0 returns the mask itself.

    Returns:
        bool (rows, columns).

    >>> near(np.array([[True, False, False, False]]), 1.0, 2.0, 4.0).tolist()
    [[True, True, True, False]]
    """
    rows, columns = mask.shape
    reach_rows = min(int(tolerance_mm / row_spacing_mm), rows - 1)
    reach_columns = min(int(tolerance_mm / column_spacing_mm), columns - 1)
    padded = np.pad(mask, ((reach_rows,) * 2, (reach_columns,) * 2))
    found = np.zeros_like(mask)
    for down in range(-reach_rows, reach_rows + 1):
        for right in range(-reach_columns, reach_columns + 1):
            if np.hypot(down * row_spacing_mm, right * column_spacing_mm) <= tolerance_mm:
                top, left = reach_rows + down, reach_columns + right
                found |= padded[top : top + rows, left : left + columns]
    return found


def pointing_hit(scores: np.ndarray, target: np.ndarray, region: np.ndarray) -> float:
    """Tell whether the highest score lies in a target: the pointing game.

    Args:
        scores: float (rows, columns).
        target: bool (rows, columns), such as what `near` returns.
        region: bool (rows, columns), where the highest score is looked for.

    Returns:
        1 or 0; where several pixels share the highest score, the share of them in the target.

    Raises:
        DataError: shapes differ, the region is empty, or scores are not finite.

    >>> target = np.array([[True, False, False]])
    >>> pointing_hit(np.array([[2.0, 2.0, 1.0]]), target, np.ones((1, 3), bool))
    0.5
    """
    values, hits = _inside(scores, target, region)
    return float(hits[values == values.max()].mean())


def share_found(scores: np.ndarray, mask: np.ndarray, region: np.ndarray) -> float:
    """Return the overlap with a mask of as many pixels, with the highest scores, as it has.

    With as many pixels on either side this is Dice's coefficient, and the recall, and the
    precision; the intersection over union is d / (2 - d).

    Args:
        scores: float (rows, columns).
        mask: bool (rows, columns); what lies outside the region is left out.
        region: bool (rows, columns), what scores are ranked in.

    Returns:
        0 to 1. Where several pixels share the score at the threshold, what a random choice of them
        gives in the mean. By chance it is the mask's share of the region.

    Raises:
        DataError: as for `pointing_hit`; or no pixel of the mask lies in the region.

    >>> mask = np.array([[True, True, False, False]])
    >>> share_found(np.array([[9.0, 1.0, 5.0, 0.0]]), mask, np.ones((1, 4), bool))
    0.5
    """
    values, hits = _inside(scores, mask, region)
    count = _count(hits)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    above, equal = values > threshold, values == threshold
    chosen = hits[above].sum() + hits[equal].mean() * (count - above.sum())
    return float(chosen / count)


def pixel_precision(scores: np.ndarray, mask: np.ndarray, region: np.ndarray) -> float:
    """Return the average precision over pixels: of each pixel of a mask, how pure the ranking is
    down to it.

    Args:
        scores, mask, region: as for `share_found`.

    Returns:
        0 to 1; pixels of equal score share a threshold. By chance it is the mask's share of the
        region.

    Raises:
        DataError: as for `share_found`.

    >>> mask = np.array([[True, True, False, False]])
    >>> pixel_precision(np.array([[9.0, 1.0, 5.0, 0.0]]), mask, np.ones((1, 4), bool)).__round__(3)
    0.833
    """
    values, hits = _inside(scores, mask, region)
    count = _count(hits)
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], hits[order]
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    found = hits.cumsum()[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / count)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return Spearman's rank correlation of two arrays.

    Args:
        one, other: float, of the same shape.

    Returns:
        -1 to 1; equal values share their mean rank. NaN where one of them is constant.

    Raises:
        DataError: shapes differ, there are no values, or some are not finite.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
    0.5
    """
    if one.shape != other.shape or not one.size:
        raise DataError(f"arrays of shapes {one.shape} and {other.shape} are compared.")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise DataError("an array to be compared holds values that are not finite.")
    ranks = [_ranks(values.ravel()) for values in (one, other)]
    ranks = [values - values.mean() for values in ranks]
    spread = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / spread if spread else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


def _inside(
    scores: np.ndarray, mask: np.ndarray, region: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if not scores.shape == mask.shape == region.shape:
        raise DataError(
            f"scores {scores.shape}, mask {mask.shape} and region {region.shape}; expected one"
            " shape."
        )
    values, hits = scores[region], mask[region]
    if not values.size:
        raise DataError("the region is empty.", "Leave out slices without a head.")
    if not np.isfinite(values).all():
        raise DataError("scores are not finite.")
    return values, hits


def _count(hits: np.ndarray) -> int:
    count = int(hits.sum())
    if not count:
        raise DataError("no pixel of the mask lies in the region.", "Leave such slices out.")
    return count
