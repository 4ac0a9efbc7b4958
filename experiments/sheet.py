"""A contact sheet: real slices and phantoms side by side, in the same windows."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ich_keras.ct.dicom import read_hu
from ich_keras.ct.series import index_folder
from ich_keras.ct.window import BRAIN, Window
from ich_keras.errors import UsageError
from ich_keras.files import atomic_write, require_absent
from ich_keras.phantom.plan import make_phantom, plan_phantoms

BONE = Window(600, 2800)
_TILE = 180  # pixels
_HEADER = 22


def slices_of(folder: Path | str, count: int) -> list[np.ndarray]:
    """Read slices of a folder, evenly spaced over all its series, inferior to superior.

    Returns:
        At most `count` arrays, int16 (rows, columns), HU.

    Raises:
        DataError: no CT slice in the folder.
    """
    slices = index_folder(folder).slices
    # Neither the lowest nor the highest: they may show no head.
    chosen = np.linspace(0, len(slices) - 1, min(count, len(slices)) + 2).round().astype(int)
    rows = chosen[1:-1] if len(slices) > 2 else np.arange(len(slices))
    return [read_hu(slices["container"].iloc[row]) for row in rows]


def phantom_slices(count: int, seed: int) -> list[np.ndarray]:
    """Draw one slice each of `count` phantoms, the first half healthy, from the base to the top.

    Returns:
        int16 (512, 512) each, HU; of a phantom with a bleed, the slice that shows most of it.
    """
    specs = plan_phantoms(8 * count, seed, series_per_patient=1)
    healthy = [spec for spec in specs if not spec.subtypes][: count // 2]
    bleeders = [spec for spec in specs if spec.subtypes][: count - len(healthy)]
    images = []
    for spec, share in zip(healthy, np.linspace(0.08, 0.85, len(healthy)), strict=True):
        phantom = make_phantom(spec)
        images.append(phantom.hu[round(share * (len(phantom.hu) - 1))])
    for spec in bleeders:
        phantom = make_phantom(spec)
        blood = sum(phantom.mask(name).sum(axis=(1, 2)) > 400 for name in spec.subtypes)
        area = phantom.mask(spec.subtypes[0]).sum(axis=(1, 2))
        images.append(phantom.hu[int((blood + area / area.max()).argmax())])
    return images


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> np.ndarray:
    """Lay out rows of slices: the brain window above, a bone window below.

    Args:
        rows: title, and int16 (rows, columns) slices, HU.

    Returns:
        uint8 (rows, columns); short rows are filled with black.
    """
    columns = max(len(images) for _, images in rows)
    parts = []
    for title, images in rows:
        header = np.zeros((_HEADER, columns * _TILE), np.uint8)
        cv2.putText(header, title, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 1, cv2.LINE_AA)
        parts.append(header)
        for window in (BRAIN, BONE):
            tiles = [_tile(window(hu)) for hu in images]
            tiles += [np.zeros((_TILE, _TILE), np.uint8)] * (columns - len(tiles))
            parts.append(np.hstack(tiles))
    return np.vstack(parts)


def _tile(image: np.ndarray) -> np.ndarray:
    small = cv2.resize(image, (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    return np.rint(small * 255).astype(np.uint8)


def write_sheet(folders: Sequence[Path | str], out: Path, count: int = 8, seed: int = 4) -> None:
    """Write a contact sheet of real slices and phantoms as PNG.

    Args:
        folders: of DICOM files; one row each.
        out: a new file.
        count: slices per row.
        seed: of the phantoms.

    Raises:
        UsageError: `out` is not a .png file, or exists.
        DataError: a folder has no CT slice.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"{out} is not a picture name; expected one that ends in .png.")
    require_absent(out)
    rows = [(Path(folder).name, slices_of(folder, count)) for folder in folders]
    phantoms = phantom_slices(2 * count, seed)
    rows.append(("phantoms (synthetic), healthy", phantoms[:count]))
    rows.append(("phantoms (synthetic), bleeding", phantoms[count:]))
    _, encoded = cv2.imencode(".png", contact_sheet(rows), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    atomic_write(out, encoded.tobytes())
