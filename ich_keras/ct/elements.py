"""The values of a DICOM file's elements, parsed strictly, and the errors for faulty ones.

Values are read as bytes and parsed here. pydicom's own conversion accepts a slope of NaN, and its
warnings quote values from the file (with RSNA's UIDs, one warning per tag). Only the tags in TAGS
are kept: no name and no date of birth is ever read into memory. What free text among them says of
scanner, patient and contrast medium becomes one of a few words (`ich_keras.ct.traits`).
"""

import math
import re
import warnings
from typing import NamedTuple

from pydicom import charset

from ich_keras.ct.rejects import EXPORT_AGAIN, RejectedFile

TAGS = {
    "MediaStorageSOPClassUID": 0x00020002,
    "TransferSyntaxUID": 0x00020010,
    "SpecificCharacterSet": 0x00080005,
    "ImageType": 0x00080008,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "AcquisitionTime": 0x00080032,
    "ContentTime": 0x00080033,
    "Modality": 0x00080060,
    "Manufacturer": 0x00080070,
    "SeriesDescription": 0x0008103E,
    "ManufacturerModelName": 0x00081090,
    "PatientID": 0x00100020,
    "PatientSex": 0x00100040,
    "PatientAge": 0x00101010,
    "ContrastBolusAgent": 0x00180010,
    "BodyPartExamined": 0x00180015,
    "SliceThickness": 0x00180050,
    "KVP": 0x00180060,
    "ContrastBolusRoute": 0x00181040,
    "ContrastBolusVolume": 0x00181041,
    "ContrastBolusTotalDose": 0x00181044,
    "ContrastFlowRate": 0x00181046,
    "ContrastBolusIngredient": 0x00181048,
    "FilterType": 0x00181160,
    "ConvolutionKernel": 0x00181210,
    "StudyInstanceUID": 0x0020000D,
    "SeriesInstanceUID": 0x0020000E,
    "AcquisitionNumber": 0x00200012,
    "InstanceNumber": 0x00200013,
    "ImagePositionPatient": 0x00200032,
    "ImageOrientationPatient": 0x00200037,
    "FrameOfReferenceUID": 0x00200052,
    "StackID": 0x00209056,
    "TemporalPositionIdentifier": 0x00200100,
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
    "ExtendedOffsetTable": 0x7FE00001,
    "FloatPixelData": 0x7FE00008,  # 0x7FE00009 is DoubleFloatPixelData
    "PixelData": 0x7FE00010,
}
UNDEFINED_LENGTH = 0xFFFFFFFF
MAX_SHOWN_CHARACTERS = 64

# PS3.5 6.2, DS: no infinity, no NaN, no underscores, no decimal comma.
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPE = b"\x1b"


def _plain(character_set: str) -> str:
    """Return a term of Specific Character Set without what is often misspelt: spaces, dashes."""
    return re.sub(r"[^A-Z0-9]", "", character_set.upper())


# Terms of PS3.3 C.12.1.1.2, and common names of the same sets.
_CODECS = {
    **{_plain(term): codec for term, codec in charset.python_encoding.items()},
    **{"UTF8": "utf_8", "ISO88591": "latin_1", "LATIN1": "latin_1", "ASCII": "latin_1"},
}


class Element(NamedTuple):
    """One element: its value as bytes (None where it is too long), its length and byte order."""

    value: bytes | None
    length: int
    is_little_endian: bool


class Stop(NamedTuple):
    """Where reading stopped: an element's tag, its length, where its value and where it begins."""

    tag: int
    length: int
    value_offset: int
    offset: int


def text_of(elements: dict[int, Element], keyword: str) -> str:
    """Return a value as text without padding; "" when absent or empty."""
    return _bytes_of(elements, keyword).decode("latin-1").strip(" \0")


def has_value(elements: dict[int, Element], keyword: str) -> bool:
    """Return whether a tag is present and not empty."""
    return bool(_bytes_of(elements, keyword))


def required_text(elements: dict[int, Element], keyword: str) -> str:
    """Return a value as text; MISSING_TAG when absent or empty."""
    text = text_of(elements, keyword)
    if not text:
        raise missing(keyword)
    return text


def note_of(elements: dict[int, Element], keyword: str) -> str:
    """Return a short text that only tells images apart: no value of it is a fault.

    Control characters become spaces; what no table needs is cut off.
    """
    element = elements.get(TAGS[keyword])
    if element is None or not element.value:
        return ""
    text = element.value[:MAX_SHOWN_CHARACTERS].decode("latin-1").strip(" \0")
    return text if text.isprintable() else _CONTROL.sub(" ", text)


def uid_of(elements: dict[int, Element], keyword: str) -> str:
    """Return an identifier.

    RSNA's "ID_..." are not valid UIDs, but are accepted. Refused is only what would break a table,
    or be mistaken for the "#2" that separates the volumes of one series.
    """
    uid = required_text(elements, keyword)
    if len(uid) > 64 or _CONTROL.search(uid) or "#" in uid:
        raise bad_value(keyword, show(uid), "an identifier of at most 64 characters")
    return uid


def patient_id_of(elements: dict[int, Element]) -> str:
    """Return PatientID, "" when absent. Its value never appears in a message."""
    raw = _bytes_of(elements, "PatientID")
    if raw.isascii() and _ESCAPE not in raw:
        patient_id = raw.decode("ascii").strip(" \0")
    else:
        patient_id = _decoded(raw, text_of(elements, "SpecificCharacterSet")).strip(" \0")
    if _CONTROL.search(patient_id):
        raise bad_value("PatientID", "text with control characters", "printable text")
    return patient_id


def _decoded(raw: bytes, character_sets: str) -> str:
    """Decode an identifier. Bytes that do not fit their character set are taken one by one."""
    # What holds no letter at all is not a term either.
    codecs = [_CODECS.get(_plain(term) or term.strip()) for term in character_sets.split("\\")]
    known = [codec for codec in codecs if codec is not None]
    if len(known) < len(codecs):
        # Guessed at, one patient could become two, and be trained on and tested on.
        found = f"{show(character_sets)} beside a PatientID that is not ASCII"
        raise bad_value("SpecificCharacterSet", found, "a character set of DICOM")
    try:
        if _ESCAPE not in raw:
            return raw.decode(known[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return charset.decode_bytes(raw, known, set())
    except UnicodeError:
        return raw.decode("latin_1")


def integer_of(elements: dict[int, Element], keyword: str) -> int:
    """Return one unsigned 16-bit integer (VR US)."""
    raw = _bytes_of(elements, keyword)
    if not raw:
        raise missing(keyword)
    if len(raw) != 2:
        raise bad_value(keyword, f"{len(raw)} bytes long", "one 16-bit integer")
    return int.from_bytes(raw, "little" if elements[TAGS[keyword]].is_little_endian else "big")


def decimals_of(
    elements: dict[int, Element], keyword: str, count: int, limit: float
) -> tuple[float, ...]:
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


def _bytes_of(elements: dict[int, Element], keyword: str) -> bytes:
    element = elements.get(TAGS[keyword])
    if element is None:
        return b""
    if element.value is None:
        raise bad_value(keyword, f"{element.length} bytes long", "a short value")
    return element.value
