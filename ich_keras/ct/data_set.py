"""Walking over the elements of a DICOM data set, with bounds on time, memory and depth.

Sequences are stepped over, never built: pydicom makes an object of every item, and a damaged or
hostile header may hold millions. Only the values of the tags in TAGS are read.
"""

import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from ich_keras.ct.elements import TAGS, UNDEFINED_LENGTH, Element, Stop, missing, text_of
from ich_keras.ct.encoding import (
    DEFLATED,
    EXPLICIT_BIG_ENDIAN,
    EXPLICIT_LITTLE_ENDIAN,
    IMPLICIT_LITTLE_ENDIAN,
    require_decoder,
)
from ich_keras.ct.rejects import COPY_AGAIN, EXPORT_AGAIN, RejectedFile

# Longer values are not read into memory. A UID or identifier has at most 64 characters.
MAX_VALUE_BYTES = 1 << 16
# Elements and items of a header, nested ones included. Headers of CT slices hold a few hundred;
# this many take about a fifth of a second.
MAX_ELEMENTS = 200_000
MAX_DEPTH = 64

_PREAMBLE = 128
_WANTED = frozenset(TAGS.values())
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
# PS3.5 7.1.2: after these, two bytes are reserved and the length has four.
_LONG_VRS = frozenset(
    (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
)
# The usual ones of the others, so that most elements need no second look.
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT IS LO PN SH TM UI UL US".split())

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
# Enhanced CT, and legacy converted enhanced CT.
ENHANCED_CT = (f"{CT_IMAGE}.1", f"{CT_IMAGE}.2")
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230  # functional groups (PS3.3 C.7.6.16)
CONTRAST_AGENTS = 0x00180012  # ContrastBolusAgentSequence
SEQUENCES = (SHARED_GROUPS, FRAME_GROUPS, CONTRAST_AGENTS)
_NOWHERE = Stop(0, 0, 0, 0)
_ITEM_HEAD = 8  # bytes of an item's or a delimiter's tag and length
_FIRST_PIXELS, _LAST_PIXELS = TAGS["FloatPixelData"], TAGS["PixelData"]


class DataSet(NamedTuple):
    """What a file holds in front of its pixels.

    Args:
        elements: tag -> element, of the data set.
        meta: the same of the file meta information.
        syntax: the transfer syntax.
        is_explicit: whether elements name their VR.
        stop: where the pixels are; None if there are none.
        sequences: where the sequences of SEQUENCES are.
        size: of the file, bytes.
    """

    elements: dict[int, Element]
    meta: dict[int, Element]
    syntax: str
    is_explicit: bool
    stop: Stop | None
    sequences: dict[int, Stop]
    size: int

    @property
    def sop_class(self) -> str:
        """What kind of object it is; "" if it does not say so."""
        return text_of(self.elements, "SOPClassUID") or text_of(
            self.meta, "MediaStorageSOPClassUID"
        )

    @property
    def is_enhanced(self) -> bool:
        """Whether it is an enhanced CT, which may hold several frames."""
        return self.sop_class in ENHANCED_CT


def read_data_set(stream: BinaryIO, force: bool, elements: dict[int, Element]) -> DataSet:
    """Read a file up to its pixels; what was read before a fault stays in `elements`.

    Raises:
        RejectedFile: it is no DICOM file, is cut or damaged, or has no transfer syntax.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    meta = read_meta(stream, size, force)
    if stream.tell() >= size:
        detail = f"the file ends after the file meta information, at {size} bytes"
        raise RejectedFile("TRUNCATED", detail, COPY_AGAIN)
    syntax = text_of(meta, "TransferSyntaxUID")
    if not syntax and not force:
        raise missing("TransferSyntaxUID")
    if syntax == DEFLATED:
        require_decoder(syntax)  # there is none: nothing may be inflated
    is_explicit = has_explicit_vr(stream)
    if not syntax:
        syntax = EXPLICIT_LITTLE_ENDIAN if is_explicit else IMPLICIT_LITTLE_ENDIAN
    places = dict.fromkeys(SEQUENCES, _NOWHERE)
    stop = read_elements(
        stream,
        size,
        not is_explicit,
        syntax != EXPLICIT_BIG_ENDIAN,
        lambda tag: _FIRST_PIXELS <= tag <= _LAST_PIXELS,
        elements,
        "header",
        places,
    )
    sequences = {tag: place for tag, place in places.items() if place is not _NOWHERE}
    return DataSet(elements, meta, syntax, is_explicit, stop, sequences, size)


def read_meta(stream: BinaryIO, size: int, force: bool) -> dict[int, Element]:
    """Read the file meta information (group 0002) and leave the stream right after it.

    It is read on its own: the transfer syntax must be checked before a deflated data set is
    inflated.

    Args:
        stream: at the beginning of the file.
        size: of the file, bytes.
        force: accept a file without preamble, and one without file meta information.

    Returns:
        tag -> element.

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
    elements: dict[int, Element] = {}
    stop = read_elements(
        stream, size, False, True, lambda tag: tag >> 16 != 0x0002, elements, "file meta part"
    )
    if stop is not None:
        stream.seek(stop.offset)
    return elements


def has_explicit_vr(stream: BinaryIO) -> bool:
    """Check whether the next element names its VR.

    Some writers announce one encoding and use the other. The two capital letters of an explicit VR
    are unmistakable: read as a length, they would mean a first value of over 16 KB.
    """
    start = stream.tell()
    first = stream.read(6)
    stream.seek(start)
    return len(first) == 6 and _is_vr(first[4:])


def read_elements(
    stream: BinaryIO,
    size: int,
    is_implicit: bool,
    is_little_endian: bool,
    stop_at: Callable[[int], bool],
    elements: dict[int, Element],
    part: str,
    sequences: dict[int, Stop] | None = None,
) -> Stop | None:
    """Collect the elements named in TAGS, and detect a file that ends too early.

    Args:
        stream: at the first element.
        size: of the file, bytes.
        is_implicit, is_little_endian: the encoding.
        stop_at: takes a tag; returns whether to stop before its value.
        elements: receives tag -> element. What was read before a fault stays in it.
        part: what is being read, for messages.
        sequences: has the tags of sequences as keys, and receives where they are.

    Returns:
        The element at which reading stopped; None at a clean end.

    Raises:
        RejectedFile: TRUNCATED or BAD_VALUE.

    Source:
        DICOM PS3.5 clause 7.1 and 7.5.
    """
    walker = Walker(stream, is_little_endian, part)
    offset = stream.tell()
    while True:
        head = walker.head(is_implicit)
        if head is None:
            # The last value reaches past the end where the next one should begin.
            if offset != size:
                raise walker.truncated()
            return None
        tag, length, is_sequence, head_bytes = head
        start = offset + head_bytes
        if stop_at(tag):
            return Stop(tag, length, start, offset)
        if sequences is not None and tag in sequences:
            sequences[tag] = Stop(tag, length, start, offset)
        if length == UNDEFINED_LENGTH:
            walker.skip_items(is_implicit)
            offset = stream.tell()
            if sequences is not None and tag in sequences and offset - start == _ITEM_HEAD:
                sequences[tag] = Stop(tag, 0, start, start - head_bytes)  # its end, and no item
            continue
        offset = start + length
        if is_sequence or tag not in _WANTED:
            stream.seek(offset)
        elif length > MAX_VALUE_BYTES:
            elements[tag] = Element(None, length, is_little_endian)
            stream.seek(offset)
        else:
            value = stream.read(length)
            if len(value) < length:
                raise walker.truncated()
            elements[tag] = Element(value, length, is_little_endian)


class Walker:
    """Reads the heads of elements and items, and counts them."""

    def __init__(
        self, stream: BinaryIO, is_little_endian: bool, part: str, most: int | None = None
    ) -> None:
        order = "<" if is_little_endian else ">"
        self.stream = stream
        self.part = part
        self.most = MAX_ELEMENTS if most is None else most
        self.count = 0
        self._implicit = struct.Struct(f"{order}HHL").unpack
        self._short = struct.Struct(f"{order}HH2sH").unpack
        self._long = struct.Struct(f"{order}L").unpack

    def head(self, is_implicit: bool) -> tuple[int, int, bool, int] | None:
        """Read the head of the next element or item.

        Returns:
            Tag, length, whether it is a sequence, and the bytes of the head; None at the end of
            the file.
        """
        raw = self.stream.read(8)
        if len(raw) < 8:
            if raw:
                raise self.truncated()
            return None
        self.count += 1
        if self.count > self.most:
            raise self.bad(f"holds over {self.most} elements and items")
        if not is_implicit:
            group, element, vr, length = self._short(raw)
            # Items have no VR, and some writers switch to implicit elements within a data set.
            if group != 0xFFFE and (vr in _SHORT_VRS or _is_vr(vr)):
                if vr not in _LONG_VRS:
                    return group << 16 | element, length, False, 8
                raw = self.stream.read(4)
                if len(raw) < 4:
                    raise self.truncated()
                return group << 16 | element, self._long(raw)[0], vr == b"SQ", 12
        group, element, length = self._implicit(raw)
        return group << 16 | element, length, False, 8

    def skip_items(self, is_implicit: bool) -> None:
        """Step over a value of undefined length: items, up to the delimiter.

        Lengths that are given are trusted, so only what has none is looked into.
        """
        # What is open, outermost first: None for a sequence, for an item its encoding.
        opened: list[bool | None] = [None]
        while opened:
            inside = opened[-1]
            head = self.head(True if inside is None else inside)
            if head is None:
                raise self.truncated()
            tag, length, *_ = head
            if inside is None:
                if tag == SEQUENCE_END:
                    opened.pop()
                elif tag != ITEM:
                    raise self.bad("has a sequence that holds something other than items")
                elif length == UNDEFINED_LENGTH:
                    outer = next((kind for kind in reversed(opened) if kind is not None), None)
                    encoding = is_implicit if outer is None else outer
                    # Sequences of unknown VR are implicit whatever surrounds them (PS3.5 6.2.2).
                    opened.append(encoding or not has_explicit_vr(self.stream))
                else:
                    self.stream.seek(length, 1)
            elif tag == ITEM_END:
                opened.pop()
            elif length == UNDEFINED_LENGTH:
                opened.append(None)
            else:
                self.stream.seek(length, 1)
            if len(opened) > MAX_DEPTH:
                raise self.bad("has sequences that are nested too deeply")

    def truncated(self) -> RejectedFile:
        return RejectedFile("TRUNCATED", f"the file ends inside the {self.part}", COPY_AGAIN)

    def bad(self, what: str) -> RejectedFile:
        return RejectedFile("BAD_VALUE", f"the {self.part} {what}", EXPORT_AGAIN)


def _is_vr(raw: bytes) -> bool:
    """Return whether two bytes are the capital letters of a VR."""
    return raw.isalpha() and raw.isupper()  # of bytes: ASCII only


def _no_preamble(head: bytes, size: int) -> RejectedFile:
    if 0 < size < _PREAMBLE + 4 and not any(head[:_PREAMBLE]):
        detail = f"the file ends inside the preamble, after {size} bytes"
        return RejectedFile("TRUNCATED", detail, COPY_AGAIN)
    detail = "the file is empty" if size == 0 else "no 'DICM' behind a preamble of 128 bytes"
    return RejectedFile("NOT_DICOM", detail)
