"""Whether a series is like those that a run was trained on: an out-of-domain score.

The pooled features of each sample (slice, slab or series; the layer before the head) are compared
with those of the training: their Mahalanobis distance, by the shrunk covariance of Ledoit and
Wolf. The score of a series is the mean over its samples, less that of the training series, in
standard deviations: those between series and, divided by its number of samples, those within them.
So a series of few slices, whose mean varies more, is judged no harder than a long one. The score
says nothing about bleeding, only that the network sees something new to it.

- The threshold comes from the validation patients, which the network was not fitted to. The p-value
  of a series is conformal: the share of them that score as high, with the new one counted among
  them. Each patient counts once, spread evenly over its series.
- From 99 validation patients on, a series is outside where its p-value is at most .01. About 1 % of
  series like those of the training are then flagged, too.
- With fewer patients the lowest p-value is above .01. The threshold is then the upper end of
  Student's prediction interval for one more patient, at the same level. It holds as far as scores
  are normally distributed; with two or three patients it is so high that hardly anything is
  outside.
- Inside is no proof. A single slice says little: real ones may pass by a network that was trained
  on phantoms, where a whole series does not.

Sources:
    Lee et al., A simple unified framework for detecting out-of-distribution samples and adversarial
    attacks (2018). Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance
    matrices (2004). The p-value: `ich_keras.metrics.conformal`.
"""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from ich_keras.ct.tables import patient_or_series
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.views import Samples, series_of_rows
from ich_keras.errors import StaleError
from ich_keras.files import atomic_path
from ich_keras.inference import batches_of, network_digest, probabilities, tapped
from ich_keras.metrics.conformal import patients_needed
from ich_keras.progress import Progress
from ich_keras.recipe import Recipe
from ich_keras.run_checksums import require_file_unchanged
from ich_keras.run_folder import RunFolder

INSIDE, OUTSIDE = "inside", "outside"
DISTANCE, VERDICT = "domain_distance", "domain"  # columns of series.csv
RATE = 0.01
MOST_SERIES = 300  # of the training split, and of the validation split
MOST_SAMPLES = 20  # of each training series
_LEAST_BETWEEN = 0.1  # of the variance of the series' means, for that between series
_NAMES = ("mean", "cholesky", "spread", "scores", "patients", "network")
_COPY = "Copy the original run folder again."
Distances = Callable[[np.ndarray], np.ndarray]
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Domain:
    """What the training series look like to the network of a run.

    Args:
        mean: float32 (features,), of the training samples.
        cholesky: float32 (features, features), lower factor of their covariance.
        spread: float32 (3,), of their Mahalanobis distances: the mean of the series' means,
            the variance between series, and that within them.
        scores: float32 (n,), ascending, the scores of the validation series.
        patients: int32 (n,), a number for each patient of these series.
        network: `network_digest` of the weights.
    """

    mean: np.ndarray
    cholesky: np.ndarray
    spread: np.ndarray
    scores: np.ndarray
    patients: np.ndarray
    network: str

    def distance(self, features: np.ndarray) -> float:
        """Return the score of a series, a float32 number in standard deviations.

        Args:
            features: (samples, features), of its slices or slabs, or its own; at least one row.
        """
        return self.score(self.sample_distances(features))

    def sample_distances(self, features: np.ndarray) -> np.ndarray:
        """Return the Mahalanobis distance of each sample, float64 (samples,)."""
        return mahalanobis(self.mean, self.cholesky, features)

    def score(self, distances: np.ndarray) -> float:
        """Return the score of a series from the distances of its samples."""
        of_series = distances.mean(keepdims=True)
        return float(_scores(of_series, np.array([len(distances)]), self.spread)[0])

    def p_value(self, distance: float) -> float:
        """Return the share of validation patients that score as high, the new one among them."""
        return float((1 + self._weights[self.scores >= distance].sum()) / (1 + self.num_patients))

    @property
    def _weights(self) -> np.ndarray:
        return 1 / np.bincount(self.patients)[self.patients]

    @property
    def num_patients(self) -> int:
        """The validation patients behind the threshold."""
        return len(np.unique(self.patients))

    @property
    def has_rate(self) -> bool:
        """Whether there are enough of them for p-values of at most `RATE`."""
        return self.num_patients >= patients_needed(RATE)

    def student_limit(self) -> float:
        """Return the upper end of Student's prediction interval for the score of a new patient."""
        from scipy.stats import t

        n, weights, scores = self.num_patients, self._weights, self.scores.astype(np.float64)
        mean = (weights * scores).sum() / n
        deviation = np.sqrt((weights * (scores - mean) ** 2).sum() / (n - 1))
        # The unit is the training series' deviation: less is luck of the few.
        deviation = max(deviation, 1.0)
        return float(mean + t.ppf(1 - RATE, n - 1) * deviation * np.sqrt(1 + 1 / n))

    def verdict(self, distance: float | None) -> str:
        """Return `INSIDE` or `OUTSIDE`; "" without a distance."""
        if distance is None:
            return ""
        if self.has_rate:
            is_outside = self.p_value(distance) <= RATE + 1e-9
        else:
            is_outside = distance > self.student_limit()
        return OUTSIDE if is_outside else INSIDE

    def save(self, path: Path) -> None:
        """Write it as .npz.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            arrays: dict[str, Any] = {name: getattr(self, name) for name in _NAMES}
            np.savez_compressed(stream, **arrays)

    @classmethod
    def load(cls, run: RunFolder, network: str) -> Self | None:
        """Read that of a run; None where it has none, as an unfinished or an older one.

        Args:
            run: its folder.
            network: `network_digest` of its weights.

        Raises:
            StaleError: it is damaged, lost, changed, or of another network.
        """
        path = run.domain_file
        if not run.is_finished:
            return None
        require_file_unchanged(run, path)
        if not path.is_file():
            return None
        try:
            # numpy leaves a damaged file open if it opens it itself.
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as content:
                arrays = [content[name] for name in _NAMES]
        # zipfile may take a flipped bit for encryption (RuntimeError) or an unknown method.
        except (
            OSError,
            EOFError,
            ValueError,
            KeyError,
            RuntimeError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise StaleError(f"{path} cannot be read ({error}).", _COPY) from error
        if why := _damage(*arrays):
            raise StaleError(f"{path} is damaged: {why}.", _COPY)
        if str(arrays[-1]) != network:
            raise StaleError(f"{path} is of another network than {run.best_weights}.", _COPY)
        mean, cholesky, spread, scores, patients, _ = arrays
        return cls(mean, cholesky, spread, scores, patients, network)


def _damage(*arrays: np.ndarray) -> str:
    """Say what is wrong with the arrays of a file; "" if nothing is."""
    mean, cholesky, spread, scores, patients, digest = arrays
    if digest.dtype.kind != "U" or digest.ndim:
        return "it does not say of which network it is"
    for name, one in zip(_NAMES, arrays[:4], strict=False):
        if one.dtype != np.float32 or not np.isfinite(one).all():
            return f"{name} does not hold finite float32 numbers"
    size = len(mean) if mean.ndim == 1 else 0
    if not size or cholesky.shape != (size, size):
        return f"mean {mean.shape} and cholesky {cholesky.shape} do not belong together"
    if not (np.diag(cholesky) > 0).all() or np.triu(cholesky, 1).any():
        return "cholesky is not the lower factor of a covariance"
    if spread.shape != (3,) or spread[1] <= 0 or spread[2] < 0:
        return "spread is not a mean and two variances"
    if scores.ndim != 1 or scores.shape != patients.shape or (np.diff(scores) < 0).any():
        return f"scores {scores.shape} are not ascending, one for each of patients {patients.shape}"
    if patients.dtype != np.int32 or len(np.unique(patients)) < 2:
        return "patients are not the numbers of at least two"
    if patients.min() < 0 or patients.max() >= len(patients):
        return "patients are not numbered from 0"
    return ""


def fit_domain(
    training: np.ndarray,
    owners: np.ndarray,
    network: str,
    validation: Callable[[Distances], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Domain | None:
    """Fit the score to training series, and give that of the validation series.

    Args:
        training: (n, features), of samples.
        owners: int (n,), the series of each, numbered from 0.
        network: `network_digest` of the weights.
        validation: called with a function from features (m, features) to their distances,
            float64 (m,); returns for each validation series the mean of the distances of its
            samples, their number, and its patient.

    Returns:
        The domain; None where there is nothing to measure by: fewer than two training series or
        validation patients, features that are all equal, or values that are not finite.
    """
    from sklearn.covariance import LedoitWolf

    if len(np.unique(owners)) < 2 or not np.isfinite(training).all():
        return None
    found = LedoitWolf().fit(training.astype(np.float64))
    try:
        cholesky = np.linalg.cholesky(found.covariance_).astype(np.float32)
    except np.linalg.LinAlgError:
        return None
    if not (np.diag(cholesky) > 0).all():
        return None
    mean = found.location_.astype(np.float32)
    distances = partial(mahalanobis, mean, cholesky)
    spread = _spread(distances(training), owners)
    if not (np.isfinite(spread).all() and spread[1] > 0):
        return None
    means, counts, patients = validation(distances)
    scores = _scores(means, counts, spread)
    order = np.argsort(scores, kind="stable")
    numbers = pd.factorize(np.asarray(patients)[order])[0].astype(np.int32)
    if len(np.unique(numbers)) < 2:
        return None
    return Domain(mean, cholesky, spread, scores[order], numbers, network)


def _spread(distances: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return mean, variance between and within series, float32 (3,): one-way random effects."""
    counts = np.bincount(owners)
    means = np.bincount(owners, distances) / counts
    within = ((distances - means[owners]) ** 2).sum() / max(1, len(distances) - len(counts))
    of_means = means.var(ddof=1)
    between = max(of_means - within * (1 / counts).mean(), _LEAST_BETWEEN * of_means)
    return np.array([means.mean(), between, within], np.float32)


def _scores(means: np.ndarray, counts: np.ndarray, spread: np.ndarray) -> np.ndarray:
    centre, between, within = spread.astype(np.float64)
    found = (means - centre) / np.sqrt(between + within / counts)
    return np.clip(found, -_LARGEST, _LARGEST).astype(np.float32)


def mahalanobis(mean: np.ndarray, cholesky: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return Mahalanobis distances, float64 (n,); what overflows is a large number."""
    from scipy.linalg import solve_triangular

    with np.errstate(all="ignore"):
        off = (np.asarray(features, np.float64) - mean).T
        whitened = solve_triangular(
            cholesky.astype(np.float64), off, lower=True, check_finite=False
        )
        found = np.sqrt((whitened**2).sum(axis=0))
    return np.minimum(np.nan_to_num(found, nan=_LARGEST, posinf=_LARGEST), _LARGEST)


def domain_of(
    run: RunFolder, recipe: Recipe, model: Any, cache: CTCache, progress: Progress | None = None
) -> Domain | None:
    """Compute the domain of a training from its training and validation series.

    The network sees `MOST_SAMPLES` samples, evenly spaced, of at most `MOST_SERIES` training
    series, and as many whole validation series. They are drawn by the seed of the training.

    Args:
        run: with its split.
        recipe, model: from `load_network`.
        cache: of the training.
        progress: called as progress("features of <split>", done, total).

    Returns:
        The domain; None where the split cuts series apart, and as `fit_domain` returns it.
    """
    split, samples = run.split(), recipe.inputs.samples(cache)
    parts = {}
    for part in ("train", "valid"):
        rows = split.indices(cache.slices, part, recipe.labels)
        numbers, is_cut = series_of_rows(cache.slices, rows, recipe.labels)
        if is_cut.any():
            return None
        if len(numbers) > MOST_SERIES:
            random = np.random.default_rng(recipe.training.seed)
            numbers = np.sort(random.choice(numbers, MOST_SERIES, replace=False))
        parts[part] = _samples_of(samples, cache, numbers)

    def seen(part: str, chosen: np.ndarray, take: Callable[[np.ndarray], None]) -> None:
        batches = batches_of(recipe, cache, samples, chosen)
        step = f"features of {part}"
        probabilities(model, batches, len(chosen), progress, step, tap=tapped(model), take=take)

    chosen, owners = _thinned(*parts["train"])
    training: list[np.ndarray] = []
    seen("train", chosen, training.append)

    def validation(distances: Distances) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found: list[np.ndarray] = []
        chosen, of = parts["valid"]
        seen("valid", chosen, lambda features: found.append(distances(features)))
        numbers, own, counts = np.unique(of, return_inverse=True, return_counts=True)
        means = np.bincount(own, np.concatenate(found)) / counts
        return means, counts, patient_or_series(cache.series.iloc[numbers]).to_numpy()

    _, own = np.unique(owners, return_inverse=True)
    return fit_domain(np.concatenate(training), own, network_digest(model), validation)


def _samples_of(
    samples: Samples, cache: CTCache, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the usable samples of some series, with or without a label, and whose each is."""
    if samples.view.kind == "series":
        chosen = numbers[samples.usable[numbers]]
        return chosen, chosen
    every = pd.factorize(cache.slices["series_uid"])[0]
    chosen = np.flatnonzero(np.isin(every, numbers) & samples.usable)
    return chosen, every[chosen]


def _thinned(chosen: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave `MOST_SAMPLES` of each series, evenly spaced."""
    kept = []
    for rows in pd.Series(owners).groupby(owners).indices.values():
        count = min(len(rows), MOST_SAMPLES)
        kept.append(rows[np.linspace(0, len(rows) - 1, count).round().astype(int)])
    rows = np.concatenate(kept)
    return chosen[rows], owners[rows]


def domain_columns(domain: Domain | None, distances: list[float | None]) -> dict[str, Any]:
    """Return the columns that series.csv gets: distance and verdict, empty without a domain."""
    verdicts = ["" if domain is None else domain.verdict(one) for one in distances]
    return {
        DISTANCE: np.array([np.nan if one is None else one for one in distances], np.float32),
        VERDICT: np.array(verdicts, object),
    }
