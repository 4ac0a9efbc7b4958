"""Intensities: from windowed images to the numbers that enter a network, by value.

Worker processes import this module: it must not import keras.
"""

import math
from dataclasses import dataclass

import numpy as np

from ich_keras.ct.window import BONE, CT_RANGE, WIDE, WINDOWS, Window
from ich_keras.errors import UsageError


@dataclass(frozen=True)
class Normalisation:
    """Shift and scale of the stacked windows: (windows - mean) / std, per channel.

    Args:
        name: for records; has no effect on the numbers.
        mean, std: one value per channel, in units of the windows (0..1).
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class HeadZScore:
    """Shift and scale of each slice or volume by its own head's mean and deviation.

    Args:
        above_hu: what is denser than this is head (or holder), not air.
    """

    above_hu: float


# Source: the thesis's statistics of its three stacked windows (brain, subdural, soft tissue).
THESIS_NORMALISATION = Normalisation(
    "thesis", mean=(0.1738, 0.1433, 0.1970), std=(0.3161, 0.2850, 0.3111)
)
# Source: the thesis's 3D networks: (HU + 1000) / 1400, cut to 0..1, minus 0.25.
THESIS_WIDE_NORMALISATION = Normalisation("thesis wide", mean=(0.25,), std=(1.0,))
HU = "hu"
# Undoes the window: its ends and width are powers of two, so that whole HU stay exact in float32.
_HU_THEMSELVES = Normalisation(
    "none: HU", mean=(-CT_RANGE.low / CT_RANGE.width,), std=(1 / CT_RANGE.width,)
)
# Source: the thesis's three, and those of BONE in whole slices of a public series of a head (28
# slices of a GE scanner: 0.131 and 0.179; three slices of RSNA's: 0.133 and 0.183).
_BONE_NORMALISATION = Normalisation(
    "thesis, and bone",
    mean=(*THESIS_NORMALISATION.mean, 0.13),
    std=(*THESIS_NORMALISATION.std, 0.18),
)
HEAD_ABOVE_HU = -500  # what is denser than this is head (or holder), not air
HEAD_Z_SCORE = HeadZScore(HEAD_ABOVE_HU)


def normalise(
    windows: np.ndarray, normalisation: Normalisation = THESIS_NORMALISATION
) -> np.ndarray:
    """Shift and scale stacked windows, the last step before the network.

    Args:
        windows: float32 (..., channels), values 0..1.
        normalisation: one mean and standard deviation per channel.

    Returns:
        float32 of the same shape.

    >>> windows = np.array([[[0.5], [1.0]]], np.float32)
    >>> normalise(windows, Normalisation("own", mean=(0.5,), std=(0.25,))).tolist()
    [[[0.0], [2.0]]]
    """
    # By rows: numpy is slow along an axis of three.
    columns = math.prod(windows.shape[-2:-1])
    mean = np.tile(np.asarray(normalisation.mean, np.float32), columns)
    std = np.tile(np.asarray(normalisation.std, np.float32), columns)
    shifted = windows.reshape(*windows.shape[:-2], -1) - mean
    shifted /= std
    return shifted.reshape(windows.shape)


def head_z_score(
    grey: np.ndarray,
    is_volume: bool = False,
    window: Window = WIDE,
    above_hu: float = HEAD_Z_SCORE.above_hu,
) -> np.ndarray:
    """Shift and scale each slice, or volume, by the mean and standard deviation of its head.

    MedicalNet's networks were trained on volumes normalised like this, over the voxels that are
    not background. MedicalNet fills the background with noise of mean 0. Here it is 0 itself, so
    that the same image always gives the same answer.

    Args:
        grey: float32 (..., rows, columns, 1), windowed by `window`.
        is_volume: the axis before rows is that of the slices of one volume, which are taken
            together.
        window: the window that made `grey`.
        above_hu: what is denser than this is head, HU.

    Returns:
        float32 of the same shape; 0 outside the head, and everywhere if there is no head.

    Source:
        MedicalNet's reader (datasets/brains18.py): z-score over the voxels above 0.

    >>> hu = np.array([[-1000, 0, 100]], np.int16)
    >>> head_z_score(WIDE(hu)[..., np.newaxis])[0, 1:, 0].round(3).tolist()
    [-1.0, 1.0]
    """
    axes = (-4, -3, -2, -1) if is_volume else (-3, -2, -1)
    head = grey > (above_hu - window.low) / window.width
    count = np.maximum(head.sum(axes, keepdims=True), 1)
    mean = (grey * head).sum(axes, keepdims=True, dtype=np.float64) / count
    variance = (((grey - mean) ** 2) * head).sum(axes, keepdims=True) / count
    # A head with a single value has no spread: it equals its mean.
    spread = np.where(variance > 0, np.sqrt(variance), 1.0)
    return ((grey - mean) / spread * head).astype(np.float32)


@dataclass(frozen=True)
class Intensity:
    """From HU to the numbers that enter a network, by value.

    Args:
        name: a key of `INTENSITIES`, or a name of your own.
        windows: one channel each, 0..1.
        normalisation: from the windows to the network's input.
        keeps_hu: the input is HU themselves, which augmentation moves, but whose contrast and
            brightness it leaves as they are.

    Raises:
        UsageError: the numbers of windows, means and deviations do not agree, or one of them
            cannot be used.

    >>> bone = Intensity("bone", (Window(600, 2800),), Normalisation("own", (0.3,), (0.2,)))
    >>> bone.channels
    1
    >>> Intensity.from_dict(bone.to_dict()) == bone
    True
    """

    name: str
    windows: tuple[Window, ...]
    normalisation: Normalisation | HeadZScore
    keeps_hu: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.normalisation, HeadZScore):
            expected, lengths = 1, [self.channels]
        else:
            expected = self.channels
            lengths = [len(self.normalisation.mean), len(self.normalisation.std)]
        if not self.windows or any(length != expected for length in lengths):
            raise UsageError(
                f"intensity {self.name!r} has {self.channels} window(s) and {self.normalisation};"
                " expected one mean and one deviation per window, and one window for a z-score."
            )
        if isinstance(self.normalisation, Normalisation):
            mean, std = self.normalisation.mean, self.normalisation.std
            if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
                raise UsageError(
                    f"intensity {self.name!r} has mean {mean} and deviation {std}; expected finite"
                    " numbers, and deviations above 0."
                )

    @property
    def is_windowed(self) -> bool:
        """Whether other windows change the input: not where they only frame what is scaled."""
        return not self.keeps_hu and isinstance(self.normalisation, Normalisation)

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return len(self.windows)

    def normalise(self, windows: np.ndarray, is_volume: bool) -> np.ndarray:
        """Turn windows into the network's input.

        Args:
            windows: float32 (..., rows, columns, channels), values 0..1.
            is_volume: whether the axis before rows holds the slices of one volume.

        Returns:
            float32 of the same shape.
        """
        if isinstance(self.normalisation, HeadZScore):
            return head_z_score(windows, is_volume, self.windows[0], self.normalisation.above_hu)
        return normalise(windows, self.normalisation)

    def to_dict(self) -> dict:
        """Return the intensity ready for JSON."""
        if isinstance(self.normalisation, HeadZScore):
            normalisation: dict = {"head_above_hu": self.normalisation.above_hu}
        else:
            normalisation = {
                "name": self.normalisation.name,
                "mean": list(self.normalisation.mean),
                "std": list(self.normalisation.std),
            }
        return {
            "name": self.name,
            "windows": [{"level": w.level, "width": w.width} for w in self.windows],
            "normalisation": normalisation,
            **({"keeps_hu": True} if self.keeps_hu else {}),
        }

    @classmethod
    def from_dict(cls, content: dict) -> "Intensity":
        """Read an intensity back from what `to_dict` returned.

        Raises:
            UsageError: something is missing or is not a number.
        """
        try:
            windows = tuple(Window(**entry) for entry in content["windows"])
            given = dict(content["normalisation"])
            normalisation: Normalisation | HeadZScore
            if set(given) == {"head_above_hu"}:
                normalisation = HeadZScore(float(given["head_above_hu"]))
            else:
                mean, std = (tuple(map(float, given.pop(key))) for key in ("mean", "std"))
                normalisation = Normalisation(mean=mean, std=std, **given)
            return cls(content["name"], windows, normalisation, bool(content.get("keeps_hu")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"intensity {content!r} cannot be used ({error}).",
                "Expected a name, windows (level and width in HU) and a normalisation.",
            ) from error


BONE_WINDOWS = "bone-windows"
INTENSITIES = {
    intensity.name: intensity
    for intensity in (
        Intensity("windows", WINDOWS, THESIS_NORMALISATION),
        Intensity("wide", (WIDE,), THESIS_WIDE_NORMALISATION),
        Intensity("head-z-score", (WIDE,), HEAD_Z_SCORE),
        # For networks that learn their windows.
        Intensity(HU, (CT_RANGE,), _HU_THEMSELVES, keeps_hu=True),
        Intensity(BONE_WINDOWS, (*WINDOWS, BONE), _BONE_NORMALISATION),
    )
}


# Measured on the training split (`ich_keras.data.foreground`); until then it has no values.
NNUNET = "nnunet"
UNMEASURED = Intensity(NNUNET, (WIDE,), Normalisation("not measured", (0.0,), (1.0,)))


def intensity_of(chosen: "str | Intensity") -> Intensity:
    """Look an intensity up by name; an `Intensity` is returned as it is.

    Raises:
        UsageError: unknown name.

    >>> intensity_of("wide").windows
    (Window(level=-300, width=1400),)
    """
    if isinstance(chosen, Intensity):
        return chosen
    if chosen == NNUNET:
        raise UsageError(
            f"intensity {NNUNET!r} has no values of its own: a training measures them on its data.",
            "Give that of a run: `RunFolder(RUN).recipe().inputs.intensity`.",
        )
    if chosen not in INTENSITIES:
        raise UsageError(f"intensity {chosen!r}; expected one of {', '.join(INTENSITIES)}.")
    return INTENSITIES[chosen]
