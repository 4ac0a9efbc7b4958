"""The header of one CT slice: read, checked, and described as its pixels are handed out.

A header becomes a `SliceHeader`, or a `RejectedFile` that names the faulty tag.
"""

import re
from dataclasses import dataclass
from typing import Any, BinaryIO

from ich_keras.ct.data_set import CT_IMAGE, ENHANCED_CT, DataSet, read_data_set
from ich_keras.ct.elements import (
    TAGS,
    Element,
    bad_value,
    decimal,
    decimals_of,
    integer_of,
    missing,
    name,
    note_of,
    patient_id_of,
    required_text,
    show,
    text_of,
    uid_of,
)
from ich_keras.ct.encoding import (
    NATIVE,
    StoredPixels,
    require_decoder,
)
from ich_keras.ct.kind import is_acquired, is_localizer
from ich_keras.ct.padding import Padding, padding_of
from ich_keras.ct.pixels import locate
from ich_keras.ct.rejects import (
    EXPORT_AGAIN,
    FRAMES,
    LEAVE_OR_ASK,
    LEAVE_OUT,
    SINGLE_FRAME,
    RejectedFile,
)
from ich_keras.ct.traits import NO_TRAITS, Traits, traits_of
from ich_keras.ct.turning import Plane, Turn

# Checked before anything is decoded. CT matrices have 512 rows, on some scanners 2048.
MAX_ROWS_COLUMNS = 4096
# Scanners write 1, rarely 0.5 or 2. Outside these bounds a slice would be one grey, or overflow.
MIN_SLOPE, MAX_SLOPE = 0.01, 100.0
# The pixels of a head are 0.2 to 1 mm wide; of one in metres, 0.001 mm at most.
MIN_SPACING_MM, MAX_SPACING_MM = 0.02, 100.0
MAX_POSITION_MM = 1e5
# How far direction cosines may be from orthonormal: some writers keep only three decimals.
ORIENTATION_TOLERANCE = 5e-3

# What tells the scans and reconstructions of one series apart, the most telling first. Image Type,
# and whether there was contrast medium, follow them in `SliceHeader.facts`.
FACT_TAGS = (
    "ConvolutionKernel",
    "FilterType",
    "SliceThickness",
    "KVP",
    "TemporalPositionIdentifier",
    "FrameOfReferenceUID",
    "StackID",
)
TIME_TAGS = ("AcquisitionTime", "ContentTime")

# PS3.5 9.1: components without leading zeros.
_UID = re.compile(r"(?=.{1,64}$)(0|[1-9]\d*)(\.(0|[1-9]\d*))*", re.ASCII)


@dataclass(frozen=True)
class SliceHeader:
    """The checked header of one CT slice.

    Args:
        sop_instance_uid, series_instance_uid, study_instance_uid: as written, without padding.
        patient_id: "" when absent.
        acquisition: AcquisitionNumber as written; "" when absent.
        instance_number: InstanceNumber as written; "" when absent.
        rows, columns: of the matrix, once it is turned.
        row_spacing_mm, column_spacing_mm: distance between rows, and between columns.
        position: centre of the first pixel, mm, in the patient system (x to the left, y to the
            back, z to the head).
        orientation: direction cosines along a row (x, y, z), then along a column (x, y, z).
        turn: how the stored pixels are turned (`turning`); what is said above is true afterwards.
        is_localizer: whether ImageType says that this is a scout view.
        body_part: BodyPartExamined as written; "" when absent.
        facts: the values of FACT_TAGS, then ImageType, then "contrast" if any was given; "" where
            absent.
        times: the values of TIME_TAGS, of the day; "" where absent.
        slope, intercept: HU = slope * stored value + intercept.
        pixels: the pixels' matrix size, encoding and place in the file, as stored; None for a slice
            of a NIfTI volume.
        padding: the stored values that are not measurements; None if the header declares none.
        traits: of scanner, patient and contrast medium.

    Source:
        DICOM PS3.3 C.7.6.1 (acquisition), C.7.6.2 (plane), C.7.6.3 (pixels), C.8.2.1 (CT image),
        C.11.1 (rescale).
    """

    sop_instance_uid: str
    series_instance_uid: str
    study_instance_uid: str
    patient_id: str
    acquisition: str
    instance_number: str
    rows: int
    columns: int
    row_spacing_mm: float
    column_spacing_mm: float
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    turn: Turn
    is_localizer: bool
    body_part: str
    facts: tuple[str, ...]
    times: tuple[str, ...]
    slope: float
    intercept: float
    pixels: StoredPixels | None = None
    padding: Padding | None = None
    traits: Traits = NO_TRAITS


def parse_header(stream: BinaryIO, force: bool, any_image_type: bool = False) -> SliceHeader:
    """Read and check the header at the beginning of a file.

    Args:
        stream: seekable, opened to read bytes.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Raises:
        RejectedFile: the file cannot be used. It carries the series that it was read from, if the
            header got that far.
    """
    elements: dict[int, Element] = {}
    try:
        return single_slice(read_data_set(stream, force, elements), stream, any_image_type)
    except RejectedFile as error:
        error.series_instance_uid = series_of(elements)
        raise


def single_slice(data_set: DataSet, stream: BinaryIO, any_image_type: bool) -> SliceHeader:
    """Check the header of a single-frame file whose data set was read; see `parse_header`."""
    _check_kind(data_set, any_image_type)
    pixels = locate(required_pixels(data_set), stream, data_set.size)
    return slice_of(data_set, pixels)


def series_of(elements: dict[int, Element]) -> str:
    """Return SeriesInstanceUID for a reject; "" if there is no usable one."""
    try:
        return uid_of(elements, "SeriesInstanceUID")
    except RejectedFile:
        return ""


def _require_uid(syntax: str) -> None:
    """Refuse what is not a UID: pydicom would quote it in a warning."""
    if not _UID.fullmatch(syntax):
        raise bad_value("TransferSyntaxUID", show(syntax), "a UID")


def _check_kind(data_set: DataSet, any_image_type: bool) -> None:
    """Refuse anything but a single acquired CT image, before its tags are required."""
    if data_set.is_enhanced:
        found = f"{name('SOPClassUID')} is {data_set.sop_class}"
        detail = f"{found} (enhanced CT); expected {CT_IMAGE}"
        raise RejectedFile("MULTIFRAME", detail, FRAMES)
    frames = text_of(data_set.elements, "NumberOfFrames")
    check_image(data_set, any_image_type, frames)


def check_image(data_set: DataSet, any_image_type: bool, frames: str = "") -> None:
    """Refuse anything but an acquired CT image whose pixels can be decoded.

    Args:
        data_set: whose tags are looked at before others are required.
        any_image_type: also take what Image Type says is not an acquired slice.
        frames: NumberOfFrames, of what should hold one.
    """
    elements, sop_class = data_set.elements, data_set.sop_class
    if sop_class not in ("", CT_IMAGE, *ENHANCED_CT):
        detail = f"{name('SOPClassUID')} is {show(sop_class)}; expected {CT_IMAGE} (CT image)"
        raise RejectedFile("NOT_CT", detail, LEAVE_OUT)
    modality = text_of(elements, "Modality")
    if not modality and not sop_class:
        raise missing("Modality")
    if modality not in ("", "CT"):
        detail = f"{name('Modality')} is {show(modality)}; expected CT"
        raise RejectedFile("NOT_CT", detail, LEAVE_OUT)
    if frames not in ("", "1"):
        detail = f"{name('NumberOfFrames')} is {show(frames)}; expected 1 or none"
        raise RejectedFile("MULTIFRAME", detail, SINGLE_FRAME)
    image_type = text_of(elements, "ImageType")
    if not any_image_type and not is_acquired(image_type):
        detail = f"{name('ImageType')} is {show(image_type)}; expected an acquired slice"
        raise RejectedFile("NOT_ORIGINAL", detail, LEAVE_OR_ASK)
    if data_set.syntax not in NATIVE:
        _require_uid(data_set.syntax)
        require_decoder(data_set.syntax)


def required_pixels(data_set: DataSet) -> StoredPixels:
    """Return how and where the pixels are stored, as the data set says.

    Raises:
        RejectedFile: they are absent, or not 16-bit integers of one channel.
    """
    elements, stop = data_set.elements, data_set.stop
    is_signed, bits_stored = _check_encoding(elements)
    rows, columns = _side(elements, "Rows"), _side(elements, "Columns")
    if stop is None:
        raise missing("PixelData")
    if stop.tag != TAGS["PixelData"]:
        raise _unsupported("PixelData", "floating-point", "16-bit integers")
    return StoredPixels(
        rows=rows,
        columns=columns,
        is_signed=is_signed,
        bits_stored=bits_stored,
        transfer_syntax_uid=data_set.syntax,
        offset=stop.value_offset,
        num_bytes=stop.length,
    )


def slice_of(data_set: DataSet, pixels: StoredPixels) -> SliceHeader:
    """Check the tags of one slice.

    Args:
        data_set: its tags.
        pixels: where its pixels are.
    """
    elements = data_set.elements
    names: dict[str, Any] = {
        "sop_instance_uid": uid_of(elements, "SOPInstanceUID"),
        "series_instance_uid": uid_of(elements, "SeriesInstanceUID"),
        "study_instance_uid": uid_of(elements, "StudyInstanceUID"),
        "patient_id": patient_id_of(elements),
        "acquisition": text_of(elements, "AcquisitionNumber"),
        "instance_number": text_of(elements, "InstanceNumber"),
    }
    row_spacing, column_spacing = decimals_of(elements, "PixelSpacing", 2, MAX_SPACING_MM)
    if min(row_spacing, column_spacing) < MIN_SPACING_MM:
        found = show(text_of(elements, "PixelSpacing"))
        raise bad_value("PixelSpacing", found, f"two numbers, {MIN_SPACING_MM:g} or more, in mm")
    position = decimals_of(elements, "ImagePositionPatient", 3, MAX_POSITION_MM)
    plane = Plane(
        pixels.rows,
        pixels.columns,
        row_spacing,
        column_spacing,
        position,
        _orientation(elements),
    )
    turn = Turn.of(plane.orientation)
    slope, intercept = _rescale(elements)
    return SliceHeader(
        **names,
        **turn.plane(plane)._asdict(),
        turn=turn,
        is_localizer=is_localizer(text_of(elements, "ImageType")),
        body_part=note_of(elements, "BodyPartExamined"),
        facts=_facts(elements),
        times=tuple(note_of(elements, keyword) for keyword in TIME_TAGS),
        slope=slope,
        intercept=intercept,
        pixels=pixels,
        padding=padding_of(elements, pixels.is_signed, pixels.bits_stored, slope, intercept),
        traits=traits_of(data_set),
    )


def _check_encoding(elements: dict[int, Element]) -> tuple[bool, int]:
    """Return whether values are signed, and BitsStored; refuse all but grey 16-bit integers."""
    for keyword, expected in (("SamplesPerPixel", 1), ("BitsAllocated", 16)):
        found = integer_of(elements, keyword)
        if found != expected:
            raise _unsupported(keyword, found, expected)
    photometric = required_text(elements, "PhotometricInterpretation")
    if photometric != "MONOCHROME2":
        raise _unsupported("PhotometricInterpretation", show(photometric), "MONOCHROME2")
    representation = integer_of(elements, "PixelRepresentation")
    if representation > 1:
        raise bad_value("PixelRepresentation", representation, "0 (unsigned) or 1 (signed)")
    bits_stored = integer_of(elements, "BitsStored")
    if not 2 <= bits_stored <= 16:
        raise bad_value("BitsStored", bits_stored, "2 to 16")
    if TAGS["HighBit"] in elements:
        high_bit = integer_of(elements, "HighBit")
        if high_bit != bits_stored - 1:
            raise _unsupported("HighBit", high_bit, f"{bits_stored - 1}, BitsStored - 1")
    return representation == 1, bits_stored


def _side(elements: dict[int, Element], keyword: str) -> int:
    side = integer_of(elements, keyword)
    if side == 0:
        raise bad_value(keyword, 0, f"1 to {MAX_ROWS_COLUMNS}")
    if side > MAX_ROWS_COLUMNS:
        detail = f"{name(keyword)} is {side}; expected at most {MAX_ROWS_COLUMNS}"
        raise RejectedFile("TOO_LARGE", detail, EXPORT_AGAIN)
    return side


def _orientation(elements: dict[int, Element]) -> tuple[float, ...]:
    cosines = decimals_of(elements, "ImageOrientationPatient", 6, 1 + ORIENTATION_TOLERANCE)
    row, column = cosines[:3], cosines[3:]
    deviations = (
        sum(x * x for x in row) - 1,
        sum(x * x for x in column) - 1,
        sum(x * y for x, y in zip(row, column, strict=True)),
    )
    if max(map(abs, deviations)) > ORIENTATION_TOLERANCE:
        found = show(text_of(elements, "ImageOrientationPatient"))
        raise bad_value("ImageOrientationPatient", found, "two perpendicular unit vectors")
    return cosines


def _rescale(elements: dict[int, Element]) -> tuple[float, float]:
    bounds = {"RescaleSlope": (MIN_SLOPE, MAX_SLOPE), "RescaleIntercept": (-32768, 32767)}
    values = []
    for keyword, (low, high) in bounds.items():
        text = text_of(elements, keyword)
        value = decimal(text)
        if value is None or not low <= value <= high:
            found = show(text) if text else "absent or empty"
            expected = f"one number from {low:g} to {high:g}"
            raise _bad_rescale(keyword, found, expected)
        values.append(value)
    unit = text_of(elements, "RescaleType")
    if unit not in ("", "HU", "US"):  # US: unspecified
        raise _bad_rescale("RescaleType", show(unit), "HU")
    return values[0], values[1]


def _facts(elements: dict[int, Element]) -> tuple[str, ...]:
    facts = [note_of(elements, keyword) for keyword in FACT_TAGS]
    # Which medium it was is free text, and stays in the file.
    contrast = "contrast" if note_of(elements, "ContrastBolusAgent") else ""
    return (*facts, note_of(elements, "ImageType"), contrast)


def _bad_rescale(keyword: str, found: str, expected: str) -> RejectedFile:
    detail = f"{name(keyword)} is {found}; expected {expected}"
    return RejectedFile("BAD_RESCALE", detail, EXPORT_AGAIN)


def _unsupported(keyword: str, found: object, expected: object) -> RejectedFile:
    detail = f"{name(keyword)} is {found}; expected {expected}"
    return RejectedFile("UNSUPPORTED_PIXELS", detail, EXPORT_AGAIN)
