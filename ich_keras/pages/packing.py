"""Volumes as text inside a page, one line per slice, and back.

Hounsfield units are cut off at 12 bits. Of each slice the differences between neighbouring pixels,
folded into numbers of 0 and above, are written as two planes of bytes (low, high), compressed with
zlib and written in base 64. The page unpacks the slices that it shows; zlib's checksum tells a
damaged one. `viewer.js` has the inverse, and so has this module, for tests.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup

LOW_HU, HIGH_HU = -1024, 3071
MAX_SIDE = 1024  # pixels of a slice in a page
MAX_VOXELS = 100_000_000  # of a page: about 380 slices of 512 x 512
MAX_MAP_SIDE = 128  # pixels of a heat map in a page


def shrinking(slices: int, rows: int, columns: int) -> int:
    """Return by how much a series is shrunk within its slices for a page; 1 leaves it as it is.

    >>> shrinking(40, 512, 512), shrinking(40, 2048, 1024), shrinking(1000, 512, 512)
    (1, 2, 2)
    """
    factor = -(-max(rows, columns) // MAX_SIDE)
    while slices * (-(-rows // factor)) * (-(-columns // factor)) > MAX_VOXELS:
        factor += 1
    return factor


def shrunk(hu: np.ndarray, factor: int) -> np.ndarray:
    """Return a slice at 1/factor of its matrix, each pixel the mean of those it stands for.

    Args:
        hu: int16 (rows, columns), HU. What is left over at the right and lower edge counts for a
            whole pixel.
        factor: 1 or more.

    >>> shrunk(np.array([[0, 10, 7], [20, 30, 9]], np.int16), 2).tolist()
    [[15, 8]]
    """
    if factor == 1:
        return hu
    rows, columns = hu.shape
    padding = ((0, -rows % factor), (0, -columns % factor))
    whole = np.pad(hu.astype(np.float64), padding, mode="edge")
    parts = whole.reshape(whole.shape[0] // factor, factor, whole.shape[1] // factor, factor)
    return np.rint(parts.mean(axis=(1, 3))).astype(np.int16)


def pack_slice(hu: np.ndarray) -> str:
    """Return a slice as one line of text.

    Args:
        hu: int16 (rows, columns), HU; cut off at -1024 and 3071.
    """
    values = np.clip(hu, LOW_HU, HIGH_HU).astype(np.int32).ravel() - LOW_HU
    return _packed(np.diff(values, prepend=0))


def unpack_slice(line: str, rows: int, columns: int) -> np.ndarray:
    """Return what `pack_slice` packed: int16 (rows, columns), HU.

    Raises:
        ValueError: the line is damaged.
    """
    values = np.cumsum(_unpacked(line)) + LOW_HU
    return values.reshape(rows, columns).astype(np.int16)


def pack_map(values: np.ndarray) -> tuple[list[str], int, int]:
    """Return a heat map as lines of text, in 8 bits, at `MAX_MAP_SIDE` pixels at most.

    Args:
        values: float32 (slices, rows, columns), 0 to 1.

    Returns:
        (one line per slice, rows, columns).
    """
    longest = max(values.shape[1:])
    scale = min(1.0, MAX_MAP_SIDE / longest)
    rows, columns = (max(1, round(side * scale)) for side in values.shape[1:])
    lines = []
    for one in values:
        small = np.ascontiguousarray(one, np.float32)
        if scale < 1:
            small = cv2.resize(small, (columns, rows), interpolation=cv2.INTER_AREA)
        levels = np.rint(np.clip(small, 0, 1) * 255).astype(np.int32)
        lines.append(_packed(np.diff(levels.ravel(), prepend=0)))
    return lines, rows, columns


def unpack_map(lines: Sequence[str], rows: int, columns: int) -> np.ndarray:
    """Return what `pack_map` packed: uint8 (slices, rows, columns), 0 to 255."""
    levels = [np.cumsum(_unpacked(line)).reshape(rows, columns) for line in lines]
    return np.stack(levels).astype(np.uint8)


def json_block(content: Any) -> Markup:
    """Return JSON that may stand inside a `<script>` that is not run.

    Nothing in it can end the element, whatever the texts hold.

    >>> json_block({"name": "</script><!--"})
    Markup('{"name":"\\\\u003c/script\\\\u003e\\\\u003c!--"}')
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _packed(differences: np.ndarray) -> str:
    folded = np.where(differences < 0, -2 * differences - 1, 2 * differences).astype("<u2")
    planes = folded.view(np.uint8).reshape(-1, 2).T
    # Noise has no repeated texts to be found: runs and a good code are as small, and faster.
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    return base64.b64encode(packer.compress(planes.tobytes()) + packer.flush()).decode("ascii")


def _unpacked(line: str) -> np.ndarray:
    try:
        content = zlib.decompress(base64.b64decode(line, validate=True))
    except zlib.error as error:
        raise ValueError(f"a packed slice is damaged: {error}") from error
    low, high = np.frombuffer(content, np.uint8).reshape(2, -1).astype(np.int64)
    folded = low | high << 8
    return np.where(folded & 1, -(folded >> 1) - 1, folded >> 1)
