"""Whether the values of a whole volume can be HU, where nothing else says what they are.

A DICOM header says how stored values become HU. NIfTI files and arrays do not: many hold pictures,
normalised values, raw ones, or masks. Their range tells.
"""

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np

from ich_keras.ct.rejects import RejectedFile

# A head in HU has air somewhere. What is lost with the intercept, or cut off, lies above.
MAX_LOWEST_HU = -200
# Labels of a mask are small whole numbers.
_MAX_LABEL = 63
_HU = np.iinfo(np.int16)
_EXPECTED = "expected HU: air at -1000, soft tissue at 0 to 100, bone above 300"
_HINT = "Convert it to HU. Masks, pictures and normalised volumes cannot be used."


class ValueRange(NamedTuple):
    """The values of a volume.

    Args:
        low, high: the extremes of the finite ones.
        num_not_finite: NaN and infinities.
        is_whole: whether all are whole numbers.
    """

    low: float
    high: float
    num_not_finite: int
    is_whole: bool

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Return the range of an array of integers or floats that is not empty."""
        if values.dtype.kind in "iu":
            return cls(float(values.min()), float(values.max()), 0, True)
        finite = np.isfinite(values)
        num_finite = int(np.count_nonzero(finite))
        if num_finite < values.size:
            return cls(0.0, 0.0, values.size - num_finite, False)
        is_whole = bool((values == np.rint(values)).all())
        return cls(float(values.min()), float(values.max()), 0, is_whole)

    @classmethod
    def joined(cls, ranges: Iterable[Self]) -> Self:
        """Return the range of several arrays together."""
        lows, highs, not_finite, whole = zip(*ranges, strict=True)
        return cls(min(lows), max(highs), sum(not_finite), all(whole))

    def rescaled(self, slope: float, intercept: float) -> Self:
        """Return the range of slope * value + intercept; the slope is above 0."""
        low, high = (slope * one + intercept for one in (self.low, self.high))
        is_whole = self.is_whole and slope == int(slope) and intercept == int(intercept)
        return type(self)(low, high, self.num_not_finite, is_whole)


def require_hu(found: ValueRange) -> None:
    """Refuse a volume whose values cannot be HU, and say what they look like.

    Raises:
        RejectedFile: IMPLAUSIBLE_HU, or NOT_CT for what looks like a mask.
    """
    if found.num_not_finite:
        detail = f"{found.num_not_finite} values are not finite (NaN or infinite)"
        raise RejectedFile("IMPLAUSIBLE_HU", f"{detail}; {_EXPECTED}", _HINT)
    shown = f"its values lie between {found.low:g} and {found.high:g}"
    if found.low >= 0 and found.high <= _MAX_LABEL and found.is_whole:
        raise RejectedFile("NOT_CT", f"{shown}, all whole: a mask; {_EXPECTED}")
    if found.low < _HU.min or found.high > _HU.max:
        raise RejectedFile("IMPLAUSIBLE_HU", f"{shown}; {_EXPECTED}", _HINT)
    if found.low <= MAX_LOWEST_HU:
        return
    if found.high <= 1:
        guess = "normalised values"
    elif found.low >= 0 and found.high <= 255:
        guess = "a picture of 256 greys, windowed"
    elif found.low >= 0:
        guess = "raw values whose intercept (often -1024) was not applied"
    else:
        guess = "a head without the air around it"
    raise RejectedFile("IMPLAUSIBLE_HU", f"{shown}: {guess}; {_EXPECTED}", _HINT)
