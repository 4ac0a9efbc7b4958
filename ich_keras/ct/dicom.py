"""Reading one DICOM file: its header for the index, and its pixels as Hounsfield units.

This is the only reader. A file becomes a slice, or a `RejectedFile` that names the faulty tag.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import BinaryIO

import numpy as np

from ich_keras.ct.header import SliceHeader, parse_header
from ich_keras.ct.members import Member, opened_member
from ich_keras.ct.pixels import hounsfield_units, may_be_wrapped
from ich_keras.ct.plausibility import Content, judge_slice
from ich_keras.ct.rejects import RejectedFile

Source = str | PathLike | Member | BinaryIO


@dataclass(frozen=True, eq=False)
class CTSlice:
    """One slice in HU.

    Args:
        hu: int16 (rows, columns), HU, turned to the convention of `turning`.
        repaired: whether wrapped 12-bit values were unwrapped.
        header: the header that was read with them.
        content: what it shows, for judging its series (`plausibility.judge_series`).
    """

    hu: np.ndarray
    repaired: bool
    header: SliceHeader
    content: Content


def read_header(source: Source, force: bool = False, any_image_type: bool = False) -> SliceHeader:
    """Read and check the header of one CT slice, without its pixels.

    Args:
        source: path, place in an archive (`ich_keras.ct.members.Member`), or a seekable binary file
            that holds the DICOM file from its beginning.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.
    """
    with _opened(source, is_whole=False) as stream:
        return parse_header(stream, force, any_image_type)


def read_slice(source: Source, force: bool = False, any_image_type: bool = False) -> CTSlice:
    """Read one CT slice as Hounsfield units, and report whether it was repaired.

    HU = slope * stored value + intercept, rounded to the nearest integer. What the header declares
    to be padding becomes air (`padding.find_padding`). Unsigned 12-bit slices with wrapped air are
    repaired (`pixels.is_wrapped`). Values that cannot be HU are refused (`plausibility`). Axial
    slices are turned until rows run to the patient's left and columns to the back (`turning`).

    Args:
        source: path, place in an archive (`ich_keras.ct.members.Member`), or a seekable binary file
            that holds the DICOM file from its beginning.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.

    Source:
        DICOM PS3.3 C.11.1.1.2, PS3.5 8.1.1.
    """
    with _opened(source) as stream:
        header = parse_header(stream, force, any_image_type)
        stream.seek(header.pixels.offset)
        raw = stream.read(header.pixels.num_bytes)
    hu, repaired = hounsfield_units(
        raw, header.pixels, header.padding, header.slope, header.intercept
    )
    content = judge_slice(hu)
    doubtful = not repaired and may_be_wrapped(hu, header.pixels, header.intercept)
    if repaired or doubtful:
        content = dataclasses.replace(content, is_repaired=repaired, may_be_wrapped=doubtful)
    return CTSlice(header.turn.pixels(hu), repaired, header, content)


def read_hu(source: Source, force: bool = False, any_image_type: bool = False) -> np.ndarray:
    """Read one CT slice as Hounsfield units; see `read_slice`.

    Args:
        source: path, place in an archive (`ich_keras.ct.members.Member`), or a seekable binary file
            that holds the DICOM file from its beginning.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Returns:
        int16 (rows, columns), HU.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.
    """
    return read_slice(source, force, any_image_type).hu


def unreadable(error: OSError) -> RejectedFile:
    """Make the error for a file that the system does not give."""
    reason = error.strerror or type(error).__name__
    hint = "Check that it exists and that you may read it."
    return RejectedFile("UNREADABLE", f"{reason}; expected a readable file", hint)


@contextlib.contextmanager
def _opened(source: Source, is_whole: bool = True) -> Iterator[BinaryIO]:
    try:
        if isinstance(source, Member):
            with opened_member(source, is_whole) as stream:
                yield stream
        elif isinstance(source, str | PathLike):
            with open(source, "rb") as stream:
                yield stream
        else:
            yield source
    except OSError as error:
        raise unreadable(error) from error
