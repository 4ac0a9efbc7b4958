"""Declared padding: pixels that the header says are not measurements become air.

Scanners fill the corners outside their circle of reconstruction, and programs that turn or shift
slices fill what they uncover.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from ich_keras.ct.elements import bad_value, has_value, integer_of
from ich_keras.ct.encoding import EXPLICIT_BIG_ENDIAN, StoredPixels

AIR_HU = -1024
# Between soft tissue and air: air or lung is below, the body above.
AIR_BELOW_HU = -500
# Above are metal, and values that no body has.
BONE_UP_TO_HU = 2000
# Where padding has a value that tissue may have, only areas of these shares of the slice are it.
MIN_SHARE_AT_BORDER, MIN_SHARE_INSIDE = 0.0005, 0.01
# A range of padding that holds more of the tissue's values is not believed.
MAX_TISSUE_HU = 50


@dataclass(frozen=True)
class Padding:
    """The stored values that a header declares to be padding, `low` to `high`, both included."""

    low: int
    high: int

    def __contains__(self, stored: int) -> bool:
        return self.low <= stored <= self.high


def padding_of(
    elements: dict, is_signed: bool, bits_stored: int, slope: float, intercept: float
) -> Padding | None:
    """Return the padding that a header declares; None if it declares none.

    Args:
        elements: tag -> raw element.
        is_signed, bits_stored: how pixels are stored; padding is stored alike, whatever its VR.
        slope, intercept: HU = slope * stored + intercept.

    Raises:
        RejectedFile: BAD_VALUE; not an integer, or a range that holds tissue.

    Source:
        DICOM PS3.3 C.7.5.1.1.2.
    """
    ends = [
        _stored_value(integer_of(elements, keyword), is_signed, bits_stored)
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
        if has_value(elements, keyword)
    ]
    if not has_value(elements, "PixelPaddingValue"):
        return None  # a limit alone limits nothing
    padding = Padding(min(ends), max(ends))
    low_hu, high_hu = (slope * end + intercept for end in (padding.low, padding.high))
    if min(high_hu, BONE_UP_TO_HU) - max(low_hu, AIR_BELOW_HU) > MAX_TISSUE_HU:
        found = f"{ends[-1]}, which makes {low_hu:g} to {high_hu:g} HU padding"
        raise bad_value("PixelPaddingRangeLimit", found, "a range without tissue")
    return padding


def find_padding(
    raw: bytes,
    stored: np.ndarray,
    pixels: StoredPixels,
    padding: Padding,
    slope: float,
    intercept: float,
) -> np.ndarray | None:
    """Find the pixels of a slice that are padding.

    A declared value that tissue or bone may have (0, where 0 is water) is padding in areas only:
    those that reach the border of the image, and large ones. Elsewhere it is a measurement that
    happens to have this value: the brain must not get holes.

    Args:
        raw: the value of PixelData.
        stored: int16 or uint16 (rows, columns), stored values.
        pixels: how they are stored.
        padding: what the header declares.
        slope, intercept: HU = slope * stored + intercept.

    Returns:
        bool (rows, columns); None when there is no padding.
    """
    found = _between(stored, padding)
    if pixels.is_native and pixels.bits_stored < 16:
        # Scanners wrote -2000 into all 16 bits of pixels of 12, where it is another value.
        order = ">" if pixels.transfer_syntax_uid == EXPLICIT_BIG_ENDIAN else "<"
        whole = np.frombuffer(raw, f"{order}{'i2' if pixels.is_signed else 'u2'}")
        found |= _between(whole.reshape(stored.shape), padding)
    if not found.any():
        return None
    low_hu, high_hu = (slope * end + intercept for end in (padding.low, padding.high))
    if low_hu < BONE_UP_TO_HU and high_hu > AIR_BELOW_HU:
        return _areas(found)
    return found


def without_padding(
    stored: np.ndarray, is_padding: np.ndarray, slope: float, intercept: float
) -> np.ndarray:
    """Give padding the stored value of air, or the one nearest to it.

    Args:
        stored: int16 or uint16 (rows, columns), stored values.
        is_padding: bool (rows, columns).
        slope, intercept: HU = slope * stored + intercept.
    """
    limits = np.iinfo(stored.dtype)
    air = min(max(round((AIR_HU - intercept) / slope), int(limits.min)), int(limits.max))
    filled = stored.copy()
    np.copyto(filled, stored.dtype.type(air), where=is_padding)
    return filled


def _stored_value(bits: int, is_signed: bool, bits_stored: int) -> int:
    """Turn the 16 bits of a tag into the stored value they mean.

    >>> _stored_value(0xF830, True, 16), _stored_value(0x0830, True, 12)
    (-2000, -2000)
    """
    if not is_signed:
        return bits
    width = bits_stored if bits < 1 << bits_stored else 16
    return bits - (1 << width) if bits >= 1 << (width - 1) else bits


def _between(values: np.ndarray, padding: Padding) -> np.ndarray:
    if padding.low == padding.high:
        return values == padding.low
    return (values >= padding.low) & (values <= padding.high)


def _areas(found: np.ndarray) -> np.ndarray | None:
    """Keep what lies in large areas, or in areas that reach the border."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found.view(np.uint8), connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA]
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    rows, columns = found.shape
    at_border = (left == 0) | (top == 0) | (right == columns) | (bottom == rows)
    least = np.where(at_border, MIN_SHARE_AT_BORDER, MIN_SHARE_INSIDE) * found.size
    is_padding = areas >= least
    is_padding[0] = False  # everything else
    return is_padding[labels] if is_padding.any() else None
