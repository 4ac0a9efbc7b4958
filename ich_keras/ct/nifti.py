"""NIfTI volumes in Hounsfield units: one file, `.nii` or `.nii.gz`, is one series.

The third axis of the voxels counts the slices; the affine says how they lie. A NIfTI file says
neither what its values mean nor whom they show: values are judged as a whole before any slice is
(`ich_keras.ct.units`), and identifiers come from the content, PatientID from the file's name.
"""

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ich_keras.ct.header import (
    FACT_TAGS,
    MAX_POSITION_MM,
    MAX_ROWS_COLUMNS,
    MAX_SLOPE,
    MAX_SPACING_MM,
    MIN_SLOPE,
    MIN_SPACING_MM,
    ORIENTATION_TOLERANCE,
    TIME_TAGS,
    SliceHeader,
)
from ich_keras.ct.identifiers import uid_of_content
from ich_keras.ct.members import MAX_VOLUME_BYTES, expect_volume
from ich_keras.ct.rejects import COPY_AGAIN, NIFTI, RejectedFile
from ich_keras.ct.sources import File, Recent, name_of, opened
from ich_keras.ct.turning import Plane, Turn
from ich_keras.ct.units import ValueRange, require_hu

SUFFIXES = (".nii.gz", ".nii")
MAX_SLICES = 4096
_CONVERT = "Write it as a 3-D volume of one value per voxel in HU, int16, with its affine in mm."
_NO_HEAD_BYTES = "it ends inside its header"
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
# Behind the voxels of a packed file; what is further back is not unpacked.
_MAX_REST_BYTES = 1 << 20
# Extensions of the header lie between it and the voxels.
_MAX_VOXEL_OFFSET = 1 << 24
# The smallest field of view that scanners reconstruct; a head cut out closely is over 100 mm wide.
_MIN_SLICE_MM = 50.0
_ROUNDED = 6  # digits of mm: the affine has seven in all
# nifti1.h: NIFTI_UNITS_*, in the lower three bits of xyzt_units; 0 is unknown.
_UNITS = {1: "metres", 3: "micrometres"}
_KINDS = "iuf"
# NIfTI-1 and NIfTI-2: bytes of the header, and how it ends, and begins.
_MAGIC = {348: (b"n+1\0", 344), 540: (b"n+2\0", 4)}

_recent = Recent(most_bytes=256 * 2**20)


@dataclass(frozen=True, eq=False)
class NiftiVolume:
    """A volume that was read as a whole.

    Args:
        stored: (slices, rows, columns), as the file has them, read-only.
        slope, intercept: HU = slope * stored + intercept.
        headers: (slices,), as for DICOM; their pixels' place is None.
    """

    stored: np.ndarray
    slope: float
    intercept: float
    headers: tuple[SliceHeader, ...]

    def hu(self, number: int) -> np.ndarray:
        """Return a slice as the file has it, not turned: int16 (rows, columns), HU.

        Args:
            number: of the slice, from 1.
        """
        return np.rint(self.stored[number - 1] * self.slope + self.intercept).astype(np.int16)


def is_nifti(name: str) -> bool:
    """Return whether a file's name says that it is a NIfTI volume.

    >>> is_nifti("scan.NII.gz"), is_nifti("scan.dcm")
    (True, False)
    """
    return name.lower().endswith(SUFFIXES)


def stem_of(name: str) -> str:
    """Return the name of a NIfTI file without its suffix; control characters become spaces.

    >>> stem_of("sub-01_ses-2_ct.nii.gz")
    'sub-01_ses-2_ct'
    """
    suffix = next((one for one in SUFFIXES if name.lower().endswith(one)), "")
    stem = name[: len(name) - len(suffix)]
    return "".join(sign if sign.isprintable() else " " for sign in stem).strip()


def read_volume(file: File) -> NiftiVolume:
    """Read a NIfTI file, all of it. The last ones read are kept for their other slices.

    Raises:
        RejectedFile: it cannot be used; its `code` says why.
    """
    return _recent.get(file, _read)


def _read(file: File) -> tuple[NiftiVolume, int]:
    with opened(file, is_whole=False) as stream:
        expect_volume(stream)
        head = stream.read(2)
        stream.seek(0)
        try:
            content = _content(gzip.GzipFile(fileobj=stream) if head == _GZIP_MAGIC else stream)
        except EOFError as error:
            raise _truncated("the packed data end too early") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            detail = f"it cannot be unpacked ({error})"
            raise RejectedFile("BAD_NIFTI", detail, COPY_AGAIN) from error
    volume = _volume(content, stem_of(name_of(file)))
    return volume, len(content)


def _content(stream: Any) -> bytearray:
    """Return header and voxels, no more than the header says, and check what is packed."""
    head = stream.read(max(_MAGIC))
    size = _size(_header(head))
    content = bytearray(head[:size])
    while len(content) < size:
        part = stream.read(min(_CHUNK_BYTES, size - len(content)))
        if not part:
            raise _truncated(f"it has {len(content)} bytes; its header says {size}")
        content += part
    if isinstance(stream, gzip.GzipFile):
        # The checksum of packed data lies behind them.
        rest = len(stream.read(_MAX_REST_BYTES + 1))
        if rest > _MAX_REST_BYTES:
            raise _bad(f"it goes on behind its {size} bytes of header and voxels", "an end there")
    return content


def _header(head: bytes) -> Any:
    """Return nibabel's header of NIfTI-1 or NIfTI-2."""
    nibabel = _nibabel()
    if not head:
        raise _truncated("it is empty")
    for size, (magic, place) in _MAGIC.items():
        orders = [order for order in ("little", "big") if int.from_bytes(head[:4], order) == size]
        if orders:
            if len(head) < size:
                raise _truncated(_NO_HEAD_BYTES)
            if head[place : place + 4] != magic:
                found = head[place : place + 4]
                detail = f"its mark is {ascii(found)[1:]}"
                raise _bad(detail, f"{ascii(magic)[1:]}: header and voxels in one file")
            kind = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
            return kind(head[:size], endianness=orders[0], check=False)
    raise _bad("it begins like no NIfTI header", "a header of 348 or 540 bytes")


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        detail = "NIfTI volumes are read with nibabel, which is not installed"
        raise RejectedFile("NO_DECODER", detail, f"Install it: {NIFTI}") from error
    return nibabel


def _shape(header: Any) -> tuple[int, int, int]:
    """Return the columns, rows and slices of a volume, within bounds."""
    count = int(header["dim"][0])
    dims = [int(one) for one in header["dim"][1 : 1 + max(0, min(7, count))]]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) != 3 or not 1 <= count <= 7:
        shown = " x ".join(map(str, dims)) or "nothing"
        raise _bad(f"it is {shown} ({count} axes)", "one volume of three axes")
    if min(dims) < 1:
        raise _bad(f"its axes have {dims} voxels", "1 or more")
    columns, rows, slices = dims
    if max(columns, rows) > MAX_ROWS_COLUMNS or slices > MAX_SLICES:
        raise RejectedFile(
            "TOO_LARGE",
            f"{slices} slices of {rows} x {columns}; expected at most {MAX_SLICES} of"
            f" {MAX_ROWS_COLUMNS} x {MAX_ROWS_COLUMNS}",
            _CONVERT,
        )
    return columns, rows, slices


def _dtype(header: Any) -> np.dtype:
    """Return the type of a voxel; refuse what holds no HU."""
    code = int(header["datatype"])
    label, dtype = f"of data type {code}", None
    try:
        from nibabel.nifti1 import data_type_codes

        label = data_type_codes.label[code]
        dtype = header.get_data_dtype()
    except (KeyError, ValueError, AttributeError):
        pass
    if dtype is None or dtype.itemsize > 8 or dtype.kind not in _KINDS:
        if dtype is not None and dtype.names:
            raise RejectedFile("NOT_CT", f"its voxels are colours ({label}); expected HU")
        raise _bad(f"its voxels are {label}", "integers of 16 to 64 bits, or floats")
    if dtype.itemsize == 1:
        detail = f"its voxels have 8 bits ({label}), which hold no HU: a mask, or a picture"
        raise RejectedFile("NOT_CT", f"{detail}; expected 16 bits or more")
    return dtype


def _offset(header: Any) -> int:
    offset = float(header["vox_offset"])
    least = int(header["sizeof_hdr"])
    if not (math.isfinite(offset) and least <= offset <= _MAX_VOXEL_OFFSET):
        raise _bad(f"its voxels begin at byte {offset:g}", f"{least} to {_MAX_VOXEL_OFFSET}")
    return int(offset)


def _size(header: Any) -> int:
    """Return how many bytes header and voxels have."""
    voxel_bytes = math.prod(_shape(header)) * _dtype(header).itemsize
    if voxel_bytes > MAX_VOLUME_BYTES:
        detail = f"{voxel_bytes} bytes of voxels; expected at most {MAX_VOLUME_BYTES}"
        raise RejectedFile("TOO_LARGE", detail, "Write it as int16.")
    return _offset(header) + voxel_bytes


def _rescale(header: Any) -> tuple[float, float]:
    """Return slope and intercept; nifti1.h: a slope of 0 means that there are none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not MIN_SLOPE <= slope <= MAX_SLOPE or not -32768 <= intercept <= 32767:
        raise RejectedFile(
            "BAD_RESCALE",
            f"scl_slope is {slope:g} and scl_inter {intercept:g}; expected {MIN_SLOPE:g} to"
            f" {MAX_SLOPE:g}, and -32768 to 32767",
            _CONVERT,
        )
    return slope, intercept


def _affine(header: Any) -> np.ndarray:
    """Return what turns the numbers of a voxel into mm; x to the left, y to the back, z up."""
    units = int(header["xyzt_units"]) & 7
    if units in _UNITS:
        raise _bad(f"its distances are in {_UNITS[units]}", "mm")
    if header["sform_code"] > 0:
        name, affine = "sform", header.get_sform()
    elif header["qform_code"] > 0:
        name, affine = "qform", _qform(header)
    else:
        raise _bad("neither sform nor qform says how it lies", "one of them, with a code above 0")
    affine = np.asarray(affine, np.float64)
    if not np.isfinite(affine).all():
        raise _bad(f"its {name} holds values that are not finite", "numbers")
    spacings = np.linalg.norm(affine[:3, :3], axis=0)
    if spacings.min() < MIN_SPACING_MM or spacings.max() > MAX_SPACING_MM:
        # Without a code of units metres and micrometres are taken for mm.
        shown = " x ".join(f"{one:g}" for one in spacings)
        expected = f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g}, in mm"
        raise _bad(f"its {name} makes voxels of {shown} mm", expected)
    if abs(affine[:3, 3]).max() > MAX_POSITION_MM:
        raise _bad(f"its {name} begins at {affine[:3, 3]} mm", f"within {MAX_POSITION_MM:g}")
    row, column, step = (affine[:3, :3] / spacings).T
    if abs(row @ column) > ORIENTATION_TOLERANCE:
        degrees = math.degrees(math.acos(min(1.0, abs(row @ column))))
        raise _bad(f"its {name} is sheared: rows and columns are {degrees:.1f} degrees apart", "90")
    if abs(np.cross(row, column) @ step) < ORIENTATION_TOLERANCE:
        raise _bad(f"its {name} puts all slices into one plane", "slices above each other")
    # RAS to LPS; adding 0 leaves no -0.
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine + 0.0


def _require_size(affine: np.ndarray, columns: int, rows: int) -> None:
    """Refuse slices that are smaller than any scanner makes them."""
    width, height = np.linalg.norm(affine[:3, :2], axis=0) * (columns, rows)
    if max(width, height) < _MIN_SLICE_MM:
        # Centimetres, for which NIfTI has no code, taken for mm.
        raise _bad(
            f"its affine makes slices of {width:.3g} x {height:.3g} mm",
            f"{_MIN_SLICE_MM:g} mm or more: are its distances in mm?",
        )


def _qform(header: Any) -> np.ndarray:
    from nibabel.spatialimages import HeaderDataError

    try:
        return header.get_qform()
    except (HeaderDataError, ValueError) as error:
        raise _bad(f"its qform cannot be used ({error})", "a rotation and three distances") from (
            error
        )


def _volume(content: bytearray, stem: str) -> NiftiVolume:
    header = _header(bytes(content[: max(_MAGIC)]))
    columns, rows, slices = _shape(header)
    dtype, (slope, intercept), affine = _dtype(header), _rescale(header), _affine(header)
    stored = np.frombuffer(content, dtype, slices * rows * columns, _offset(header))
    stored = stored.reshape(slices, rows, columns)  # the first axis of the file changes fastest
    stored.flags.writeable = False
    require_hu(_range(stored, slope, intercept))
    _require_size(affine, columns, rows)
    geometry = repr((stored.shape, dtype.str, slope, intercept, affine.tolist()))
    digest = hashlib.sha256(geometry.encode())
    digest.update(stored.data)
    headers = _headers(affine, stored.shape, digest.hexdigest(), stem, slope, intercept)
    return NiftiVolume(stored, slope, intercept, headers)


def _range(stored: np.ndarray, slope: float, intercept: float) -> ValueRange:
    """Return the range of a volume's values, a slice at a time: a copy would take as much again."""
    ranges = [ValueRange.of(one) for one in stored]
    return ValueRange.joined(ranges).rescaled(slope, intercept)


def _headers(
    affine: np.ndarray, shape: tuple[int, ...], digest: str, stem: str, slope: float, inter: float
) -> tuple[SliceHeader, ...]:
    slices, rows, columns = shape
    spacings = np.linalg.norm(affine[:3, :3], axis=0)
    row, column, _ = (affine[:3, :3] / spacings).T
    orientation = (*row.tolist(), *column.tolist())
    column_spacing_mm, row_spacing_mm = (round(float(mm), _ROUNDED) for mm in spacings[:2])
    turn = Turn.of(orientation)
    headers = []
    for number in range(slices):
        position = affine[:3, 3] + number * affine[:3, 2]
        plane = Plane(
            rows,
            columns,
            row_spacing_mm,
            column_spacing_mm,
            tuple(round(one, _ROUNDED) + 0.0 for one in position.tolist()),
            orientation,
        )
        headers.append(
            SliceHeader(
                sop_instance_uid=uid_of_content(digest, "slice", number + 1),
                series_instance_uid=uid_of_content(digest, "series"),
                study_instance_uid=uid_of_content(digest, "study"),
                patient_id=stem,
                acquisition="",
                instance_number=str(number + 1),  # in the file, as tables of labels count
                **turn.plane(plane)._asdict(),
                turn=turn,
                is_localizer=False,
                body_part="",
                facts=("",) * (len(FACT_TAGS) + 2),
                times=("",) * len(TIME_TAGS),
                slope=slope,
                intercept=inter,
            )
        )
    return tuple(headers)


def _truncated(detail: str) -> RejectedFile:
    return RejectedFile("TRUNCATED", detail, COPY_AGAIN)


def _bad(found: str, expected: str) -> RejectedFile:
    return RejectedFile("BAD_NIFTI", f"{found}; expected {expected}", _CONVERT)
