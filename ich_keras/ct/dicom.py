"""Reading one file: its headers for the index, and its pixels as Hounsfield units.

This is the only reader. A file becomes one slice or several (an enhanced CT, a NIfTI volume), or a
`RejectedFile` that names the faulty tag or value.
"""

import dataclasses
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ich_keras.ct.encoding import StoredPixels
from ich_keras.ct.header import SliceHeader, parse_header
from ich_keras.ct.multiframe import Headers, open_frames, parse_headers
from ich_keras.ct.nifti import is_nifti, read_volume
from ich_keras.ct.pixels import hounsfield_units, may_be_wrapped
from ich_keras.ct.plausibility import Content, judge_slice
from ich_keras.ct.rejects import FRAMES, RejectedFile
from ich_keras.ct.sources import File, Frame, Source, name_of, opened


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
        source: path, place in an archive (`ich_keras.ct.members.Member`), one slice of a file that
            holds several (`ich_keras.ct.sources.Frame`), or a seekable binary file that holds the
            DICOM file from its beginning.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.
    """
    if isinstance(source, Frame):
        return _header_of_frame(source)
    _require_single(source)
    with opened(source, is_whole=False) as stream:
        return parse_header(stream, force, any_image_type)


def read_headers(file: File, any_image_type: bool = False) -> dict[int, SliceHeader | RejectedFile]:
    """Read and check the headers of all slices of a file.

    Returns:
        The number of each slice, from 1 (`ich_keras.ct.sources.Frame`), -> its header, or why it
        alone cannot be used; 0 for a file that is one slice.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.
    """
    if is_nifti(name_of(file)):
        return dict(enumerate(read_volume(file).headers, 1))
    with opened(file, is_whole=False) as stream:
        return parse_headers(stream, any_image_type)


def read_slice(source: Source, force: bool = False, any_image_type: bool = False) -> CTSlice:
    """Read one CT slice as Hounsfield units, and report whether it was repaired.

    HU = slope * stored value + intercept, rounded to the nearest integer. What the header declares
    to be padding becomes air (`padding.find_padding`). Unsigned 12-bit slices with wrapped air are
    repaired (`pixels.is_wrapped`). Values that cannot be HU are refused (`plausibility`). Axial
    slices are turned until rows run to the patient's left and columns to the back (`turning`).

    Args:
        source: path, place in an archive (`ich_keras.ct.members.Member`), one slice of a file that
            holds several (`ich_keras.ct.sources.Frame`), or a seekable binary file that holds the
            DICOM file from its beginning.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.

    Source:
        DICOM PS3.3 C.11.1.1.2, PS3.5 8.1.1.
    """
    if isinstance(source, Frame):
        return _read_frame(source)
    _require_single(source)
    with opened(source) as stream:
        header = parse_header(stream, force, any_image_type)
        assert header.pixels is not None  # only those of a NIfTI volume are
        stream.seek(header.pixels.offset)
        raw = stream.read(header.pixels.num_bytes)
    return _slice_of(raw, header, header.pixels)


def read_hu(source: Source, force: bool = False, any_image_type: bool = False) -> np.ndarray:
    """Read one CT slice as Hounsfield units; see `read_slice`.

    Args:
        source: path, place in an archive (`ich_keras.ct.members.Member`), one slice of a file that
            holds several (`ich_keras.ct.sources.Frame`), or a seekable binary file that holds the
            DICOM file from its beginning.
        force: also read a file without the 128-byte preamble, guessing its encoding.
        any_image_type: also read what Image Type says is not an acquired slice.

    Returns:
        int16 (rows, columns), HU.

    Raises:
        RejectedFile: the file cannot be used; its `code` says why.
    """
    return read_slice(source, force, any_image_type).hu


def _slice_of(raw: bytes, header: SliceHeader, pixels: StoredPixels) -> CTSlice:
    hu, repaired = hounsfield_units(raw, pixels, header.padding, header.slope, header.intercept)
    content = judge_slice(hu)
    doubtful = not repaired and may_be_wrapped(hu, pixels, header.intercept)
    if repaired or doubtful:
        content = dataclasses.replace(content, is_repaired=repaired, may_be_wrapped=doubtful)
    return CTSlice(header.turn.pixels(hu), repaired, header, content)


def _read_frame(frame: Frame) -> CTSlice:
    header = _header_of_frame(frame)
    if header.pixels is None:
        hu = read_volume(frame.file).hu(frame.number)
        return CTSlice(header.turn.pixels(hu), False, header, judge_slice(hu))
    return _slice_of(open_frames(frame.file).value(header.pixels), header, header.pixels)


def _header_of_frame(frame: Frame) -> SliceHeader:
    if is_nifti(name_of(frame.file)):
        headers: Headers = dict(enumerate(read_volume(frame.file).headers, 1))
    else:
        headers = open_frames(frame.file).headers
    header = headers.get(frame.number)
    if header is None or frame.number == 0:
        count = f"it holds {len(headers)}" if 0 not in headers else "it is one slice"
        raise RejectedFile("CHANGED", f"the file has no slice {frame.number}; {count}")
    if isinstance(header, RejectedFile):
        raise header
    return header


def _require_single(source: File | BinaryIO) -> None:
    """Refuse a volume where one slice is asked for."""
    if isinstance(source, File) and is_nifti(name_of(source)):
        raise RejectedFile("MULTIFRAME", "a NIfTI volume, which holds several slices", FRAMES)
