"""Pictures: into a page as data URIs, and as PNG sheets with texts."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ich_keras.errors import DataError

_QUALITY = 88
_DPI = 128  # a power of two: pixels survive the way through inches
_FONT_PIXELS = 13


def picture_uri(image: np.ndarray) -> str:
    """Return a picture as a data URI (JPEG).

    Args:
        image: uint8 (rows, columns) grey, or (rows, columns, 3) red, green, blue.

    Raises:
        DataError: it cannot be encoded.
    """
    turned = image if image.ndim == 2 else image[..., ::-1]
    done, encoded = cv2.imencode(
        ".jpg", np.ascontiguousarray(turned), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    )
    if not done:
        raise DataError(f"a picture of shape {image.shape} could not be encoded.")
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"


def grey(image: np.ndarray, side: int | None = None) -> np.ndarray:
    """Turn values 0..1 into a picture.

    Args:
        image: float (rows, columns).
        side: rows and columns of the picture; None keeps those of `image`.

    Returns:
        uint8 (rows, columns).
    """
    picture = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if side is None or picture.shape == (side, side):
        return picture
    method = cv2.INTER_AREA if picture.shape[0] > side else cv2.INTER_CUBIC
    return cv2.resize(picture, (side, side), interpolation=method)


@dataclass(frozen=True)
class Word:
    """A text on a sheet.

    Args:
        text: one or several lines.
        x, y: where its upper left corner is (its upper middle, if centred), pixels from the upper
            left.
        size: of its letters, pixels.
        colour: a name of matplotlib's.
        is_centred: whether `x` is its middle.
    """

    text: str
    x: float
    y: float
    size: float = _FONT_PIXELS
    colour: str = "white"
    is_centred: bool = False


def png(image: np.ndarray, words: Sequence[Word] = ()) -> bytes:
    """Return a picture with texts as PNG; the same arguments give the same bytes.

    Args:
        image: uint8 (rows, columns) or (rows, columns, 3); its pixels stay what they are.
        words: drawn on it.

    Raises:
        DataError: it cannot be encoded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = image.shape[:2]
    figure = Figure(figsize=(columns / _DPI, rows / _DPI), dpi=_DPI, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    # As colours: through a map of greys, some values change by one.
    figure.figimage(image if image.ndim == 3 else np.repeat(image[..., np.newaxis], 3, axis=-1))
    for word in words:
        figure.text(
            word.x / columns,
            1 - word.y / rows,
            word.text,
            color=word.colour,
            fontsize=word.size * 72 / _DPI,
            horizontalalignment="center" if word.is_centred else "left",
            verticalalignment="top",
            parse_math=False,
        )
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., 2::-1]  # blue, green, red
    done, encoded = cv2.imencode(".png", drawn, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise DataError(f"a picture of shape {image.shape} could not be encoded.")
    return encoded.tobytes()
