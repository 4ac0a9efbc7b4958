"""Turning the value of PixelData into stored values, and those into Hounsfield units."""

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from pydicom.pixels import get_decoder

from ich_keras.ct.elements import COPY_AGAIN, EXPORT_AGAIN, UNDEFINED_LENGTH, name, show
from ich_keras.ct.rejects import RejectedFile

IMPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
NATIVE = (IMPLICIT_LITTLE_ENDIAN, EXPLICIT_LITTLE_ENDIAN, EXPLICIT_BIG_ENDIAN)

# Between soft tissue and air: air or lung is below, the body above.
AIR_BELOW_HU = -500
AIR_HU = -1024
# Share of a slice's pixels that must be wrapped air before the 12-bit repair is applied.
WRAPPED_AIR_SHARE = 0.05
MAX_FRAGMENTS = 10_000

_HU = np.iinfo(np.int16)
_CONVERT = "Convert it to Explicit VR Little Endian first, for instance with dcmtk's dcmconv."
_INSTALL = "Install the decoders: pip install 'ich_keras[codecs]'"


@dataclass(frozen=True)
class StoredPixels:
    """How and where a file stores its pixels.

    Args:
        rows, columns: size of the matrix.
        is_signed: PixelRepresentation.
        bits_stored: how many of the 16 bits count.
        transfer_syntax_uid: the encoding.
        offset, num_bytes: position and length of the value of PixelData in the file.
    """

    rows: int
    columns: int
    is_signed: bool
    bits_stored: int
    transfer_syntax_uid: str
    offset: int
    num_bytes: int

    @property
    def is_native(self) -> bool:
        """Whether the pixels are stored without compression."""
        return self.transfer_syntax_uid in NATIVE


def require_decoder(transfer_syntax_uid: str) -> Any:
    """Return pydicom's decoder for a compressed transfer syntax.

    Raises:
        RejectedFile: NO_DECODER; its hint says what to install or do.
    """
    if transfer_syntax_uid == DEFLATED:
        # 300 KB may inflate to 300 MB, and pydicom inflates all of it to read the header.
        detail = "(deflated), which is not supported: its size is known only after inflating"
        raise _no_decoder(transfer_syntax_uid, detail, _CONVERT)
    try:
        decoder = get_decoder(transfer_syntax_uid)
    except NotImplementedError:
        detail = "; expected an uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000 syntax"
        raise _no_decoder(transfer_syntax_uid, detail, _CONVERT) from None
    if not decoder.is_available:
        detail = f"({decoder.UID.name}), whose decoder is not installed"
        raise _no_decoder(transfer_syntax_uid, detail, _INSTALL)
    return decoder


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
    num_bytes = _native_size(pixels, size) if pixels.is_native else _walk(pixels, stream, size)
    return dataclasses.replace(pixels, num_bytes=num_bytes)


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
        RejectedFile: TRUNCATED, NO_DECODER or DECODE_ERROR.

    Source:
        DICOM PS3.5 8.1.1 and 8.2.
    """
    if len(raw) < pixels.num_bytes:
        raise truncated(len(raw), pixels.num_bytes)
    if not pixels.is_native:
        return _decode(raw, pixels)
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
    if pixels.bits_stored != 12 or pixels.is_signed or intercept <= -100:
        return False
    air = np.count_nonzero((stored >= 4096 - 1000) & (stored < 4096 + AIR_BELOW_HU))
    return bool(air >= WRAPPED_AIR_SHARE * stored.size)


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


def reject_zero_tail(stored: np.ndarray, slope: float, intercept: float) -> None:
    """Refuse a slice whose second half was filled with zeros by a broken copy.

    All values of the second half are zero, and one of these holds:
    - a stored 0 is not air (above AIR_BELOW_HU): no half of an image is exactly one tissue value;
    - the first half has almost no zeros (under 1 %): zero is not this scanner's background;
    - body fills a quarter of the last row before the zeros: heads, tables and head holders end in
      a curve, a cut ends in a straight line.
    A head in the upper half above clipped air passes. So does a slice of nothing but air.

    Args:
        stored: int16 or uint16 (rows, columns), stored values.
        slope, intercept: HU = slope * stored + intercept.
    """
    if stored[-1].any():
        return
    flat = stored.reshape(-1)
    half = flat.size // 2
    if flat[half:].any():
        return
    filled = np.flatnonzero(flat[:half])
    if intercept <= AIR_BELOW_HU:
        if filled.size == 0:
            return
        end = int(filled[-1]) + 1
        last_row = flat[max(0, end - stored.shape[1]) : end] * slope + intercept
        has_background = end - filled.size >= 0.01 * end
        if has_background and np.mean(last_row > AIR_BELOW_HU) < 0.25:
            return
    raise RejectedFile(
        "ZERO_TAIL",
        f"{name('PixelData')}: all {flat.size - half} values of the second half are 0 "
        f"({intercept:g} HU); expected an image",
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
    is_filling = stored == _HU.min
    if is_filling.any() and not is_filling.all() and _HU.min * slope + intercept < _HU.min:
        inside = np.where(is_filling, stored[~is_filling].min(), stored)
        return np.where(is_filling, np.int16(AIR_HU), to_hu(inside, slope, intercept))
    low, high = (round(int(v) * slope + intercept) for v in (stored.min(), stored.max()))
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


def truncated(present: int, expected: int) -> RejectedFile:
    """Make the error for incomplete pixel data."""
    detail = f"{name('PixelData')} has {max(present, 0)} bytes; expected {expected}"
    return RejectedFile("TRUNCATED", detail, COPY_AGAIN)


def _no_decoder(transfer_syntax_uid: str, detail: str, hint: str) -> RejectedFile:
    found = f"{name('TransferSyntaxUID')} is {show(transfer_syntax_uid)}"
    return RejectedFile("NO_DECODER", f"{found} {detail}".replace(" ;", ";"), hint)


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


def _walk(pixels: StoredPixels, stream: BinaryIO, size: int) -> int:
    """Walk over all fragments to detect a truncated file (PS3.5 A.4)."""
    if pixels.num_bytes != UNDEFINED_LENGTH:
        raise _undecodable(f"is not in fragments; its syntax is {pixels.transfer_syntax_uid}")
    # Lossless coding may enlarge noise a little. Data far larger than the raw pixels are no slice.
    limit = 4 * pixels.rows * pixels.columns + (1 << 20)
    offset = pixels.offset
    for _ in range(MAX_FRAGMENTS):
        stream.seek(offset)
        item = stream.read(8)
        if len(item) < 8:
            raise truncated(size - pixels.offset, offset + 8 - pixels.offset)
        tag, length = struct.unpack("<4sI", item)
        offset += 8
        if tag == b"\xfe\xff\xdd\xe0":
            return offset - pixels.offset
        if tag != b"\xfe\xff\x00\xe0" or length == UNDEFINED_LENGTH:
            raise _undecodable("holds something other than fragments")
        offset += length
        if offset > size:
            raise truncated(size - pixels.offset, offset + 8 - pixels.offset)
        if offset - pixels.offset > limit:
            detail = f"has over {limit} compressed bytes for {pixels.rows} x {pixels.columns}"
            raise RejectedFile("TOO_LARGE", f"{name('PixelData')} {detail} pixels", EXPORT_AGAIN)
    raise _undecodable(f"has over {MAX_FRAGMENTS} fragments; expected one")


def _decode(raw: bytes, pixels: StoredPixels) -> np.ndarray:
    decoder = require_decoder(pixels.transfer_syntax_uid)
    if pixels.transfer_syntax_uid != RLE:
        _check_codestream(raw, pixels)
    try:
        stored, _ = decoder.as_array(
            raw,
            index=0,
            raw=True,
            rows=pixels.rows,
            columns=pixels.columns,
            samples_per_pixel=1,
            number_of_frames=1,
            bits_allocated=16,
            bits_stored=pixels.bits_stored,
            photometric_interpretation="MONOCHROME2",
            pixel_representation=int(pixels.is_signed),
            pixel_keyword="PixelData",
        )
    except (RuntimeError, ValueError) as error:
        # pydicom wraps whatever a plugin raises in RuntimeError. It raises ValueError itself, for
        # fragments and sizes that do not fit.
        reason = " ".join(str(error).split())
        raise _undecodable(f"cannot be decoded: {reason[:300]}") from error
    if stored.shape != (pixels.rows, pixels.columns):
        raise _other_size(pixels, *stored.shape[:2])
    return stored.astype(np.int16 if pixels.is_signed else np.uint16, copy=False)


def _check_codestream(raw: bytes, pixels: StoredPixels) -> None:
    """Check the size inside a JPEG or JPEG 2000 stream against the header before decoding.

    Source:
        ISO/IEC 15444-1 A.5.1 (SIZ); ISO/IEC 10918-1 B.2.2 and 14495-1 C.2.2 (start of frame).
    """
    first = 16 + struct.unpack_from("<I", raw, 4)[0]  # after the offset table and an item's header
    stream = raw[first : first + (1 << 16)]
    if stream[:2] != b"\xff\xd8":
        siz = stream.find(b"\xff\x4f\xff\x51")  # not at 0 when wrapped in a JP2 box
        if 0 <= siz <= len(stream) - 42:
            width, height, left, top = struct.unpack_from(">4I", stream, siz + 8)
            components = struct.unpack_from(">H", stream, siz + 40)[0]
            return _require_size(pixels, height - top, width - left, components)
    offset = 2
    while stream[:2] == b"\xff\xd8" and stream[offset : offset + 1] == b"\xff":
        if offset + 10 > len(stream):
            break
        marker, length = struct.unpack_from(">xBH", stream, offset)
        # SOF0 to SOF15 without DHT, JPG and DAC; SOF55 is JPEG-LS.
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return _require_size(pixels, *struct.unpack_from(">HHB", stream, offset + 5))
        offset += 2 + length
    raise _undecodable("holds no JPEG or JPEG 2000 image with a size")


def _require_size(pixels: StoredPixels, rows: int, columns: int, components: int) -> None:
    if (rows, columns, components) != (pixels.rows, pixels.columns, 1):
        raise _other_size(pixels, rows, columns, components)


def _other_size(pixels: StoredPixels, rows: int, columns: int, components: int = 1) -> RejectedFile:
    return _undecodable(
        f"holds a compressed image of {rows} x {columns} x {components}; expected "
        f"{pixels.rows} x {pixels.columns} x 1"
    )


def _undecodable(detail: str) -> RejectedFile:
    return RejectedFile("DECODE_ERROR", f"{name('PixelData')} {detail}", EXPORT_AGAIN)
