"""From stored predictions to numbers: means over seeds, intervals, differences of paired models.

A number is the mean of the seeds' metrics: each seed's model is scored on its own test patients,
and rows of two models are never ranked together. For intervals, patients are drawn with
replacement, once for all seeds; a patient in the test sets of several seeds is drawn in each. The
range over seeds is reported as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.convention import thesis_metrics
from experiments.results import Result, load_results
from experiments.scales import SCALES
from ich_keras.errors import DataError, StaleError
from ich_keras.labels import LABELS, SIX
from ich_keras.metrics.aggregation import DEFAULT_RULE, aggregate, head_of
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
from ich_keras.metrics.intervals import RESAMPLES, mean_bootstrap, mean_paired_bootstrap
from ich_keras.metrics.smoothing import smooth

LEVELS = ("slice", "series")
# The kernel that shows what neighbours tell about a slice; one for all runs, chosen by no result.
CONTROL = "0.2 0.6 0.2"
# Tolerance of metrics. Results stored before 2026-11-27 have probabilities with six decimals,
# which changes a log loss of `small` by up to 2e-4; later results agree far better.
_ROUNDING = 1e-3
# The thesis's names of its metrics -> ours.
THESIS_NAMES = {
    "loss": "log_loss",
    "accuracy": "exact_match",
    "hamming_loss": "hamming_loss",
    "hamming_score": "hamming_score",
    "precision": "precision",
    "f1": "f1",
    "recall": "recall",
    "specificity": "specificity",
}
# Its batch sizes, over which it averaged.
THESIS_BATCH = {view: fitting.batch_size for view, fitting in SCALES["rsna"].fittings.items()}


@dataclass(frozen=True, eq=False)
class Scored:
    """Predictions of a model for named samples.

    Args:
        names: index (n,) of UIDs, without duplicates.
        patients: int (n,).
        truth: int (n, 6).
        values: float (n, 6), probabilities.
    """

    names: pd.Index
    patients: np.ndarray
    truth: np.ndarray
    values: np.ndarray

    def of(self, names: pd.Index) -> "Scored":
        """Return the samples with the given names, in the order of the names.

        Raises:
            DataError: a name is missing.
        """
        rows = self.names.get_indexer(names)
        if (rows < 0).any():
            raise DataError(
                f"{(rows < 0).sum()} of {len(names)} samples were not scored; the first is"
                f" {names[rows < 0][0]}.",
                "Compare models on the same split.",
            )
        return Scored(names, self.patients[rows], self.truth[rows], self.values[rows])


def scored(result: Result, level: str) -> Scored | None:
    """Return a run's test predictions at a level; None where it has none.

    Slices become series by the rule that the run chose on its validation split; that of a sequence
    head may be its own answer.
    """
    table = result.predictions
    values, truth = table[list(LABELS)].to_numpy(), table[list(TRUTH_COLUMNS)].to_numpy()
    patients = table["patient"].to_numpy()
    if level == "slice":
        if result.is_series:
            return None
        return Scored(pd.Index(table["sop"]), patients, truth, values)
    if result.is_series:
        return Scored(pd.Index(table["series"]), patients, truth, values)
    found = result.info["metrics"].get("series")
    if found is None:
        return None  # its test set contains only parts of series
    rule = found.get("aggregation", {}).get("rule", DEFAULT_RULE)
    series = table["series"].to_numpy()
    found = aggregate(values, series, rule, head=head_of(table, SIX))
    labels = aggregate(truth, series).to_numpy().astype(int)
    owners = pd.Series(patients, index=series).groupby(level=0).first()[found.index]
    return Scored(pd.Index(found.index), owners.to_numpy(), labels, found.to_numpy())


def pick(metrics: dict, name: str) -> float | None:
    """Look up "log_loss", "auroc/any" or "log_loss/any" in what `binary_metrics` returned."""
    kind, _, label = name.partition("/")
    if not label:
        return metrics[kind]
    return metrics[kind][label] if kind in ("auroc", "ap") else metrics["per_label"][label][kind]


def seed_values(results: Sequence[Result], level: str, name: str) -> list[float]:
    """Return a metric of each seed, where it is defined."""
    found = (
        pick(result.info["metrics"][level], name)
        for result in results
        if level in result.info["metrics"]
    )
    return [value for value in found if value is not None]


def baseline_values(
    results: Sequence[Result], level: str, name: str, baseline: str = "prevalence"
) -> list[float]:
    """Return what a constant answer scores on each seed, where that is defined.

    Args:
        results: of one run.
        level: "slice" or "series".
        name: of a metric.
        baseline: "prevalence" of the training set, or "all_negative".
    """
    values = (result.info["metrics"][level]["baseline"][baseline].get(name) for result in results)
    return [value for value in values if value is not None]


def together(parts: Sequence[Scored]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenate the rows of several seeds, for curves: truth, values, patients."""
    return (
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.patients for part in parts]),
    )


def intervals(
    results: Sequence[Result], level: str, resamples: int = RESAMPLES
) -> dict[str, dict] | None:
    """Return the mean over seeds of every metric, with 95 % intervals over patients.

    None where a run has no predictions at this level, or only one patient.
    """
    parts = [part for result in results if (part := scored(result, level)) is not None]
    if len({patient for part in parts for patient in part.patients}) < 2:
        return None
    return mean_bootstrap([(p.truth, p.values, p.patients) for p in parts], resamples)


@dataclass(frozen=True)
class Difference:
    """One model minus another on the same samples.

    Args:
        mean: over seeds, metric -> value, low, high, share_above_0.
        per_seed: metric -> the difference of each seed (None where undefined).
        num_samples, num_patients: compared, over all seeds.
        seeds: that both models have.
    """

    mean: dict[str, dict]
    per_seed: dict[str, list[float | None]]
    num_samples: int
    num_patients: int
    seeds: tuple[int, ...]


def compare(
    ones: Sequence[Result],
    others: Sequence[Result],
    level: str,
    only_shared: bool = False,
    resamples: int = RESAMPLES,
) -> Difference | None:
    """Compare two models seed by seed, and in the mean over seeds.

    Args:
        ones, others: results of the two models; seeds that one of them lacks are left out.
        level: "slice" or "series".
        only_shared: compare on the samples that both scored; otherwise all must be the same.
        resamples: of patients.

    Returns:
        `ones` minus `others`; None where a model has no predictions at this level, or fewer than
        two patients are left.

    Raises:
        DataError: the models were scored on different samples, or against different labels.
    """
    by_seed = {result.seed: result for result in others}
    pairs, seeds = [], []
    for result in ones:
        if result.seed not in by_seed:
            continue
        one, other = scored(result, level), scored(by_seed[result.seed], level)
        if one is None or other is None:
            return None
        one, other = aligned(one, other, only_shared)
        if len(one.names):
            pairs.append((one, other))
            seeds.append(result.seed)
    if not pairs:
        return None
    num_patients = len({patient for one, _ in pairs for patient in one.patients})
    if num_patients < 2:
        return None
    found = mean_paired_bootstrap(
        [(one.truth, one.values, other.values, one.patients) for one, other in pairs], resamples
    )
    per_seed = [
        (binary_metrics(one.truth, one.values), binary_metrics(other.truth, other.values))
        for one, other in pairs
    ]
    names = ["log_loss", "rsna_log_loss"]
    names += [f"{kind}/{label}" for kind in ("auroc", "log_loss") for label in LABELS]
    return Difference(
        found,
        {name: [_minus(pick(a, name), pick(b, name)) for a, b in per_seed] for name in names},
        sum(len(one.names) for one, _ in pairs),
        num_patients,
        tuple(seeds),
    )


def smoothed(results: Sequence[Result]) -> list[Result]:
    """Return results whose slices are smoothed along z by `CONTROL`, for `compare` per slice."""
    found = []
    for result in results:
        table = result.predictions.copy()
        # Stored rows have no positions: order alone says who is whose neighbour.
        nowhere = np.full(len(table), np.nan)
        values = table[list(LABELS)].to_numpy()
        table[list(LABELS)] = smooth(values, table["series"].tolist(), nowhere, CONTROL)
        found.append(replace(result, predictions=table))
    return found


def sound_results(out: Path, scale: str | None = None) -> dict[str, list[Result]]:
    """Read all stored results and check that a report can be made of them.

    Args:
        out: has runs/, or nothing yet.
        scale: that the results must have; None accepts any.

    Returns:
        Key -> results by seed.

    Raises:
        StaleError: they are damaged, do not belong together, are of another scale, or have metrics
            that do not follow from their predictions.
    """
    results = load_results(out)
    for result in (result for group in results.values() for result in group):
        found = result.info["scale"]
        if scale not in (None, found):
            raise StaleError(
                f"{out} has results of the scale {found}, not {scale}.", "Give another --out."
            )
        _require_own_metrics(result)
    return results


def _require_own_metrics(result: Result) -> None:
    for level, kept in result.info["metrics"].items():
        part = scored(result, level)
        found = None if part is None else binary_metrics(part.truth, part.values)
        if (
            found is None
            or found["n"] != kept["n"]
            or any(
                abs((pick(found, name) or 0) - (pick(kept, name) or 0)) > _ROUNDING
                for name in ("log_loss", "auroc/any")
            )
        ):
            raise StaleError(
                f"the metrics of {result.key} seed {result.seed} per {level} do not follow from its"
                " predictions.",
                f"Remove its folder {result.key}-s{result.seed}: the command that made it will make"
                " it again.",
            )


def shared_scores(
    ones: Sequence[Result], others: Sequence[Result], level: str
) -> list[tuple[dict, dict]]:
    """Return the metrics of two models on the samples that both scored, for each shared seed."""
    by_seed = {result.seed: result for result in others}
    pairs = []
    for result in ones:
        if result.seed not in by_seed:
            continue
        one, other = scored(result, level), scored(by_seed[result.seed], level)
        if one is None or other is None:
            continue
        one, other = aligned(one, other, only_shared=True)
        if len(one.names):
            pairs.append(
                (binary_metrics(one.truth, one.values), binary_metrics(other.truth, other.values))
            )
    return pairs


def aligned(one: Scored, other: Scored, only_shared: bool = False) -> tuple[Scored, Scored]:
    """Put the predictions of two models into the same order, by name.

    Raises:
        DataError: see `compare`.
    """
    names = one.names
    if only_shared:
        names = names[names.isin(other.names)]
    elif len(names) != len(other.names):
        raise DataError(
            f"one model scored {len(names)} samples, the other {len(other.names)}.",
            "Compare models on the same split.",
        )
    one, other = one.of(names), other.of(names)
    if not np.array_equal(one.truth, other.truth):
        raise DataError("two models were scored against different labels of the same samples.")
    return one, other


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def under_convention(result: Result) -> dict[str, float]:
    """Return a run's metrics under the thesis's convention.

    The held-out samples are augmented at random and in the thesis's order; metrics are means over
    batches of its size.
    """
    table = _in_thesis_order(result.predictions if result.augmented is None else result.augmented)
    batch = THESIS_BATCH[result.info["config"]["data"]["view"]]
    return thesis_metrics(
        table[list(TRUTH_COLUMNS)].to_numpy(), table[list(LABELS)].to_numpy(), batch
    )


def _in_thesis_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort samples as the thesis's split does, by image ID (series by theirs).

    The slices of one series are thus scattered over many batches.
    """
    return table.sort_values(["sop", "series"], kind="stable")


def constant_under_convention(result: Result) -> dict[str, float]:
    """Return what constant answers score on the held-out samples of `under_convention`.

    Means over batches: the loss is that of answering the training set's prevalence, the other
    metrics those of answering "no haemorrhage".
    """
    truth = _in_thesis_order(result.predictions)[list(TRUTH_COLUMNS)].to_numpy()
    config, metrics = result.info["config"]["data"], result.info["metrics"]
    baseline = metrics["series" if result.is_series else "slice"]["baseline"]["prevalence"]
    prevalence = np.array([baseline["probabilities"][label] for label in LABELS])
    batch = THESIS_BATCH[config["view"]]
    repeated = np.broadcast_to(prevalence, truth.shape)
    loss = thesis_metrics(truth, repeated, batch)["loss"]
    return thesis_metrics(truth, np.zeros(truth.shape), batch) | {"loss": loss}
