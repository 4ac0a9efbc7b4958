"""Strict parsing of a DICOM file's raw elements, and the errors for faulty ones.

Values are read as bytes and parsed here. pydicom's own conversion accepts a slope of NaN, and its
warnings quote values from the file (with RSNA's UIDs, one warning per tag). Only the tags in TAGS
are kept: no name, date or free text about a patient is ever read into memory.
"""

import math
import re
import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from pydicom import charset
from pydicom.filereader import data_element_generator

from ich_keras.ct.rejects import COPY_AGAIN, EXPORT_AGAIN, RejectedFile

TAGS = {
    "MediaStorageSOPClassUID": 0x00020002,
    "TransferSyntaxUID": 0x00020010,
    "SpecificCharacterSet": 0x00080005,
    "ImageType": 0x00080008,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "Modality": 0x00080060,
    "PatientID": 0x00100020,
    "StudyInstanceUID": 0x0020000D,
    "SeriesInstanceUID": 0x0020000E,
    "AcquisitionNumber": 0x00200012,
    "InstanceNumber": 0x00200013,
    "ImagePositionPatient": 0x00200032,
    "ImageOrientationPatient": 0x00200037,
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "PixelSpacing": 0x00280030,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "PixelPaddingValue": 0x00280120,
    "PixelPaddingRangeLimit": 0x00280121,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "RescaleType": 0x00281054,
    "FloatPixelData": 0x7FE00008,  # 0x7FE00009 is DoubleFloatPixelData
    "PixelData": 0x7FE00010,
}
UNDEFINED_LENGTH = 0xFFFFFFFF
# Longer values are not read into memory. A UID or identifier has at most 64 characters.
MAX_VALUE_BYTES = 1 << 16
MAX_SHOWN_CHARACTERS = 64


_PREAMBLE = 128
# PS3.5 6.2, DS: no infinity, no NaN, no underscores, no decimal comma.
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_EXPLICIT_VR = re.compile(rb"....[A-Z][A-Z]", re.DOTALL)


class Stop(NamedTuple):
    """The element at which reading stopped: its tag, length and where its value begins."""

    tag: int
    length: int
    value_offset: int


def read_meta(stream: BinaryIO, size: int, force: bool) -> dict:
    """Read the file meta information (group 0002) and leave the stream right after it.

    It is read on its own: the transfer syntax must be checked before a deflated data set is
    inflated.

    Args:
        stream: at the beginning of the file.
        size: of the file, bytes.
        force: accept a file without preamble, and one without file meta information.

    Returns:
        tag -> raw element.

    Raises:
        RejectedFile: NOT_DICOM, or TRUNCATED within this part.

    Source:
        DICOM PS3.10 clause 7.1.
    """
    head = stream.read(_PREAMBLE + 4)
    if head[_PREAMBLE:] != b"DICM":
        if not force:
            raise _no_preamble(head, size)
        stream.seek(0)
        is_meta = head[:2] == b"\x02\x00"
        if not is_meta:
            return {}
    elements, _ = read_elements(
        stream, size, False, True, lambda tag: tag >> 16 != 0x0002, "file meta information"
    )
    return elements


def has_explicit_vr(stream: BinaryIO) -> bool:
    """Check whether the next element names its VR.

    Some writers announce one encoding and use the other. The two capital letters of an explicit VR
    are unmistakable: read as a length, they would mean a first value of over 16 KB.
    """
    start = stream.tell()
    first = stream.read(6)
    stream.seek(start)
    return _EXPLICIT_VR.fullmatch(first) is not None


def read_elements(
    stream: BinaryIO,
    size: int,
    is_implicit: bool,
    is_little_endian: bool,
    stop_at: Callable[[int], bool],
    part: str,
) -> tuple[dict, Stop | None]:
    """Collect the raw elements named in TAGS, and detect a file that ends too early.

    Args:
        stream: at the first element.
        size: of the file, bytes.
        is_implicit, is_little_endian: the encoding.
        stop_at: takes a tag; returns whether to stop before its value.
        part: what is being read, for messages.

    Returns:
        tag -> raw element, and the element at which reading stopped (None at a clean end).

    Raises:
        RejectedFile: TRUNCATED or BAD_VALUE.
    """
    end: int | None = stream.tell()
    stop: Stop | None = None

    def stop_when(tag: int, vr: str | None, length: int) -> bool:
        nonlocal end, stop
        offset = stream.tell()
        if stop_at(int(tag)):  # pydicom's tags compare in Python, which is slow
            stop = Stop(int(tag), length, offset)
            return True
        end = None if length == UNDEFINED_LENGTH else offset + length
        return False

    try:
        elements = {
            element.tag: element
            for element in data_element_generator(
                stream,
                is_implicit,
                is_little_endian,
                stop_when=stop_when,
                defer_size=MAX_VALUE_BYTES,
                specific_tags=list(TAGS.values()),
            )
        }
    except RecursionError as error:
        raise RejectedFile(
            "BAD_VALUE", f"the sequences in the {part} are nested too deeply", EXPORT_AGAIN
        ) from error
    except (EOFError, struct.error) as error:
        raise RejectedFile("TRUNCATED", f"the file ends inside the {part}", COPY_AGAIN) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # Raised by pydicom itself: a sequence holds something other than items.
        raise RejectedFile(
            "BAD_VALUE", f"a sequence in the {part} cannot be parsed", EXPORT_AGAIN
        ) from error
    if stop is None and end is not None and end != size:
        # The last value reaches past the end, or part of the next element's header is left over.
        raise RejectedFile("TRUNCATED", f"the file ends inside the {part}", COPY_AGAIN)
    return elements, stop


def text_of(elements: dict, keyword: str) -> str:
    """Return a value as text without padding; "" when absent or empty."""
    return _bytes_of(elements, keyword).decode("latin-1").strip(" \0")


def has_value(elements: dict, keyword: str) -> bool:
    """Return whether a tag is present and not empty."""
    return bool(_bytes_of(elements, keyword))


def required_text(elements: dict, keyword: str) -> str:
    """Return a value as text; MISSING_TAG when absent or empty."""
    text = text_of(elements, keyword)
    if not text:
        raise missing(keyword)
    return text


def uid_of(elements: dict, keyword: str) -> str:
    """Return an identifier.

    RSNA's "ID_..." are not valid UIDs, but are accepted. Refused is only what would break a table,
    or be mistaken for the "#2" that separates the volumes of one series.
    """
    uid = required_text(elements, keyword)
    if len(uid) > 64 or _CONTROL.search(uid) or "#" in uid:
        raise bad_value(keyword, show(uid), "an identifier of at most 64 characters")
    return uid


def patient_id_of(elements: dict) -> str:
    """Return PatientID, "" when absent. Its value never appears in a message."""
    raw = _bytes_of(elements, "PatientID")
    if raw.isascii():
        patient_id = raw.decode("ascii").strip(" \0")
    else:
        names = text_of(elements, "SpecificCharacterSet").split("\\")
        patient_id = charset.decode_bytes(raw, charset.convert_encodings(names), set()).strip(" \0")
    if _CONTROL.search(patient_id):
        raise bad_value("PatientID", "text with control characters", "printable text")
    return patient_id


def integer_of(elements: dict, keyword: str) -> int:
    """Return one unsigned 16-bit integer (VR US)."""
    raw = _bytes_of(elements, keyword)
    if not raw:
        raise missing(keyword)
    if len(raw) != 2:
        raise bad_value(keyword, f"{len(raw)} bytes long", "one 16-bit integer")
    return int.from_bytes(raw, "little" if elements[TAGS[keyword]].is_little_endian else "big")


def decimals_of(elements: dict, keyword: str, count: int, limit: float) -> tuple[float, ...]:
    """Return exactly `count` finite numbers (VR DS), none of them beyond +-limit."""
    text = required_text(elements, keyword)
    parts = [decimal(part) for part in text.split("\\")]
    values = tuple(value for value in parts if value is not None and abs(value) <= limit)
    if len(parts) != count or len(values) != count:
        raise bad_value(keyword, show(text), f"{count} numbers, none beyond {limit:g}")
    return values


def decimal(text: str) -> float | None:
    """Parse one decimal string; None when it is not one finite number."""
    text = text.strip()
    if not _DECIMAL.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def name(keyword: str) -> str:
    """Return "(0028,0010) Rows" for "Rows"."""
    tag = TAGS[keyword]
    return f"({tag >> 16:04x},{tag & 0xFFFF:04x}) {keyword}"


def show(text: str) -> str:
    """Quote text from a file for a message: one line, printable, short."""
    return ascii(text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "...")


def missing(keyword: str) -> RejectedFile:
    """Make the error for a tag that is absent or empty."""
    detail = f"{name(keyword)} is absent or empty; expected a value"
    return RejectedFile("MISSING_TAG", detail, EXPORT_AGAIN)


def bad_value(keyword: str, found: object, expected: str) -> RejectedFile:
    """Make the error for a tag whose value cannot be right."""
    detail = f"{name(keyword)} is {found}; expected {expected}"
    return RejectedFile("BAD_VALUE", detail, EXPORT_AGAIN)


def _bytes_of(elements: dict, keyword: str) -> bytes:
    element = elements.get(TAGS[keyword])
    if element is None:
        return b""
    if element.value is None and element.length > MAX_VALUE_BYTES:
        raise bad_value(keyword, f"{element.length} bytes long", "a short value")
    # A sequence in place of a value counts as absent.
    return element.value if isinstance(element.value, bytes) else b""


def _no_preamble(head: bytes, size: int) -> RejectedFile:
    if 0 < size < _PREAMBLE + 4 and not any(head[:_PREAMBLE]):
        detail = f"the file ends inside the preamble, after {size} bytes"
        return RejectedFile("TRUNCATED", detail, COPY_AGAIN)
    detail = "the file is empty" if size == 0 else "no 'DICM' behind a preamble of 128 bytes"
    return RejectedFile("NOT_DICOM", detail)
