"""Do heat maps point at the bleed? Measured on phantoms, which carry masks.

One network per view is trained on phantoms. Its maps of other phantoms are scored against the
masks, slice by slice, beside chance and beside the brightest voxels inside the skull.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from ich_keras.ct.head import head_mask
from ich_keras.data.inputs import resize_hu
from ich_keras.errors import UsageError
from ich_keras.explanation import explain_series
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import ANY, LABELS
from ich_keras.map_checks import agreement, randomised
from ich_keras.metrics.intervals import bootstrap
from ich_keras.metrics.localisation import near, pixel_precision, pointing_hit, share_found
from ich_keras.phantom.plan import MIN_AREA_MM2, Phantom, make_phantom, plan_phantoms
from ich_keras.prediction_samples import inputs_of, series_samples
from ich_keras.progress import Tell
from ich_keras.recipe import Recipe
from ich_keras.relevance import MapOptions
from ich_keras.run_folder import RunFolder

TOLERANCE_MM = 5.0
# What is brighter than blood ever is: bone, calcification, metal.
TOO_BRIGHT_HU = 100
SMOOTHING_MM = 2.0
# Nearer to the skull, a voxel is partly bone.
RIM_MM = 3.0
NUM_SERIES, SEED = 80, 7000
MATRIX, SPACING_MM = 128, (8.0, 11.0)
BRIGHTEST = "brightest voxels"
METRICS = ("hit", "share", "precision")
CHECKED_SERIES = 6  # compared with random weights


@dataclass(frozen=True)
class Network:
    """A network that is trained for this question.

    Args:
        preset, slices, size: see `RunConfig`.
        epochs, batch_size, learning_rate: of its training.
    """

    preset: str
    size: int
    epochs: int
    batch_size: int
    learning_rate: float = 1e-3
    slices: int | None = None


# Small enough for two cores and twenty minutes in all.
NETWORKS: dict[str, Network] = {
    "slice": Network("resnet10_2d", size=80, epochs=5, batch_size=32),
    "slab": Network("resnet10_3d_slab", size=48, epochs=2, batch_size=16, slices=3),
    "series": Network("resnet10_3d", size=64, epochs=12, batch_size=8, slices=12),
}
TRAINING_SERIES, TRAINING_SEED, CACHE_SIZE = 600, 0, 96

# The last features, on which gradcam and hirescam agree; earlier ones, with more cells.
OPTIONS = (
    MapOptions("hirescam", "layer4"),
    MapOptions("gradcam", "layer3"),
    MapOptions("hirescam", "layer3"),
    MapOptions("hirescam", "layer2"),
    MapOptions("integrated-gradients", steps=8),
)


def name_of(options: MapOptions) -> str:
    """Return how tables call a method.

    >>> name_of(MapOptions("hirescam", "layer3")), name_of(MapOptions("integrated-gradients"))
    ('hirescam layer3', 'integrated-gradients')
    """
    if options.method == "integrated-gradients":
        return options.method
    return f"{options.method} {options.layer}"


def train_networks(work: Path, tell: Tell) -> dict[str, Path]:
    """Draw phantoms and train a network for each view; what is finished is taken as it is.

    Returns:
        View -> run folder.
    """
    from ich_keras.config import DataConfig, FitConfig, RunConfig
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.phantom.dicom import IMAGES, LABELS_CSV, write_phantoms
    from ich_keras.training import train
    from ich_keras.workflow import cache_dicom

    cache_dir, phantoms = work / "cache", work / "phantoms"
    if not cache_dir.is_dir():
        if not phantoms.is_dir():
            tell(f"Drawing {TRAINING_SERIES} phantoms.")
            write_phantoms(
                phantoms,
                TRAINING_SERIES,
                TRAINING_SEED,
                matrix=MATRIX,
                slice_spacing_mm=SPACING_MM,
            )
        cache_dicom(phantoms / IMAGES, phantoms / LABELS_CSV, cache_dir, CACHE_SIZE)
    cache = CTCache.open(cache_dir)
    runs = {}
    for view, network in NETWORKS.items():
        run = RunFolder(work / f"run-{view}")
        if not run.is_finished:
            tell(f"Training {network.preset} on {view}.")
            config = RunConfig(
                preset=network.preset,
                data=DataConfig(
                    size=network.size,
                    view=view,
                    slices=network.slices,
                    balance=True,
                    augment="flip",
                    intensity="windows",
                ),
                fit=FitConfig(
                    batch_size=network.batch_size,
                    epochs=network.epochs,
                    learning_rate=network.learning_rate,
                    schedule="cosine",
                    warmup_steps=20,
                    accumulate=1,
                ),
            )
            train(config, cache, run.path, tell=tell)
        runs[view] = run.path
    return runs


def runs_by_view(runs: Sequence[Path]) -> dict[str, Path]:
    """Return finished runs by what they see: slice, slab or series.

    Raises:
        UsageError: two runs have one view.
        StaleError: a run is not finished.
    """
    found: dict[str, Path] = {}
    for path in runs:
        view = RunFolder.at(path).require_finished().recipe().inputs.view.kind
        if view in found:
            raise UsageError(f"{found[view]} and {path} both see {view}.", "Give one of them.")
        found[view] = path
    return found


def scored_phantoms(count: int = NUM_SERIES) -> Iterator[Phantom]:
    """Draw the phantoms that are scored; no training has seen their patients."""
    for spec in plan_phantoms(count, SEED, MATRIX, slice_spacing_mm=SPACING_MM):
        yield make_phantom(spec)


def brightest(phantom: Phantom) -> np.ndarray:
    """Score voxels by how bright they are: float32 (slices, rows, columns).

    HU are smoothed within each slice by a Gaussian of `SMOOTHING_MM`, over the voxels inside the
    skull (by the phantom's own mask), at least `RIM_MM` from it, that are not brighter than
    `TOO_BRIGHT_HU`. All others score lowest.
    """
    _, row_mm, column_mm = phantom.spacing_mm
    sigma = SMOOTHING_MM / row_mm
    scores = np.full(phantom.hu.shape, -1000, np.float32)
    beside = [near(~inside, row_mm, column_mm, RIM_MM) for inside in phantom.mask("cavity")]
    cavity = ~np.stack(beside) & (phantom.hu <= TOO_BRIGHT_HU)
    for hu, inside, out in zip(phantom.hu, cavity, scores, strict=True):
        weight = inside.astype(np.float32)
        total = cv2.GaussianBlur(np.where(inside, hu, 0).astype(np.float32), (0, 0), sigma)
        weight = cv2.GaussianBlur(weight, (0, 0), sigma)
        out[inside] = (total / np.maximum(weight, 1e-6))[inside]
    return scores


def masks_of(phantom: Phantom) -> dict[str, np.ndarray]:
    """Return label -> bool (slices, rows, columns), for the labels that the series has."""
    masks = {name: phantom.mask(name) for name in phantom.spec.subtypes}
    if masks:
        masks[ANY] = np.logical_or.reduce(list(masks.values()))
    return masks


def scores_of(
    phantom: Phantom, maps: Mapping[str, np.ndarray], head: np.ndarray
) -> list[dict[str, Any]]:
    """Score maps of a series: on every slice that has their label, and on the series as a whole.

    Args:
        phantom: with masks.
        maps: label -> float (slices, rows, columns).
        head: bool (slices, rows, columns); what scores are ranked in.

    Returns:
        Rows: label, level ("slice" or "series"), slice (-1 of a series), each of `METRICS`, and
        what chance achieves: chance_hit, chance_share.
    """
    rows = []
    _, row_mm, column_mm = phantom.spacing_mm
    for label, mask in masks_of(phantom).items():
        shown = np.flatnonzero(mask.sum(axis=(1, 2)) * row_mm * column_mm >= MIN_AREA_MM2)
        if label not in maps or not len(shown):
            continue
        target = np.stack([near(one, row_mm, column_mm, TOLERANCE_MM) for one in mask])
        for number in (*shown, -1):
            place = slice(None) if number < 0 else int(number)
            region = head[place] | mask[place]
            scores = maps[label][place]
            rows.append(
                {
                    "label": label,
                    "level": "series" if number < 0 else "slice",
                    "slice": int(number),
                    "hit": pointing_hit(scores, target[place], region),
                    "share": share_found(scores, mask[place], region),
                    "precision": pixel_precision(scores, mask[place], region),
                    "chance_hit": float(target[place][region].mean()),
                    "chance_share": float(mask[place][region].mean()),
                }
            )
    return rows


def answers_of(loaded: tuple[Recipe, Any], phantom: Phantom) -> np.ndarray:
    """Return a run's probabilities of a series: float32 (samples, labels)."""
    recipe, model = loaded
    samples = series_samples(recipe.inputs.view, phantom.hu.shape, phantom.spacing_mm)
    resized = np.stack([resize_hu(image, recipe.inputs.cache_size) for image in phantom.hu])
    chosen = np.arange(len(samples))
    return probabilities(model, [inputs_of(resized, samples, chosen, recipe.inputs)], len(samples))


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of one network.

    Args:
        rows: label, level, slice, series, patient, method, and the scores of `scores_of`.
        aurocs: label -> {"value", "low", "high"}: what the network knows of the same phantoms.
        agreements: series, label, method, part, rho: maps against those of random weights.
        recipe: of the run.
    """

    rows: pd.DataFrame
    aurocs: dict[str, dict]
    agreements: pd.DataFrame
    recipe: Recipe

    def is_judged(self, label: str) -> bool:
        """Whether the network finds a label at all: AUROC's interval lies above .5."""
        low = self.aurocs[label]["low"]
        return low is not None and low > 0.5


def measure(run: Path, phantoms: Sequence[Phantom], tell: Tell) -> Measured:
    """Score a run's maps of phantoms.

    Args:
        run: finished, with RSNA's six labels.
        phantoms: with and without bleeds, that it has not seen.
        tell: called with one line per method.

    Raises:
        UsageError: the run has other labels.
    """
    loaded = load_run(run, precision="float32")
    recipe = loaded[0]
    if recipe.labels.names != LABELS:
        raise UsageError(f"{run} answers {recipe.labels}; expected RSNA's six labels.")
    bleeding = [phantom for phantom in phantoms if phantom.spec.subtypes]
    heads = [head_mask(p.hu, *p.spacing_mm[1:]) for p in bleeding]
    rows = []
    for options in OPTIONS:
        tell(f"{recipe.inputs.view.kind}: {name_of(options)}")
        for phantom, head in zip(bleeding, heads, strict=True):
            labels = [*phantom.spec.subtypes, ANY]
            maps = explain_series(loaded, phantom.hu, phantom.spacing_mm, labels, options).values
            rows += _named(scores_of(phantom, maps, head), phantom, name_of(options))
    for phantom, head in zip(bleeding, heads, strict=True):
        bright = dict.fromkeys((*phantom.spec.subtypes, ANY), brightest(phantom))
        rows += _named(scores_of(phantom, bright, head), phantom, BRIGHTEST)
    return Measured(
        pd.DataFrame(rows), _aurocs(loaded, phantoms), _agreements(loaded, bleeding, heads), recipe
    )


def _named(rows: list[dict], phantom: Phantom, method: str) -> list[dict]:
    spec = phantom.spec
    return [{"method": method, "series": spec.series, "patient": spec.patient} | r for r in rows]


def _aurocs(loaded: tuple[Recipe, Any], phantoms: Sequence[Phantom]) -> dict[str, dict]:
    truth, values, patients = [], [], []
    for phantom in phantoms:
        answers, labels = answers_of(loaded, phantom), phantom.labels()
        if len(answers) == 1:
            labels = labels.max(axis=0, keepdims=True)
        truth.append(labels)
        values.append(answers)
        patients += [phantom.spec.patient] * len(answers)
    found = bootstrap(np.concatenate(truth), np.concatenate(values), patients)
    return {label: found[f"auroc/{label}"] for label in LABELS}


def _agreements(
    loaded: tuple[Recipe, Any], phantoms: Sequence[Phantom], heads: Sequence[np.ndarray]
) -> pd.DataFrame:
    rows = []
    others = {part: randomised(loaded, part) for part in ("head", "all")}
    pairs = list(zip(phantoms, heads, strict=True))[:CHECKED_SERIES]
    for options in OPTIONS:
        signed = replace(options, signed=True)
        for phantom, head in pairs:
            where = (phantom.hu, phantom.spacing_mm, ANY, signed)
            own = explain_series(loaded, *where)
            for part, other in others.items():
                rho = agreement(own, explain_series(other, *where), head)[ANY]
                rows.append(
                    {
                        "method": name_of(options),
                        "part": part,
                        "series": phantom.spec.series,
                        "rho": rho,
                    }
                )
    return pd.DataFrame(rows)
