"""The thesis's figures 6.2 to 6.4, drawn again from phantoms: preprocessing, and heads in 3D.

Figure 6.2 shows slices after preprocessing. Figures 6.3 and 6.4 show a head as a surface in 3D: at
one threshold of the stored values, and at the same threshold of Hounsfield units. What is stored
counts from air at 0, so that the threshold lies between air and skin; in Hounsfield units it lies
in bone.
"""

from pathlib import Path

import cv2
import numpy as np

from ich_keras.ct.window import BRAIN, SOFT_TISSUE, SUBDURAL
from ich_keras.data.inputs import slice_windows
from ich_keras.errors import UsageError
from ich_keras.files import atomic_write
from ich_keras.pages.pictures import Word, grey, png
from ich_keras.phantom.plan import Phantom, PhantomSpec, make_phantom

THRESHOLD = 400  # of stored values, and of HU
INTERCEPT = -1024.0  # HU = stored + intercept, as most scanners store
SYNTHETIC = "synthetic: phantoms (drawn head CT)"
_SUBTYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
_TILE, _GAP, _TOP, _LEFT = 128, 4, 58, 118
_GRID_MM = 1.25
_ORANGE = "#ffb35c"
# From where the head is seen: the angle around the body's axis, and above it.
VIEWS = {"from the front": (0, 12), "from the left": (90, 12), "from above": (20, 65)}
_LIGHT = np.array([-0.45, -0.75, 0.55])  # towards it: depth, up, right of the picture


def write_figures(out: Path, seed: int = 9) -> list[Path]:
    """Write the figures as PNG into a folder.

    Args:
        out: receives thesis-6-2.png, thesis-6-3.png and thesis-6-4.png, in place of earlier ones.
        seed: of the phantoms.

    Returns:
        The files.
    """
    heads = [_head(seed, number, (name,)) for number, name in enumerate(_SUBTYPES)]
    whole = _head(seed, 0, (), spacing=(2.5, 2.5))
    spacing = (whole.scan.slice_spacing_mm, whole.scan.pixel_mm, whole.scan.pixel_mm)
    stored = whole.hu.astype(np.float32) - INTERCEPT
    figures = {
        "thesis-6-2.png": preprocessing(heads),
        "thesis-6-3.png": head_in_3d(stored, spacing, f"stored values above {THRESHOLD}"),
        "thesis-6-4.png": head_in_3d(
            whole.hu.astype(np.float32), spacing, f"Hounsfield units above {THRESHOLD}"
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        atomic_write(out / name, content)
    return [out / name for name in figures]


def _head(
    seed: int, patient: int, subtypes: tuple[str, ...], spacing: tuple[float, float] = (5.0, 8.0)
) -> Phantom:
    return make_phantom(
        PhantomSpec(seed, patient, patient, subtypes, matrix=256, slice_spacing_mm=spacing)
    )


def preprocessing(heads: list[Phantom]) -> bytes:
    """Draw, for each phantom, the slice with most of its bleed: HU, the three windows, and these
    as red, green and blue.
    """
    columns = ("HU\n-1000 to 1000", "brain\n40/80", "subdural\n80/200", "soft tissue\n40/380")
    columns = (*columns, "stacked\nas colours")
    step = _TILE + _GAP
    image = np.zeros((_TOP + len(heads) * step, _LEFT + len(columns) * step, 3), np.uint8)
    words = [
        Word(text, _LEFT + place * step + _TILE / 2, 24, 12, is_centred=True)
        for place, text in enumerate(columns)
    ]
    words.append(Word(SYNTHETIC, 6, 5, 12, _ORANGE))
    for number, head in enumerate(heads):
        name = head.spec.subtypes[0]
        hu = head.hu[int(head.mask(name).sum(axis=(1, 2)).argmax())]
        windows = slice_windows(hu, None, (BRAIN, SUBDURAL, SOFT_TISSUE))
        plain = [(hu.astype(np.float32) + 1000) / 2000, *np.moveaxis(windows, -1, 0)]
        tiles = [np.repeat(grey(part, _TILE)[..., np.newaxis], 3, axis=-1) for part in plain]
        tiles.append(np.stack([grey(windows[..., c], _TILE) for c in range(3)], axis=-1))
        top = _TOP + number * step
        words.append(Word(name, 6, top + 6, 12))
        for place, tile in enumerate(tiles):
            left = _LEFT + place * step
            image[top : top + _TILE, left : left + _TILE] = tile
    return png(image, words)


def head_in_3d(volume: np.ndarray, spacing_mm: tuple[float, float, float], text: str) -> bytes:
    """Draw the surface of what lies above the threshold, from each of `VIEWS`."""
    pictures = [surface(volume, spacing_mm, *angles) for angles in VIEWS.values()]
    rows = max(picture.shape[0] for picture in pictures)
    image = np.zeros((rows + 48, sum(picture.shape[1] for picture in pictures)), np.uint8)
    words, left = [Word(f"{text}; {SYNTHETIC}", 6, 5, 12, _ORANGE)], 0
    for name, picture in zip(VIEWS, pictures, strict=True):
        image[48 : 48 + picture.shape[0], left : left + picture.shape[1]] = picture
        words.append(Word(name, left + picture.shape[1] / 2, 26, 12, is_centred=True))
        left += picture.shape[1]
    return png(image, words)


def surface(
    volume: np.ndarray,
    spacing_mm: tuple[float, float, float],
    turn_degrees: float,
    lift_degrees: float,
    threshold: float = THRESHOLD,
) -> np.ndarray:
    """Draw what is above a threshold as a lit surface.

    The volume is turned onto a grid of cubes that looks along the viewer's rays. Where a ray first
    meets a voxel above the threshold, the gradient of the values is the direction in which the
    surface faces, and the light falls on it.

    Args:
        volume: float32 (slices, rows, columns), inferior to superior, rows to the back, columns to
            the patient's left.
        spacing_mm: between slices, rows and columns.
        turn_degrees: around the axis of the body: 0 looks at the face, 90 at the patient's left.
        lift_degrees: how far above the head the viewer is.
        threshold: in the units of the volume.

    Returns:
        uint8 (rows, columns), superior up; black where no ray meets anything.

    Raises:
        UsageError: nothing is above the threshold.
    """
    from scipy.ndimage import affine_transform, gaussian_filter

    if not (volume > threshold).any():
        raise UsageError(f"nothing is above {threshold:g}.", "Lower the threshold.")
    spacing = np.array(spacing_mm)
    # Air above and below, so that the ends of a scan are surfaces like others.
    air = float(volume.min())
    volume = np.pad(volume, ((3, 3), (0, 0), (0, 0)), constant_values=air)
    extent = np.array(volume.shape) * spacing
    side = int(np.ceil(np.linalg.norm(extent[[1, 2]]) / _GRID_MM))
    height = int(np.ceil(max(extent[0] * 1.15, np.linalg.norm(extent[[0, 1]]) * 0.8) / _GRID_MM))
    turn, lift = np.deg2rad([turn_degrees, lift_degrees])
    # In (slices, rows, columns): where the rays go, down the picture, and to its right.
    ray = np.array([-np.sin(lift), np.cos(lift) * np.cos(turn), -np.cos(lift) * np.sin(turn)])
    right = np.array([0.0, np.sin(turn), np.cos(turn)])
    down = np.cross(right, ray)
    down = down if down[0] < 0 else -down
    axes = np.stack([ray, down, right], axis=1) * _GRID_MM / spacing[:, np.newaxis]
    shape = (side, height, side)
    middle = (np.array(volume.shape) - 1) / 2
    offset = middle - axes @ ((np.array(shape) - 1) / 2)
    turned = affine_transform(
        gaussian_filter(volume, 0.7 / spacing), axes, offset, shape, order=1, cval=air
    )
    is_in = turned > threshold
    first = is_in.argmax(axis=0)
    is_hit = is_in.any(axis=0)
    facing = _facing(gaussian_filter(turned, 1.0), first)
    light = facing @ (_LIGHT / np.linalg.norm(_LIGHT))
    depth = 1 - (first - first[is_hit].min()) / max(np.ptp(first[is_hit]), 1)
    shade = (0.18 + 0.82 * light.clip(0)) * (0.55 + 0.45 * depth)
    picture = np.where(is_hit, shade, 0).astype(np.float32)
    found = np.argwhere(is_hit)
    (top, start), (bottom, end) = found.min(axis=0), found.max(axis=0) + 1
    picture = np.pad(picture[top:bottom, start:end], 10)
    rows, columns = picture.shape
    larger = cv2.resize(picture, (columns * 3 // 2, rows * 3 // 2), interpolation=cv2.INTER_CUBIC)
    return grey(larger)


def _facing(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the unit vector away from what is dense, where each ray stops: (rows, columns, 3)."""
    depth = first.clip(1, values.shape[0] - 2)
    rows, columns = np.indices(first.shape)
    above, below = (rows - 1).clip(0), (rows + 1).clip(max=first.shape[0] - 1)
    before, behind = (columns - 1).clip(0), (columns + 1).clip(max=first.shape[1] - 1)
    gradient = np.stack(
        [
            values[depth + 1, rows, columns] - values[depth - 1, rows, columns],
            values[depth, below, columns] - values[depth, above, columns],
            values[depth, rows, behind] - values[depth, rows, before],
        ],
        axis=-1,
    )
    length = np.linalg.norm(gradient, axis=-1, keepdims=True)
    return -gradient / np.maximum(length, 1e-6)
