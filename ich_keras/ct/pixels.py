"""Turning the value of PixelData into stored values, and those into Hounsfield units."""

import dataclasses
from typing import BinaryIO

import numpy as np

from ich_keras.ct.codestream import check_codestream, measure_fragments
from ich_keras.ct.decoding import decode
from ich_keras.ct.elements import UNDEFINED_LENGTH, name
from ich_keras.ct.encoding import EXPLICIT_BIG_ENDIAN, StoredPixels, truncated
from ich_keras.ct.padding import (
    AIR_BELOW_HU,
    AIR_HU,
    Padding,
    find_padding,
    without_padding,
)
from ich_keras.ct.rejects import COPY_AGAIN, EXPORT_AGAIN, RejectedFile

# Share of a slice's pixels that must be wrapped air before the 12-bit repair is applied.
WRAPPED_AIR_SHARE = 0.05
# Shares of a slice that is filled with zeros, and of a row that is cut off.
MIN_ZERO_TAIL, MIN_CUT_BODY = 1 / 16, 0.1

_HU = np.iinfo(np.int16)


def locate(pixels: StoredPixels, stream: BinaryIO, size: int) -> StoredPixels:
    """Check that all pixel bytes are in the file, without decoding them.

    Args:
        pixels: `offset` and `num_bytes` as the element says.
        stream: the file.
        size: of the file, bytes.

    Returns:
        The same with the number of bytes to read.

    Raises:
        RejectedFile: TRUNCATED, TOO_LARGE, BAD_VALUE or DECODE_ERROR.
    """
    if pixels.is_native:
        num_bytes = _native_size(pixels, size)
    else:
        num_bytes = measure_fragments(pixels, stream, size)
    return dataclasses.replace(pixels, num_bytes=num_bytes)


def hounsfield_units(
    raw: bytes, pixels: StoredPixels, padding: Padding | None, slope: float, intercept: float
) -> tuple[np.ndarray, bool]:
    """Turn the value of PixelData into Hounsfield units.

    Args:
        raw: the value of PixelData, `pixels.num_bytes` bytes.
        pixels: as returned by `locate`.
        padding: the stored values that are not measurements, and become air.
        slope, intercept: HU = slope * stored + intercept.

    Returns:
        int16 (rows, columns), HU, and whether wrapped 12-bit values were repaired.

    Raises:
        RejectedFile: the pixels are incomplete or damaged.
    """
    stored = stored_values(raw, pixels)
    reject_zero_tail(stored, slope, intercept, padding is not None and 0 in padding)
    is_padding = None
    if padding is not None:
        is_padding = find_padding(raw, stored, pixels, padding, slope, intercept)
    if is_padding is not None:
        stored = without_padding(stored, is_padding, slope, intercept)
    repaired = is_wrapped(stored, pixels, intercept)
    if repaired:
        stored, intercept = unwrap(stored)
    hu = to_hu(stored, slope, intercept)
    if is_padding is not None:
        hu[is_padding] = AIR_HU
    return hu, repaired


def stored_values(raw: bytes, pixels: StoredPixels) -> np.ndarray:
    """Return the stored values of a slice.

    Unused high bits are ignored and the sign is extended from the highest stored bit, as the
    standard requires and pydicom does.

    Args:
        raw: the value of PixelData, `pixels.num_bytes` bytes.
        pixels: as returned by `locate`.

    Returns:
        int16 or uint16 (rows, columns), stored values.

    Raises:
        RejectedFile: TRUNCATED, DECODE_ERROR, DECODER_CRASH or TIMEOUT.

    Source:
        DICOM PS3.5 8.1.1 and 8.2.
    """
    if len(raw) < pixels.num_bytes:
        raise truncated(len(raw), pixels.num_bytes)
    if not pixels.is_native:
        check_codestream(raw, pixels)
        return decode(raw, pixels)
    order = ">" if pixels.transfer_syntax_uid == EXPLICIT_BIG_ENDIAN else "<"
    stored = np.frombuffer(raw, dtype=order + ("i2" if pixels.is_signed else "u2"))
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    unused = 16 - pixels.bits_stored
    if unused:
        stored = (stored << unused) >> unused  # arithmetic for int16, which extends the sign
    return stored.reshape(pixels.rows, pixels.columns)


def is_wrapped(stored: np.ndarray, pixels: StoredPixels, intercept: float) -> bool:
    """Return whether a slice holds negative HU that were written modulo 4096.

    Some exporters wrote HU as unsigned 12-bit numbers with an intercept of about 0, which turned
    air at -1000 into 3096. A genuine unsigned slice may hold metal at such values, so at least
    WRAPPED_AIR_SHARE of the pixels must be air (-1000 to -500 HU once unwrapped). Air around a head
    fills a quarter of a slice or more; metal never fills a twentieth.

    Args:
        stored: uint16 (rows, columns), stored values.
        pixels: how they were stored.
        intercept: HU.
    """
    if not _is_wrappable(pixels, intercept):
        return False
    air = np.count_nonzero((stored >= 4096 - 1000) & (stored < 4096 + AIR_BELOW_HU))
    return bool(air >= WRAPPED_AIR_SHARE * stored.size)


def may_be_wrapped(hu: np.ndarray, pixels: StoredPixels, intercept: float) -> bool:
    """Return whether a slice that was not unwrapped has values that wrapped air has.

    Args:
        hu: int16 (rows, columns), HU.
        pixels: how they were stored.
        intercept: HU.
    """
    return _is_wrappable(pixels, intercept) and bool((hu >= 4096 - 1000 + intercept).any())


def _is_wrappable(pixels: StoredPixels, intercept: float) -> bool:
    return pixels.bits_stored == 12 and not pixels.is_signed and intercept > -100


def unwrap(stored: np.ndarray) -> tuple[np.ndarray, float]:
    """Repair a slice for which `is_wrapped` is true; exact for -1000 to 3095 HU.

    Args:
        stored: uint16 (rows, columns), 0 to 4095.

    Returns:
        uint16 (rows, columns), 0 to 4095, and its intercept.

    Source:
        Known from the RSNA 2019 Brain CT Hemorrhage Challenge.
    """
    shifted = stored + np.uint16(1000)
    shifted[shifted >= 4096] -= 4096
    return shifted, -1000.0


def reject_zero_tail(
    stored: np.ndarray, slope: float, intercept: float, zero_is_padding: bool = False
) -> None:
    """Refuse a slice whose end was filled with zeros by a broken copy.

    At least MIN_ZERO_TAIL of its values are zeros at the end. The zeros begin in the middle of a
    row, though body goes on there in the row before: bands of padding begin with a row, a broken
    copy ends anywhere. Or the zeros fill the second half, and one of these holds:
    - a stored 0 is not air (above AIR_BELOW_HU): no half of an image is exactly one tissue value;
    - the first half has almost no zeros (under 1 %): zero is not this scanner's background;
    - body fills a quarter of the last row before the zeros: heads, tables and head holders end in
      a curve, a cut ends in a straight line.
    A head in the upper half above clipped air passes. So does a slice of nothing but air.

    Args:
        stored: int16 or uint16 (rows, columns), stored values.
        slope, intercept: HU = slope * stored + intercept.
        zero_is_padding: whether the header declares 0 to be padding, and thereby air.
    """
    if stored[-1].any():
        return
    flat, columns = stored.reshape(-1), stored.shape[1]
    filled = np.flatnonzero(flat)
    end = int(filled[-1]) + 1 if filled.size else 0
    tail = flat.size - end
    if tail < MIN_ZERO_TAIL * flat.size:
        return
    zero_is_air = intercept <= AIR_BELOW_HU or zero_is_padding
    if zero_is_air and filled.size == 0:
        return
    last_row = flat[max(0, end - columns) : end]
    is_body = (last_row * slope + intercept > AIR_BELOW_HU) & (last_row != 0)
    # The last value is body, and so is what the row before has to the right of it. Edges of real
    # things fade into air over some pixels.
    goes_on = np.count_nonzero(is_body[: -end % columns]) >= MIN_CUT_BODY * columns
    is_cut = bool(filled.size) and bool(is_body[-1]) and goes_on
    if not is_cut and tail >= flat.size // 2:
        has_background = end - filled.size >= 0.01 * end
        is_cut = not (zero_is_air and has_background and np.mean(is_body) < 0.25)
    if not is_cut:
        return
    raise RejectedFile(
        "ZERO_TAIL",
        f"{name('PixelData')}: the last {tail} of {flat.size} values are 0 ({intercept:g} HU); "
        "expected an image",
        COPY_AGAIN,
    )


def to_hu(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Apply slope and intercept, rounding to the nearest integer (half to even).

    Args:
        stored: int16 or uint16 (rows, columns), stored values.
        slope, intercept: HU = slope * stored + intercept.

    Returns:
        int16 (rows, columns), HU. The lowest signed 16-bit value becomes air where its HU would not
        fit: scanners fill the area outside their field of view with it.

    Raises:
        RejectedFile: BAD_RESCALE; the result does not fit into int16.

    Source:
        DICOM PS3.3 C.11.1.1.2; padding: C.7.5.1.1.2.
    """
    lowest, highest = int(stored.min()), int(stored.max())
    if lowest == _HU.min < highest and lowest * slope + intercept < lowest:
        is_filling = stored == lowest
        inside = np.where(is_filling, stored[~is_filling].min(), stored)
        return np.where(is_filling, np.int16(AIR_HU), to_hu(inside, slope, intercept))
    low, high = round(lowest * slope + intercept), round(highest * slope + intercept)
    if low < _HU.min or high > _HU.max:
        raise RejectedFile(
            "BAD_RESCALE",
            f"{name('RescaleSlope')} {slope:g} and {name('RescaleIntercept')} {intercept:g} give "
            f"{low} to {high} HU; expected {_HU.min} to {_HU.max}",
            EXPORT_AGAIN,
        )
    if slope == 1 and intercept == int(intercept):
        # Integers modulo 65536: exact, because the true result fits.
        return stored.view(np.int16) + np.int16(intercept)
    return np.rint(stored * slope + intercept).astype(np.int16)


def _native_size(pixels: StoredPixels, size: int) -> int:
    expected = pixels.rows * pixels.columns * 2
    if pixels.num_bytes == UNDEFINED_LENGTH:
        found = "of undefined length"
    elif size - pixels.offset < pixels.num_bytes or pixels.num_bytes < expected:
        present = min(size - pixels.offset, pixels.num_bytes)
        raise truncated(present, max(expected, pixels.num_bytes))
    elif pixels.num_bytes >= 2 * expected:
        found = f"{pixels.num_bytes} bytes long"
    else:
        return expected
    raise RejectedFile(
        "BAD_VALUE",
        f"{name('PixelData')} is {found}; expected {expected} bytes for {pixels.rows} x "
        f"{pixels.columns} uncompressed pixels",
        EXPORT_AGAIN,
    )
