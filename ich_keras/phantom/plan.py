"""Synthetic head CT with known bleeds of all five subtypes: images, masks and labels.

Phantoms exercise the whole workflow from DICOM to a trained model without patient data. They are
synthetic: nothing measured on them says anything about real heads. Counting bright voxels is not
enough: every head has its own offset, noise, dura, sinuses, dense vessels, calcifications, streaks
and bright ring under the skull, whether it bleeds or not.

`head` is the anatomy, `bleeds` the blood; `brain` and `skull` draw them, `scan` is the scanner,
`dicom` writes the files. A slice has a label where that mask covers at least `MIN_AREA_MM2`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from ich_keras.errors import UsageError
from ich_keras.labels import ANY, LABELS, SUBTYPES
from ich_keras.phantom.bleeds import Bleed, draw_bleed
from ich_keras.phantom.brain import MASK_BITS, MIN_AREA_MM2
from ich_keras.phantom.head import Head, draw_head
from ich_keras.phantom.scan import Scan, draw_scan, scan_slice


@dataclass(frozen=True)
class Encoding:
    """How HU are stored in a file.

    Args:
        bits_stored: 12 or 16 (DICOM 0028,0101).
        is_signed: pixel representation (0028,0103).
        intercept: rescale intercept (0028,1052); the slope is 1.
        padding_hu: value outside the scanner's field of view.
        low_hu, high_hu: what can be stored without loss.
    """

    bits_stored: int
    is_signed: bool
    intercept: int
    padding_hu: int
    low_hu: int
    high_hu: int


# Source of the first four: 78,545 headers of the RSNA 2019 data set. The last one is the known
# fault of that set: values below zero have wrapped around at 4096.
ENCODINGS = {
    "signed-16": Encoding(16, True, -1024, -3024, -3024, 31743),
    "unsigned-12": Encoding(12, False, -1024, -1024, -1024, 3071),
    "signed-12": Encoding(12, True, 0, -2000, -2048, 2047),
    "unsigned-12-at-1000": Encoding(12, False, -1000, -1000, -1000, 3095),
    "wrapped-12": Encoding(12, False, 0, -1000, -1000, 3095),
}
# Series of RSNA 2019 with each finding, among 1,350 (the thesis's validation set of whole series).
RSNA_SERIES = 1350
RSNA_POSITIVE_SERIES = dict(zip(LABELS, (22, 329, 240, 262, 224, 538), strict=True))
# How bleeds are distributed over patients -> the default share of patients that bleed.
MIXES = {"even": 0.5, "rsna": round(RSNA_POSITIVE_SERIES[ANY] / RSNA_SERIES, 2)}
_MOST_PER_PATIENT = 8  # series; the mean is at most half of it, so that the cut shows nowhere
_MOST_SERIES = 10**6  # of a data set; RSNA 2019 has about 21,700
_ENCODING_PERIOD = 100  # of this many series in a row, four have a rare encoding


@dataclass(frozen=True)
class PhantomSpec:
    """What one series shows; everything else follows from the seed.

    Args:
        seed: of the data set.
        patient: number of the patient: same head and same bleeds for all series.
        series: number of the series within the data set: own pose, noise and spacing.
        subtypes: the patient's bleeds, one each; empty for none.
        encoding: key of `ENCODINGS`.
        matrix: rows and columns of a slice.
        slice_spacing_mm: lowest and highest distance of slices along the table.
    """

    seed: int
    patient: int = 0
    series: int = 0
    subtypes: tuple[str, ...] = ()
    encoding: str = "signed-16"
    matrix: int = 512
    slice_spacing_mm: tuple[float, float] = (5.0, 8.0)

    def __post_init__(self) -> None:
        unknown = [name for name in self.subtypes if name not in SUBTYPES]
        if unknown:
            raise UsageError(f"unknown subtype {unknown[0]!r}.", f"Known: {', '.join(SUBTYPES)}.")
        if self.encoding not in ENCODINGS:
            raise UsageError(
                f"unknown encoding {self.encoding!r}.", f"Known: {', '.join(ENCODINGS)}."
            )
        if not 32 <= self.matrix <= 2048:
            raise UsageError(f"matrix is {self.matrix}; expected at least 32, at most 2048.")
        low, high = self.slice_spacing_mm
        if not 0.5 <= low <= high <= 20:
            raise UsageError(
                f"slice spacing is {low} to {high} mm; expected 0.5 <= lowest <= highest <= 20."
            )


@dataclass(frozen=True)
class Phantom:
    """One synthetic series.

    Args:
        spec: what was asked for.
        hu: int16 (slices, rows, columns), HU, inferior to superior, as the encoding can hold it.
        masks: uint8 (slices, rows, columns), bit k for `MASK_BITS[k]`.
        scan: geometry and image quality.
        bleeds: what was drawn, in the head frame.
    """

    spec: PhantomSpec
    hu: np.ndarray
    masks: np.ndarray
    scan: Scan
    bleeds: tuple[Bleed, ...]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distances between slices, rows and columns."""
        return (self.scan.slice_spacing_mm, self.scan.pixel_mm, self.scan.pixel_mm)

    def mask(self, name: str) -> np.ndarray:
        """Return the mask of a subtype, "ventricles" or "cavity": bool (slices, rows, columns)."""
        return (self.masks >> MASK_BITS.index(name)) & 1 == 1

    def labels(self) -> np.ndarray:
        """Return the labels: int8 (slices, 6) in the order of `labels.LABELS`."""
        pixels = np.stack([self.mask(name).sum(axis=(1, 2)) for name in SUBTYPES], axis=1)
        subtypes = pixels * self.scan.pixel_mm**2 >= MIN_AREA_MM2
        return np.hstack([subtypes, subtypes.any(axis=1, keepdims=True)]).astype(np.int8)

    def volume_ml(self, name: str) -> float:
        """Return the volume of a mask in this series."""
        return self._ml(self.mask(name))

    @property
    def bleed_ml(self) -> float:
        """The volume of all bleeds in this series; a voxel of several subtypes counts once."""
        return self._ml(self.masks & sum(1 << MASK_BITS.index(name) for name in SUBTYPES) != 0)

    def _ml(self, mask: np.ndarray) -> float:
        voxel_mm3 = self.scan.pixel_mm**2 * self.scan.slice_spacing_mm
        return float(mask.sum() * voxel_mm3 / 1000)


def plan_phantoms(
    num_series: int,
    seed: int,
    matrix: int = 512,
    prevalence: float | None = None,
    slice_spacing_mm: tuple[float, float] = (5.0, 8.0),
    mix: str = "even",
    series_per_patient: float = 1.3,
) -> list[PhantomSpec]:
    """Plan a data set: which patient has which series and which bleeds.

    With the even mix the bleeding patients take turns: each of the five subtypes is the main one
    of every fifth. Each other subtype is added with probability 1/4, so a bleeding patient has two
    subtypes on average. With RSNA's mix, subtypes are drawn independently, as often as in the
    bleeding series of that data set.

    Args:
        num_series: how many series.
        seed: of the data set.
        matrix: rows and columns of a slice.
        prevalence: share of patients that bleed; None takes 0.5, or 0.4 with RSNA's mix.
        slice_spacing_mm: lowest and highest distance of slices.
        mix: "even" or "rsna".
        series_per_patient: on average, 1 to 4; series of a patient show the same head and the
            same bleeds in other poses, and so leak across splits that do not keep patients whole.
    """
    if mix not in MIXES:
        raise UsageError(f"mix {mix!r}; expected one of {', '.join(MIXES)}.")
    prevalence = MIXES[mix] if prevalence is None else prevalence
    if not 1 <= num_series <= _MOST_SERIES:
        raise UsageError(
            f"{num_series} series asked for; expected at least 1, at most {_MOST_SERIES:,}."
        )
    if not 0 <= prevalence <= 1:
        raise UsageError(f"prevalence is {prevalence}; expected 0 to 1.")
    if not 1 <= series_per_patient <= _MOST_PER_PATIENT / 2:
        raise UsageError(
            f"{series_per_patient} series per patient; expected 1 to {_MOST_PER_PATIENT // 2} on"
            " average."
        )
    if seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more.")
    rng = np.random.default_rng(np.random.SeedSequence([seed, num_series]))
    main_subtypes = rng.permutation(SUBTYPES)
    specs: list[PhantomSpec] = []
    patient = bleeders = 0
    while len(specs) < num_series:
        subtypes: tuple[str, ...] = ()
        if math.floor((patient + 1) * prevalence) > math.floor(patient * prevalence):
            main = main_subtypes[bleeders % len(SUBTYPES)]
            subtypes = _draw_even(main, rng) if mix == "even" else _draw_as_rsna(rng)
            bleeders += 1
        for _ in range(1 + min(rng.poisson(series_per_patient - 1), _MOST_PER_PATIENT - 1)):
            rare = len(specs) % _ENCODING_PERIOD
            encoding = list(ENCODINGS)[rare if rare < len(ENCODINGS) else 0]
            specs.append(
                PhantomSpec(seed, patient, len(specs), subtypes, encoding, matrix, slice_spacing_mm)
            )
        patient += 1
    return specs[:num_series]


def _draw_even(main: str, rng: np.random.Generator) -> tuple[str, ...]:
    chosen = {main} | {name for name in SUBTYPES if rng.random() < 0.25}
    return tuple(name for name in SUBTYPES if name in chosen)


def _draw_as_rsna(rng: np.random.Generator) -> tuple[str, ...]:
    # Draws without any bleed are drawn again, which raises all shares alike: by 1 / (1 - none).
    shares = np.array([RSNA_POSITIVE_SERIES[name] for name in SUBTYPES])
    shares = shares / RSNA_POSITIVE_SERIES[ANY]
    chances = shares
    for _ in range(50):
        chances = shares * (1 - np.prod(1 - chances))
    while True:
        drawn = rng.random(len(chances)) < chances
        if drawn.any():
            return tuple(name for name, is_in in zip(SUBTYPES, drawn, strict=True) if is_in)


def make_phantom(spec: PhantomSpec) -> Phantom:
    """Draw one series; the same spec gives the same numbers.

    Args:
        spec: patient, series, bleeds, encoding and size.

    >>> phantom = make_phantom(PhantomSpec(seed=3, subtypes=("subdural",), matrix=64))
    >>> phantom.hu.dtype.name, phantom.mask("subdural").shape == phantom.hu.shape
    ('int16', True)
    """
    of_patient = np.random.default_rng(np.random.SeedSequence([spec.seed, spec.patient]))
    of_series = np.random.default_rng(
        np.random.SeedSequence([spec.seed, spec.patient, spec.series])
    )
    head, bleeds = draw_patient(spec.subtypes, of_patient)
    scan = draw_scan(head, spec.matrix, spec.slice_spacing_mm, of_series)
    num_slices = len(scan.origin)
    hu = np.empty((num_slices, spec.matrix, spec.matrix), np.int16)
    masks = np.zeros(hu.shape, np.uint8)
    for index in range(num_slices):
        image = scan_slice(head, bleeds, scan, index, masks[index], of_series)
        hu[index] = _digitise(image, ENCODINGS[spec.encoding])
    return Phantom(spec, hu, masks, scan, bleeds)


def draw_patient(
    subtypes: tuple[str, ...], rng: np.random.Generator
) -> tuple[Head, tuple[Bleed, ...]]:
    """Draw a patient's head and bleeds; those with mass effect push the midline away."""
    head = draw_head(rng, "intraventricular" in subtypes)
    bleeds = tuple(draw_bleed(name, head, rng) for name in subtypes)
    shift_mm = -sum(bleed.side * bleed.push_mm for bleed in bleeds) * rng.uniform(0.5, 1.2)
    return replace(head, midline_shift_mm=float(np.clip(shift_mm, -14, 14))), bleeds


def _digitise(image: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Round to whole HU that the encoding can hold: float32 with NaN for padding -> int16."""
    filled = np.where(np.isnan(image), np.float32(encoding.padding_hu), np.maximum(image, -1024))
    return np.clip(np.rint(filled), encoding.low_hu, encoding.high_hu).astype(np.int16)
