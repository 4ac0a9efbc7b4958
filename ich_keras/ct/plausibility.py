"""Whether the values of a slice, or of a series, can be Hounsfield units at all.

A slope or intercept that was lost, or applied twice, leaves an image that looks right on a screen,
with values that are wrong by hundreds of HU. In a head they are known: air around it at -1000,
soft tissue at -100 to 100, bone above. A slice is refused only for what no head shows, whatever the
field of view, the kernel, the padding, and the metal in it. What one slice cannot show, a series
does: somewhere in a head there are air, soft tissue and bone.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ich_keras.ct.rejects import EXPORT_AGAIN, RejectedFile

CODE = "IMPLAUSIBLE_HU"
# Smaller slices have too few pixels for shares of them to mean much.
MIN_SIDE = 32
# A grid of about so many rows and columns gives the same shares as all pixels.
SAMPLED_SIDE = 128
# A shorter series may miss what is looked for.
MIN_SLICES = 3

# Shares of the disc. In brackets: what good slices have at most or at least (a GE head of 28
# slices from the neck to the vertex, three slices of RSNA, slices of pydicom-data, phantoms), and
# what they have with an intercept or slope that is wrong.
MAX_LOW = 0.05  # below LOW_HU [at most .001; .31 or more with the intercept applied twice]
MAX_LOW_WITHOUT_METAL = 0.005
MAX_HIGH = 0.2  # in one window above 300 HU [.04; .33 with the intercept lost]
# The same above 850 HU in a slice without air; dense bone is spread over 1000 HU.
MAX_DENSE_WITHOUT_AIR = 0.08
MAX_BETWEEN = 0.2  # in one window between air and fat [.1; .4 with half the slope]
MIN_OBJECT = 0.05  # above -500 HU: less is not an object
MIN_SOFT_OF_OBJECT = 0.02  # in one window of soft tissue [.17; .006 with twice the slope]
MIN_NEAR_SOFT_OF_OBJECT = 0.05  # between -150 and 150 HU [.36; .013]
MIN_POSITIVE = 0.001  # above 0 HU
# Shares of the disc that one slice of a series must have.
MIN_SOFT, MIN_AIR, MIN_BONE = 0.02, 0.001, 0.001
# A slice of one value shows nothing.
PLAIN_SHARE = 0.98

LOW_HU = -1200  # noise and streaks reach no further, unless metal causes them
_METAL_HU = 1500
_DISC_RADIUS = 0.48  # of the sides; the corners hold padding of any value
_LOWEST, _HIGHEST, _BIN_HU = -4000, 8000, 20
_WINDOW_BINS = 5  # 100 HU: one kind of tissue with its noise
_HALF_WINDOW_HU = _WINDOW_BINS * _BIN_HU // 2
_NUM_BINS = (_HIGHEST - _LOWEST) // _BIN_HU


_WRAPPED = (
    "values from 3096 are air in other slices of the series, written modulo 4096; this slice has"
    " too few of them to tell air from metal"
)


@dataclass(frozen=True)
class Content:
    """What a slice shows, in shares of the disc that fits into it.

    Args:
        soft: in the fullest window of 100 HU around soft tissue.
        air: below -300 HU.
        bone: above 300 HU.
        is_plain: whether nearly all pixels have one value, or the slice is too small to judge.
        is_repaired: whether wrapped 12-bit values were unwrapped (`pixels.is_wrapped`).
        may_be_wrapped: whether it was not, though it has values that wrapped air has.
    """

    soft: float
    air: float
    bone: float
    is_plain: bool
    is_repaired: bool = False
    may_be_wrapped: bool = False


# Of a slice that was not read.
NOTHING = Content(soft=0, air=0, bone=0, is_plain=True)


def judge_slice(hu: np.ndarray) -> Content:
    """Refuse a slice whose values cannot be HU; return what it shows.

    Args:
        hu: int16 (rows, columns), HU.

    Raises:
        RejectedFile: IMPLAUSIBLE_HU; it says what was seen.
    """
    values = _sample(hu)
    bins = _bin_of_value().take(values.view(np.uint16))
    shares = np.bincount(bins, minlength=_NUM_BINS) / values.size
    below = np.concatenate([[0.0], np.cumsum(shares)])  # of which share is below each edge
    windows = below[_WINDOW_BINS:] - below[:-_WINDOW_BINS]
    content = Content(
        soft=_fullest(windows, -150, 150)[0],
        air=_between(below, _LOWEST, -300),
        bone=_between(below, 300, _HIGHEST),
        is_plain=bool(shares.max() >= PLAIN_SHARE) or min(hu.shape) < MIN_SIDE,
    )
    if content.is_plain:
        return content
    seen = _misplaced(windows, content.air) or _too_low(values) or _no_tissue(below, content.soft)
    if seen:
        raise RejectedFile(CODE, f"{seen}; expected air at -1000 HU and soft tissue at 0 to 100")
    return content


def judge_series(contents: Sequence[Content | None]) -> str:
    """Say why the values of a series cannot be HU; "" if they can.

    Args:
        contents: of its slices; None for each that `judge_slice` refused.
    """
    if len(contents) < MIN_SLICES:
        return ""
    shown = [content for content in contents if content is not None and not content.is_plain]
    refused = sum(content is None for content in contents)
    if 2 * refused >= refused + len(shown) > 0:
        return f"{refused} of the series' {len(contents)} slices hold values that cannot be HU"
    if len(shown) < MIN_SLICES:
        return ""
    lacking = [
        kind
        for kind, most, least in (
            ("soft tissue (-150 to 150 HU)", max(one.soft for one in shown), MIN_SOFT),
            ("air (below -300 HU)", max(one.air for one in shown), MIN_AIR),
            ("bone (above 300 HU)", max(one.bone for one in shown), MIN_BONE),
        )
        if most < least
    ]
    if not lacking:
        return ""
    return f"no slice of the series shows {' or '.join(lacking)}; expected those of a head"


def content_of_reject(reject: RejectedFile) -> Content | None:
    """Return what a slice that was refused counts for in its series."""
    return None if reject.code == CODE else NOTHING


def implausible_rows(
    series: Sequence[str], contents: Sequence[Content | None]
) -> dict[int, tuple[str, str, str]]:
    """Find the slices of a table whose values cannot be HU, as their series shows.

    They are all slices of a series that shows no head; and those with a little of what is wrapped
    air in other slices of their series (a zoomed slice may lack the air that tells it from metal).

    Args:
        series: of each slice; the slices of a series lie together.
        contents: of each slice, or `content_of_reject`.

    Returns:
        Row of each such slice -> reject code, detail and hint.
    """
    found: dict[int, tuple[str, str, str]] = {}
    first = 0
    for _, group in itertools.groupby(series):
        rows = range(first, first + sum(1 for _ in group))
        said = judge_series([contents[row] for row in rows])
        if said:
            found |= dict.fromkeys(rows, (CODE, said, ""))
        else:
            found |= dict.fromkeys(_doubtful(rows, contents), (CODE, _WRAPPED, EXPORT_AGAIN))
        first = rows.stop
    return found


def _doubtful(rows: range, contents: Sequence[Content | None]) -> list[int]:
    """Return the rows of a series that may be wrapped, if others of it were."""
    read = {row: content for row in rows if (content := contents[row]) is not None}
    if not any(content.is_repaired for content in read.values()):
        return []
    return [row for row, content in read.items() if content.may_be_wrapped]


def _sample(hu: np.ndarray) -> np.ndarray:
    """Return values of a grid of pixels within the disc; int16."""
    step = max(1, min(hu.shape) // SAMPLED_SIDE)
    grid = hu[::step, ::step]
    return grid.ravel().take(_disc(*grid.shape))


@functools.cache
def _bin_of_value() -> np.ndarray:
    """Return the bin of each value of int16, by the same bits read as uint16."""
    values = np.arange(2**16, dtype=np.uint16).view(np.int16)
    return (np.clip(values, _LOWEST, _HIGHEST - 1).astype(np.intp) - _LOWEST) // _BIN_HU


@functools.lru_cache(maxsize=8)
def _disc(rows: int, columns: int) -> np.ndarray:
    """Return which pixels of an image lie within the disc; flat indices."""
    row, column = np.ogrid[:rows, :columns]
    distance = np.hypot((row + 0.5) / rows - 0.5, (column + 0.5) / columns - 0.5)
    return np.flatnonzero(distance <= _DISC_RADIUS)


def _between(below: np.ndarray, low: int, high: int) -> float:
    return float(below[(high - _LOWEST) // _BIN_HU] - below[(low - _LOWEST) // _BIN_HU])


def _fullest(windows: np.ndarray, low: int, high: int) -> tuple[float, int]:
    """Return the largest share in a window, and its centre, of those with centres in a range."""
    first, stop = ((hu - _LOWEST - _HALF_WINDOW_HU) // _BIN_HU for hu in (low, high + _BIN_HU))
    place = first + int(np.argmax(windows[first:stop]))
    return float(windows[place]), _LOWEST + _BIN_HU * place + _HALF_WINDOW_HU


def _misplaced(windows: np.ndarray, air: float) -> str:
    """Say where a tissue seems to lie that cannot lie there."""
    limits = [(300, _HIGHEST, MAX_HIGH), (-680, -250, MAX_BETWEEN)]
    if air < MIN_AIR:
        limits.append((850, _HIGHEST, MAX_DENSE_WITHOUT_AIR))
    for low, high, most in limits:
        share, centre = _fullest(windows, low, high)
        if share > most:
            return f"{share:.0%} of the slice lie around {centre} HU"
    return ""


def _too_low(values: np.ndarray) -> str:
    """Say how much is below what CT measures; two padding values, each exact, do not count."""
    low = values[values < LOW_HU]
    if not low.size:
        return ""
    _, counts = np.unique(low, return_counts=True)
    share = (low.size - np.sort(counts)[-2:].sum()) / values.size
    if share > MAX_LOW or (share > MAX_LOW_WITHOUT_METAL and values.max() < _METAL_HU):
        return f"{share:.1%} of the slice lie below {LOW_HU} HU, down to {low.min()} HU"
    return ""


def _no_tissue(below: np.ndarray, soft: float) -> str:
    """Say what an object consists of that has no soft tissue."""
    body = _between(below, -500, _HIGHEST)
    if body < MIN_OBJECT:
        return ""
    near_soft = _between(below, -160, 160)
    if soft < MIN_SOFT_OF_OBJECT * body and near_soft < MIN_NEAR_SOFT_OF_OBJECT * body:
        return f"{body:.0%} of the slice lie above -500 HU, and {near_soft:.1%} within 160 HU of 0"
    if _between(below, 0, _HIGHEST) < MIN_POSITIVE:
        return f"{body:.0%} of the slice lie above -500 HU, and nothing above 0 HU"
    return ""
