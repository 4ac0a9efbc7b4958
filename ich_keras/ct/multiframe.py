"""Enhanced multi-frame CT: one file with the frames of a scan, each of which is a slice.

What a single-frame header says of a slice stands in functional groups: those that all frames share,
and those of each frame. They are put in their places, and a frame is then judged as any slice.
"""

import contextlib
import dataclasses
import io
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from ich_keras.ct.codestream import as_single_frame, frame_places
from ich_keras.ct.data_set import FRAME_GROUPS, SHARED_GROUPS, DataSet, read_data_set
from ich_keras.ct.elements import (
    TAGS,
    UNDEFINED_LENGTH,
    Element,
    bad_value,
    has_value,
    missing,
    name,
    show,
    text_of,
)
from ich_keras.ct.encoding import StoredPixels, truncated
from ich_keras.ct.functional_groups import read_groups
from ich_keras.ct.header import (
    SliceHeader,
    check_image,
    required_pixels,
    series_of,
    single_slice,
    slice_of,
)
from ich_keras.ct.members import MAX_VOLUME_BYTES, expect_volume
from ich_keras.ct.rejects import EXPORT_AGAIN, RejectedFile
from ich_keras.ct.sources import File, Recent, opened

MAX_FRAMES = 4096
# Behind the SOPInstanceUID, before the number of the frame; so do DICOMweb's addresses (PS3.18).
FRAME_SUFFIX = "/frames/"
# What only a functional group may say: elsewhere it would be of no frame for sure.
_OF_GROUPS = (
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
)
_TAGS_OF_GROUPS = frozenset(TAGS[keyword] for keyword in _OF_GROUPS)
_HEADER_BYTES = 4096  # of a parsed frame, about

Headers = dict[int, SliceHeader | RejectedFile]

_recent = Recent(most_bytes=256 * 2**20)


@dataclass(frozen=True, eq=False)
class MultiFrame:
    """A file of frames that was opened.

    Args:
        file: where it is.
        headers: number of the frame, from 1 -> its header, or why it cannot be used.
        content: its bytes, where they lie packed in an archive; empty otherwise.
    """

    file: File
    headers: Headers
    content: bytes

    def value(self, pixels: StoredPixels) -> bytes:
        """Return the pixels of a frame as a single-frame file would hold them."""
        whole = contextlib.nullcontext(io.BytesIO(self.content))
        with whole if self.content else opened(self.file) as stream:
            stream.seek(pixels.offset)
            raw = stream.read(pixels.num_bytes)
        if len(raw) < pixels.num_bytes:
            raise truncated(len(raw), pixels.num_bytes)
        if pixels.is_native:
            return raw
        return as_single_frame(raw)


def open_frames(file: File) -> MultiFrame:
    """Read the headers of all frames of a file. Those of the last files read are kept.

    Raises:
        RejectedFile: the file cannot be used.
    """
    return _recent.get(file, _open)


def _open(file: File) -> tuple[MultiFrame, int]:
    with opened(file, most_bytes=MAX_VOLUME_BYTES) as stream:
        # Whether Image Type will do was decided when it was indexed.
        headers = parse_headers(stream, any_image_type=True)
        content = stream.getvalue() if isinstance(stream, io.BytesIO) else b""
    return MultiFrame(file, headers, content), len(content) + _HEADER_BYTES * len(headers)


def parse_headers(stream: BinaryIO, any_image_type: bool = False) -> Headers:
    """Read and check the headers of all slices of a DICOM file.

    Args:
        stream: seekable, at its beginning.
        any_image_type: also take what Image Type says is not an acquired slice.

    Returns:
        Number of the frame, from 1 -> its header, or why it alone cannot be used; 0 -> the header
        of a single-frame file.

    Raises:
        RejectedFile: the file cannot be used; also if no frame can, all for the same reason.
    """
    elements: dict[int, Element] = {}
    try:
        data_set = read_data_set(stream, False, elements)
        if not data_set.is_enhanced:
            return {0: single_slice(data_set, stream, any_image_type)}
        expect_volume(stream)
        headers = _frames(data_set, stream, any_image_type)
    except RejectedFile as error:
        error.series_instance_uid = series_of(elements)
        raise
    faults = [one for one in headers.values() if isinstance(one, RejectedFile)]
    for fault in faults:
        fault.series_instance_uid = series_of(elements)
    if len(faults) == len(headers) and len({(one.code, one.detail) for one in faults}) == 1:
        raise faults[0]
    return headers


def _frames(data_set: DataSet, stream: BinaryIO, any_image_type: bool) -> Headers:
    count = _number_of_frames(data_set)
    check_image(data_set, any_image_type=True)  # each frame has an Image Type of its own
    groups = _groups(data_set, stream, count)
    places = _pixel_places(data_set, stream, count)
    base = {tag: one for tag, one in data_set.elements.items() if tag not in _TAGS_OF_GROUPS}
    headers: Headers = {}
    for number, (pixels, group) in enumerate(zip(places, groups, strict=True), 1):
        frame = data_set._replace(elements=base | group)
        try:
            check_image(frame, any_image_type)
            header = slice_of(frame, pixels)
        except RejectedFile as error:
            headers[number] = error
        else:
            uid = f"{header.sop_instance_uid}{FRAME_SUFFIX}{number}"
            headers[number] = dataclasses.replace(header, sop_instance_uid=uid)
    return headers


def _number_of_frames(data_set: DataSet) -> int:
    text = text_of(data_set.elements, "NumberOfFrames")
    if not text:
        raise missing("NumberOfFrames")
    # An IS has at most 12 characters (PS3.5 6.2).
    if not re.fullmatch(r"\+?[0-9]{1,12}", text) or int(text) < 1:
        raise bad_value("NumberOfFrames", show(text), f"1 to {MAX_FRAMES}")
    if int(text) > MAX_FRAMES:
        detail = f"{name('NumberOfFrames')} is {text}; expected at most {MAX_FRAMES}"
        raise RejectedFile("TOO_LARGE", detail, EXPORT_AGAIN)
    return int(text)


def _groups(data_set: DataSet, stream: BinaryIO, count: int) -> list[dict[int, Element]]:
    """Return what functional groups say of each frame; its own go before those that are shared."""
    places = data_set.sequences
    if FRAME_GROUPS not in places:
        detail = "(5200,9230) PerFrameFunctionalGroupsSequence is absent; expected one"
        raise RejectedFile("MISSING_TAG", detail, EXPORT_AGAIN)
    shared: dict[int, Element] = {}
    if SHARED_GROUPS in places:
        found = read_groups(data_set, stream, places[SHARED_GROUPS], 1)
        shared = found[0] if found else {}
    own = read_groups(data_set, stream, places[FRAME_GROUPS], count)
    if len(own) != count:
        number = "more" if len(own) > count else str(len(own))
        what = "groups of frames, (5200,9230) PerFrameFunctionalGroupsSequence"
        raise bad_value("NumberOfFrames", f"{count}, and there are {number} {what}", "as many")
    return [shared | group for group in own]


def _pixel_places(data_set: DataSet, stream: BinaryIO, count: int) -> list[StoredPixels]:
    pixels = required_pixels(data_set)
    if pixels.is_native:
        places = _native_places(pixels, data_set.size, count)
    else:
        table = _extended_offsets(data_set, count)
        places = frame_places(pixels, stream, data_set.size, count, table)
    return [
        dataclasses.replace(pixels, offset=offset, num_bytes=num_bytes)
        for offset, num_bytes in places
    ]


def _native_places(pixels: StoredPixels, size: int, count: int) -> list[tuple[int, int]]:
    frame_bytes = pixels.rows * pixels.columns * 2
    expected = frame_bytes * count
    if expected > MAX_VOLUME_BYTES:
        detail = f"{count} frames of {pixels.rows} x {pixels.columns} have {expected} bytes"
        expectation = f"expected at most {MAX_VOLUME_BYTES}"
        raise RejectedFile("TOO_LARGE", f"{detail}; {expectation}", EXPORT_AGAIN)
    if pixels.num_bytes == UNDEFINED_LENGTH:
        raise bad_value("PixelData", "of undefined length", f"{expected} bytes")
    present = min(size - pixels.offset, pixels.num_bytes)
    if present < max(expected, pixels.num_bytes):
        raise truncated(present, max(expected, pixels.num_bytes))
    if pixels.num_bytes >= expected + frame_bytes:
        found = f"{pixels.num_bytes} bytes long"
        raise bad_value("PixelData", found, f"{expected} bytes for {count} frames")
    return [(pixels.offset + number * frame_bytes, frame_bytes) for number in range(count)]


def _extended_offsets(data_set: DataSet, count: int) -> tuple[int, ...]:
    """Return Extended Offset Table: where each frame begins; nothing if there is none."""
    if not has_value(data_set.elements, "ExtendedOffsetTable"):
        return ()
    raw = data_set.elements[TAGS["ExtendedOffsetTable"]].value or b""
    if len(raw) != 8 * count:
        raise bad_value("ExtendedOffsetTable", f"{len(raw)} bytes long", f"8 for each of {count}")
    return struct.unpack(f"<{count}Q", raw)
