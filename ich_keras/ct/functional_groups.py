"""Functional groups of enhanced CT: what they say of a frame, by the tags of single-frame CT.

Source:
    DICOM PS3.3 C.7.6.16.2 (macros), C.8.15.3 (those of CT).
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from ich_keras.ct.data_set import (
    ITEM,
    ITEM_END,
    MAX_ELEMENTS,
    MAX_VALUE_BYTES,
    SEQUENCE_END,
    DataSet,
    Walker,
)
from ich_keras.ct.elements import TAGS, UNDEFINED_LENGTH, Element, Stop
from ich_keras.ct.encoding import EXPLICIT_BIG_ENDIAN

# Elements and items of a frame's groups; usual are 50 to 150.
MAX_PER_FRAME = 1000
_MOST = 5 * MAX_ELEMENTS  # about a second

Parse = Callable[[Element], bytes]


def _same(element: Element) -> bytes:
    return element.value or b""


def _number(element: Element) -> bytes:
    """Return a binary integer as the digits of an IS."""
    raw = element.value or b""
    if not raw:
        return b""
    return b"%d" % int.from_bytes(raw, "little" if element.is_little_endian else "big")


def _time_of_day(element: Element) -> bytes:
    """Return the TM of a DT: 20250131120000.5+0100 is 120000.5."""
    text = (element.value or b"").strip(b" \0")
    return text[8:].partition(b"+")[0].partition(b"-")[0]


def _if_given(element: Element) -> bytes:
    """Return a text for YES: whether there was contrast medium is all that counts."""
    return b"yes" if (element.value or b"").strip(b" \0") == b"YES" else b""


# The sequence of a macro -> its tags -> the tag of single-frame CT, and how its value is written.
MACROS: dict[int, dict[int, tuple[int, Parse]]] = {
    0x00289110: {  # PixelMeasuresSequence
        TAGS["PixelSpacing"]: (TAGS["PixelSpacing"], _same),
        TAGS["SliceThickness"]: (TAGS["SliceThickness"], _same),
    },
    0x00209113: {  # PlanePositionSequence
        TAGS["ImagePositionPatient"]: (TAGS["ImagePositionPatient"], _same),
    },
    0x00209116: {  # PlaneOrientationSequence
        TAGS["ImageOrientationPatient"]: (TAGS["ImageOrientationPatient"], _same),
    },
    0x00289145: {  # PixelValueTransformationSequence
        TAGS["RescaleIntercept"]: (TAGS["RescaleIntercept"], _same),
        TAGS["RescaleSlope"]: (TAGS["RescaleSlope"], _same),
        TAGS["RescaleType"]: (TAGS["RescaleType"], _same),
    },
    0x00189329: {0x00089007: (TAGS["ImageType"], _same)},  # CTImageFrameTypeSequence: FrameType
    0x00209111: {  # FrameContentSequence
        TAGS["StackID"]: (TAGS["StackID"], _same),
        0x00209156: (TAGS["AcquisitionNumber"], _number),  # FrameAcquisitionNumber
        0x00189074: (TAGS["AcquisitionTime"], _time_of_day),  # FrameAcquisitionDateTime
        0x00209128: (TAGS["TemporalPositionIdentifier"], _number),  # TemporalPositionIndex
    },
    0x00189314: {  # CTReconstructionSequence
        TAGS["ConvolutionKernel"]: (TAGS["ConvolutionKernel"], _same),
    },
    0x00189325: {  # CTXRayDetailsSequence
        TAGS["KVP"]: (TAGS["KVP"], _same),
        TAGS["FilterType"]: (TAGS["FilterType"], _same),
    },
    0x00189341: {0x00189342: (TAGS["ContrastBolusAgent"], _if_given)},  # ContrastBolusUsageSequence
}


def read_groups(
    data_set: DataSet, stream: BinaryIO, place: Stop, count: int
) -> list[dict[int, Element]]:
    """Read the items of a sequence of functional groups.

    Args:
        data_set: how the file is written.
        stream: the file.
        place: of the sequence.
        count: how many items there should be; at most one more is read.

    Returns:
        For each item: tag of single-frame CT -> element.

    Raises:
        RejectedFile: TRUNCATED or BAD_VALUE.
    """
    stream.seek(place.value_offset)
    reader = _Reader(data_set, stream, min(_MOST, MAX_PER_FRAME * (count + 1)))
    groups: list[dict[int, Element]] = []
    for length in reader.items(place.length):
        group: dict[int, Element] = {}
        groups.append(group)
        if len(groups) > count:
            break
        for tag, size in reader.elements(length):
            if tag in MACROS:
                reader.read_macro(MACROS[tag], size, group)
            else:
                reader.skip(size)
    return groups


class _Reader:
    """Walks over nested items; what it yields must be read or skipped before the next."""

    def __init__(self, data_set: DataSet, stream: BinaryIO, most: int) -> None:
        self._stream = stream
        self._is_implicit = not data_set.is_explicit
        self._is_little_endian = data_set.syntax != EXPLICIT_BIG_ENDIAN
        self._walker = Walker(stream, self._is_little_endian, "functional groups", most)

    def items(self, length: int) -> Iterator[int]:
        """Yield the length of each item of a sequence."""
        for tag, size in self._heads(length, True):
            if tag == SEQUENCE_END:
                return
            if tag != ITEM:
                raise self._walker.bad("has a sequence that holds something other than items")
            yield size

    def elements(self, length: int) -> Iterator[tuple[int, int]]:
        """Yield tag and length of each element of an item."""
        for tag, size in self._heads(length, self._is_implicit):
            if tag == ITEM_END:
                return
            yield tag, size

    def _heads(self, length: int, is_implicit: bool) -> Iterator[tuple[int, int]]:
        end = None if length == UNDEFINED_LENGTH else self._stream.tell() + length
        while end is None or self._stream.tell() < end:
            head = self._walker.head(is_implicit)
            if head is None:
                raise self._walker.truncated()
            yield head[0], head[1]
        if self._stream.tell() != end:
            raise self._walker.bad("has an item that reaches beyond its sequence")

    def skip(self, length: int) -> None:
        """Step over a value."""
        if length == UNDEFINED_LENGTH:
            self._walker.skip_items(self._is_implicit)
        else:
            self._stream.seek(length, 1)

    def read_macro(
        self, wanted: dict[int, tuple[int, Parse]], length: int, group: dict[int, Element]
    ) -> None:
        """Read the tags that are wanted of the first item of a macro's sequence."""
        is_first = True
        for item in self.items(length):
            for tag, size in self.elements(item):
                if is_first and tag in wanted:
                    target, parse = wanted[tag]
                    group[target] = self._value(size, parse)
                else:
                    self.skip(size)
            is_first = False

    def _value(self, size: int, parse: Parse) -> Element:
        if size > MAX_VALUE_BYTES:
            self.skip(size)
            return Element(None, size, self._is_little_endian)
        raw = self._stream.read(size)
        if len(raw) < size:
            raise self._walker.truncated()
        value = parse(Element(raw, size, self._is_little_endian))
        return Element(value, len(value), self._is_little_endian)
