"""Compressed pixel data before it is decoded: its fragments, its size, and traces of damage.

Decoders fill in what is missing: a stream that was cut, or lost a block, gives an image that is
partly invented. Much of that can be seen in the bytes, at a fraction of the price of decoding.
"""

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import BinaryIO

import numpy as np

from ich_keras.ct.elements import UNDEFINED_LENGTH, name
from ich_keras.ct.encoding import RLE, StoredPixels, other_size, truncated, undecodable
from ich_keras.ct.rejects import EXPORT_AGAIN, RejectedFile

MAX_FRAGMENTS = 10_000
# JPEG-LS never writes so many zero bytes (a run of zero bits ends after 47), and JPEG 2000 wrote 93
# at most, for stripes drawn by hand. JPEG and RLE do write them, for a plain area.
MAX_ZERO_BYTES = 256

_ITEM, _DELIMITER = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"  # JPEG; JPEG 2000 ends with the same two bytes (EOC)
_SOC_SIZ, _SOT, _SOD = b"\xff\x4f\xff\x51", b"\xff\x90", b"\xff\x93"
_JPEG_LS_FRAME = 0xF7
_PROGRESSIVE_FRAMES = (0xC2, 0xC6, 0xCA, 0xCE)
_START_OF_SCAN = 0xDA


def _followers(*allowed: range) -> np.ndarray:
    """Return which bytes may not follow ff; bool (256,)."""
    forbidden = np.ones(256, bool)
    for those in allowed:
        forbidden[those.start : those.stop] = False
    return forbidden


# Bytes that may not follow ff within coded data. The coders stuff a bit or a byte, so that markers
# are unmistakable (10918-1 B.1.1.5, 14495-1 C.1, 15444-1 table A.1).
_RESTARTS, _FILL = range(0xD0, 0xD8), range(0xFF, 0x100)
_NOT_IN_JPEG = _followers(range(1), _RESTARTS, _FILL)
_NOT_IN_JPEG_LS = _followers(range(0x80), _RESTARTS, _FILL)
_NOT_IN_JPEG_2000 = _followers(range(0x90), range(0x91, 0x93))  # SOP and EPH head packets


def measure_fragments(pixels: StoredPixels, stream: BinaryIO, size: int) -> int:
    """Walk over all fragments to detect a truncated file.

    Args:
        pixels: `offset` and `num_bytes` as the element says.
        stream: the file.
        size: of the file, bytes.

    Returns:
        Bytes of the value of PixelData.

    Raises:
        RejectedFile: TRUNCATED, TOO_LARGE or DECODE_ERROR.

    Source:
        DICOM PS3.5 A.4.
    """
    if pixels.num_bytes != UNDEFINED_LENGTH:
        detail = f"is not in fragments; its syntax is {pixels.transfer_syntax_uid}"
        raise undecodable(detail, EXPORT_AGAIN)
    # Lossless coding may enlarge noise a little. Data far larger than the pixels are not.
    limit = 4 * pixels.rows * pixels.columns + (1 << 20)
    for offset, length in _items(pixels, stream, size, MAX_FRAGMENTS):
        if offset + 8 + length - pixels.offset > limit:
            detail = f"has over {limit} compressed bytes for {pixels.rows} x {pixels.columns}"
            raise RejectedFile("TOO_LARGE", f"{name('PixelData')} {detail} pixels", EXPORT_AGAIN)
    return stream.tell() - pixels.offset  # behind the delimiter


def frame_places(
    pixels: StoredPixels, stream: BinaryIO, size: int, count: int, extended: Sequence[int] = ()
) -> list[tuple[int, int]]:
    """Find the fragments of each frame of a file.

    An offset table tells. Without one, each frame must have one fragment.

    Args:
        pixels: `offset` and `num_bytes` as the element says.
        stream: the file.
        size: of the file, bytes.
        count: how many frames it should hold.
        extended: Extended Offset Table, where there is one.

    Returns:
        (count,), where the fragments of each frame begin in the file, and their bytes.

    Raises:
        RejectedFile: TRUNCATED, TOO_LARGE, DECODE_ERROR or BAD_VALUE.

    Source:
        DICOM PS3.5 A.4, PS3.3 C.7.6.3.1.8.
    """
    if pixels.num_bytes != UNDEFINED_LENGTH:
        detail = f"is not in fragments; its syntax is {pixels.transfer_syntax_uid}"
        raise undecodable(detail, EXPORT_AGAIN)
    items = _items(pixels, stream, size, MAX_FRAGMENTS + count)
    first = next(items, None)
    if first is None:
        raise undecodable("holds no offset table", EXPORT_AGAIN)
    table = list(extended) or _basic_offsets(stream, first[1], count)
    places = [offset for offset, _ in items]
    # The next item would begin behind the last one; it is the delimiter.
    end = stream.tell() - 8
    if not places:
        raise undecodable(f"holds no fragment; expected those of {count} frames", EXPORT_AGAIN)
    if not table:
        if len(places) != count:
            found = f"holds {len(places)} fragments and no offset table"
            raise undecodable(f"{found}; expected one for each of {count} frames", EXPORT_AGAIN)
        table = [place - places[0] for place in places]
    begins = [places[0] + offset for offset in table]
    if begins[0] != places[0] or sorted(set(begins)) != begins or not set(begins) <= set(places):
        raise undecodable("has an offset table that does not point to its fragments", EXPORT_AGAIN)
    found_places = [(begin, stop - begin) for begin, stop in pairwise([*begins, end])]
    limit = 4 * pixels.rows * pixels.columns + (1 << 20)
    most = max(num_bytes for _, num_bytes in found_places)
    if most > limit:
        detail = f"has a frame of {most} compressed bytes for {pixels.rows} x {pixels.columns}"
        raise RejectedFile("TOO_LARGE", f"{name('PixelData')} {detail} pixels", EXPORT_AGAIN)
    return found_places


def as_single_frame(fragments: bytes) -> bytes:
    """Return the fragments of a frame as the value of PixelData of a single-frame file."""
    return _ITEM + bytes(4) + fragments + _DELIMITER + bytes(4)


def _items(
    pixels: StoredPixels, stream: BinaryIO, size: int, most: int
) -> Iterator[tuple[int, int]]:
    """Yield where each item of compressed pixels begins, and its length; then read the delimiter.

    The stream is behind the head of the item that was yielded.
    """
    offset = pixels.offset
    for _ in range(most + 1):
        stream.seek(offset)
        item = stream.read(8)
        if len(item) < 8:
            raise truncated(size - pixels.offset, offset + 8 - pixels.offset)
        tag, length = struct.unpack("<4sI", item)
        if tag == _DELIMITER:
            return
        if tag != _ITEM or length == UNDEFINED_LENGTH:
            raise undecodable("holds something other than fragments")
        if offset + 8 + length > size:
            raise truncated(size - pixels.offset, offset + 16 + length - pixels.offset)
        yield offset, length
        offset += 8 + length
    raise undecodable(f"has over {most} fragments", EXPORT_AGAIN)


def _basic_offsets(stream: BinaryIO, length: int, count: int) -> list[int]:
    """Return Basic Offset Table, at which the stream is: where each frame begins, or nothing."""
    if length not in (0, 4 * count):
        found = f"has an offset table of {length} bytes"
        raise undecodable(f"{found}; expected 4 for each of {count} frames", EXPORT_AGAIN)
    return list(struct.unpack(f"<{length // 4}I", stream.read(length)))


def joined_fragments(raw: bytes) -> bytes:
    """Return the compressed image of a single frame, which may lie in several fragments.

    Args:
        raw: the value of PixelData, as `measure_fragments` accepts it.

    >>> item = b"\\xfe\\xff\\x00\\xe0"
    >>> two = item + b"\\2\\0\\0\\0ab" + item + b"\\2\\0\\0\\0cd"
    >>> joined_fragments(item + bytes(4) + two + b"\\xfe\\xff\\xdd\\xe0" + bytes(4))
    b'abcd'
    """
    parts = []
    offset = 0
    while raw[offset : offset + 4] == _ITEM:
        length = int.from_bytes(raw[offset + 4 : offset + 8], "little")
        offset += 8
        parts.append(raw[offset : offset + length])
        offset += length
    return b"".join(parts[1:])  # the first item is the offset table


def check_codestream(raw: bytes, pixels: StoredPixels) -> None:
    """Check a compressed image before it is decoded: its size, its end, and traces of damage.

    Args:
        raw: the value of PixelData, as `measure_fragments` accepts it.
        pixels: how it is stored.

    Raises:
        RejectedFile: DECODE_ERROR.

    Source:
        DICOM PS3.5 8.2 and annex G (RLE); ISO/IEC 10918-1 annex B (JPEG), 14495-1 annex C
        (JPEG-LS), 15444-1 annex A and 15444-15 (JPEG 2000, HTJ2K).
    """
    frame = joined_fragments(raw)
    if pixels.transfer_syntax_uid == RLE:
        _check_rle(frame)
    elif frame.startswith(_SOI):
        _check_jpeg(frame, pixels)
    else:
        # Not at 0 when wrapped in a JP2 box.
        start = frame.find(_SOC_SIZ, 0, 1 << 16)
        if not 0 <= start <= len(frame) - 42:
            raise undecodable("holds no JPEG or JPEG 2000 image with a size", EXPORT_AGAIN)
        _check_jpeg_2000(frame, start, pixels)


def _check_rle(frame: bytes) -> None:
    """Check that the two segments, the high and the low bytes, lie where the header says."""
    if len(frame) < 64:
        raise undecodable(f"holds {len(frame)} bytes of RLE; expected a header of 64")
    count, first, second = struct.unpack_from("<3I", frame)
    if count != 2 or first != 64 or not first < second < len(frame):
        raise undecodable(
            f"has an RLE header of {min(count, 1 << 16)} segments at {first} and {second} of "
            f"{len(frame)} bytes; expected 2 segments, the first at 64"
        )


def _check_jpeg(frame: bytes, pixels: StoredPixels) -> None:
    frame_marker, start = _read_jpeg_header(frame, pixels)
    end = _require_end(frame)
    if frame_marker == _JPEG_LS_FRAME:
        _refuse_forbidden(frame, start, end, _NOT_IN_JPEG_LS)
        _refuse_zeros(frame, start, end)
    elif frame_marker not in _PROGRESSIVE_FRAMES:  # those have tables between their scans
        _refuse_forbidden(frame, start, end, _NOT_IN_JPEG)


def _read_jpeg_header(frame: bytes, pixels: StoredPixels) -> tuple[int, int]:
    """Check the size; return the kind of the frame and where the coded data of its scan begin."""
    kind, offset = 0, 2
    while frame[offset : offset + 1] == b"\xff" and offset + 10 <= len(frame):
        marker, length = struct.unpack_from(">xBH", frame, offset)
        if marker == 0xFF:  # any number of them may stand before a marker
            offset += 1
            continue
        # SOF0 to SOF15 without DHT, JPG and DAC; SOF55 is JPEG-LS.
        if marker == _JPEG_LS_FRAME or (
            0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        ):
            _require_size(pixels, *struct.unpack_from(">HHB", frame, offset + 5))
            kind = marker
        offset += 2 + length
        if marker == _START_OF_SCAN and kind:
            return kind, offset
    if kind:
        raise undecodable("holds a JPEG image without a scan")
    raise undecodable("holds no JPEG or JPEG 2000 image with a size", EXPORT_AGAIN)


def _check_jpeg_2000(frame: bytes, start: int, pixels: StoredPixels) -> None:
    width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
    components = struct.unpack_from(">H", frame, start + 40)[0]
    _require_size(pixels, height - top, width - left, components)
    offset = _skip_segments(frame, start + 2, _SOT)
    is_boxed = start > 0
    end = len(frame) - 2 if is_boxed else _require_end(frame)
    while frame[offset : offset + 2] == _SOT and offset + 12 <= end:
        length = struct.unpack_from(">I", frame, offset + 6)[0]  # 0: up to the end
        stop = offset + length if length else end
        if stop == end + 2:  # some encoders count the end marker in
            stop = end
        if stop > end:
            break
        body = _skip_segments(frame, offset, _SOD) + 2
        _refuse_forbidden(frame, body, stop, _NOT_IN_JPEG_2000)
        _refuse_zeros(frame, body, stop)
        offset = stop
    if frame[offset : offset + 2] != _EOI:
        raise undecodable(
            f"holds {len(frame)} compressed bytes, and the part at byte {offset} leads to no end "
            "marker (ff d9): bytes are missing"
        )


def _skip_segments(frame: bytes, offset: int, until: bytes) -> int:
    """Return the offset of a marker of JPEG 2000 behind the marker segments in front of it."""
    while frame[offset : offset + 2] != until:
        if frame[offset : offset + 1] != b"\xff" or offset + 4 > len(frame):
            raise undecodable(f"holds a JPEG 2000 image with a damaged header at byte {offset}")
        offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    return offset


def _require_end(frame: bytes) -> int:
    """Return where the end marker lies; only padding may follow it.

    Fragments have even lengths: one more byte follows an odd stream. Some writers add more.
    """
    stripped = frame.rstrip(b"\0\xff")
    for end in (len(stripped) - 2, len(stripped) - 3):
        if stripped[end : end + 2] == _EOI and end >= 2:
            return end
    raise undecodable(
        f"holds {len(frame)} compressed bytes without an end marker (ff d9): the end is missing"
    )


def _refuse_forbidden(frame: bytes, start: int, stop: int, forbidden: np.ndarray) -> None:
    coded = np.frombuffer(frame, np.uint8)[start:stop]
    places = np.flatnonzero(coded[:-1] == 0xFF)
    found = places[forbidden[coded[places + 1]]]
    if found.size:
        place = int(found[0])
        raise undecodable(
            f"is damaged: the coder never writes ff {coded[place + 1]:02x}, which is found at "
            f"compressed byte {start + place} of {len(frame)}"
        )


def _refuse_zeros(frame: bytes, start: int, stop: int) -> None:
    place = frame.find(bytes(MAX_ZERO_BYTES), start, stop)
    if place >= 0:
        raise undecodable(
            f"is damaged: over {MAX_ZERO_BYTES} zeros from compressed byte {place} of {len(frame)}"
        )


def _require_size(pixels: StoredPixels, rows: int, columns: int, components: int) -> None:
    if (rows, columns, components) != (pixels.rows, pixels.columns, 1):
        raise other_size(pixels, rows, columns, components)
