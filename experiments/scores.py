"""From kept predictions to numbers: means over seeds, intervals, differences of paired models.

Intervals: the rows of all seeds are put together (each seed's model answers for its own test
patients), and patients are drawn with replacement; a patient who is in the test set of several
seeds is drawn with all of those rows. Metrics are then those of the rows together. The range over
seeds stands beside.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.convention import thesis_metrics
from experiments.results import Result
from ich_keras.errors import DataError
from ich_keras.labels import LABELS
from ich_keras.metrics.aggregation import DEFAULT_RULE, aggregate
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
from ich_keras.metrics.intervals import RESAMPLES, bootstrap, paired_bootstrap, unpaired_bootstrap

LEVELS = ("slice", "series")
# The thesis's names of its metrics -> ours; where they have no like among ours, none.
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
THESIS_BATCH = {"slice": 32, "slab": 16, "series": 1}


@dataclass(frozen=True, eq=False)
class Scored:
    """What a model said about samples that have names.

    Args:
        names: index (n,) of UIDs, each once.
        patients: int (n,).
        truth: int (n, 6).
        values: float (n, 6), probabilities.
    """

    names: pd.Index
    patients: np.ndarray
    truth: np.ndarray
    values: np.ndarray

    def of(self, names: pd.Index) -> "Scored":
        """Return the samples of some names, in their order.

        Raises:
            DataError: a name is not among them.
        """
        rows = self.names.get_indexer(names)
        if (rows < 0).any():
            raise DataError(
                f"{(rows < 0).sum()} of {len(names)} samples were not scored,"
                f" {names[rows < 0][0]} first.",
                "Compare models on the same split.",
            )
        return Scored(names, self.patients[rows], self.truth[rows], self.values[rows])


def scored(result: Result, level: str) -> Scored | None:
    """Return a run's test predictions at a level; None where it says nothing there.

    Slices become series by the rule that the run chose on its validation split.
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
    rule = result.info["metrics"]["series"].get("aggregation", {}).get("rule", DEFAULT_RULE)
    series = table["series"].to_numpy()
    found = aggregate(values, series, rule)
    labels = aggregate(truth, series).to_numpy().astype(int)
    owners = pd.Series(patients, index=series).groupby(level=0).first()[found.index]
    return Scored(pd.Index(found.index), owners.to_numpy(), labels, found.to_numpy())


def pick(metrics: dict, name: str) -> float | None:
    """Look up "log_loss" or "auroc/any" in what `binary_metrics` returned."""
    kind, _, label = name.partition("/")
    return metrics[kind][label] if label else metrics[kind]


def seed_values(results: Sequence[Result], level: str, name: str) -> list[float]:
    """Return a metric of each seed, where it is defined."""
    found = (
        pick(result.info["metrics"][level], name)
        for result in results
        if level in result.info["metrics"]
    )
    return [value for value in found if value is not None]


def together(parts: Sequence[Scored]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the rows of several seeds together: truth, values, patients."""
    return (
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.patients for part in parts]),
    )


def intervals(
    results: Sequence[Result], level: str, resamples: int = RESAMPLES
) -> dict[str, dict] | None:
    """Return every metric over the rows of all seeds, with 95 % intervals by patients; None where
    there is nothing, or one patient only."""
    parts = [part for result in results if (part := scored(result, level)) is not None]
    if not parts:
        return None
    truth, values, patients = together(parts)
    if len(set(patients)) < 2:
        return None
    return bootstrap(truth, values, patients, resamples)


@dataclass(frozen=True)
class Difference:
    """One model minus another on the same samples.

    Args:
        together: metric -> value, low, high, share_above_0, over the rows of all seeds.
        per_seed: metric -> the difference of each seed (None where undefined).
        num_samples, num_patients: compared, over all seeds.
        seeds: that both models have.
    """

    together: dict[str, dict]
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
    """Compare two models, seed by seed and over all seeds together.

    Args:
        ones, others: their results; seeds that one of them lacks are left out.
        level: "slice" or "series".
        only_shared: compare on the samples that both scored; otherwise these must be the same.
        resamples: of patients.

    Returns:
        `ones` minus `others`; None where a model says nothing at this level, or fewer than two
        patients are left.

    Raises:
        DataError: the models were scored on different samples, or these have other labels.
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
    truth, values, patients = together([one for one, _ in pairs])
    if len(set(patients)) < 2:
        return None
    other_values = np.concatenate([other.values for _, other in pairs])
    found = paired_bootstrap(truth, values, other_values, patients, resamples)
    per_seed = [
        (binary_metrics(one.truth, one.values), binary_metrics(other.truth, other.values))
        for one, other in pairs
    ]
    names = ("log_loss", "rsna_log_loss", *(f"{k}/{n}" for k in ("auroc", "ap") for n in LABELS))
    return Difference(
        found,
        {name: [_minus(pick(a, name), pick(b, name)) for a, b in per_seed] for name in names},
        len(truth),
        len(set(patients)),
        tuple(seeds),
    )


def apart(
    ones: Sequence[Result], others: Sequence[Result], level: str, resamples: int = RESAMPLES
) -> dict[str, dict] | None:
    """Compare two models that were scored on samples of their own: `ones` minus `others`, over
    all seeds; patients of both are drawn together. None where there are fewer than two."""
    sets = [
        together([part for result in group if (part := scored(result, level)) is not None])
        for group in (ones, others)
    ]
    if len(set(sets[0][2]) | set(sets[1][2])) < 2:
        return None
    return unpaired_bootstrap(*sets, resamples)


def aligned(one: Scored, other: Scored, only_shared: bool = False) -> tuple[Scored, Scored]:
    """Bring two models' answers into the same order, by name.

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
    """Return the thesis's metrics of a run: held-out samples changed at random, in their order,
    means over batches of the thesis's size."""
    table = result.predictions if result.augmented is None else result.augmented
    batch = THESIS_BATCH[result.info["config"]["data"]["view"]]
    return thesis_metrics(
        table[list(TRUTH_COLUMNS)].to_numpy(), table[list(LABELS)].to_numpy(), batch
    )


def constant_under_convention(result: Result) -> dict[str, float]:
    """Return what constants score on the held-out samples of `under_convention`, batch by batch:
    the loss of the training set's prevalence, all else of never any haemorrhage."""
    truth = result.predictions[list(TRUTH_COLUMNS)].to_numpy()
    config, metrics = result.info["config"]["data"], result.info["metrics"]
    baseline = metrics["series" if result.is_series else "slice"]["baseline"]["prevalence"]
    prevalence = np.array([baseline["probabilities"][label] for label in LABELS])
    batch = THESIS_BATCH[config["view"]]
    repeated = np.broadcast_to(prevalence, truth.shape)
    loss = thesis_metrics(truth, repeated, batch)["loss"]
    return thesis_metrics(truth, np.zeros(truth.shape), batch) | {"loss": loss}
