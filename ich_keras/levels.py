"""What is scored, and how: probabilities and truth of slices, or of the series that they make."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.labels import UNLABELLED, LabelSet
from ich_keras.metrics.aggregation import aggregate
from ich_keras.metrics.binary import binary_metrics
from ich_keras.metrics.calibration import calibration, fit_temperature, with_temperature
from ich_keras.metrics.intervals import bootstrap, paired_bootstrap
from ich_keras.metrics.operating import choose_thresholds, rates_at, threshold_table
from ich_keras.metrics.triage import triage


@dataclass(frozen=True, eq=False)
class Level:
    """Probabilities and truth of slices, or of series.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values: float (n, labels), probabilities.
        patients: str (n,), the patient of each row.
        labels: their order.
        unsmoothed: as `values`, without smoothing along z; None or `values` itself where there is
            none.
        head: float (n, labels), of slices: a sequence head's answer to the series of each; None
            without one.
    """

    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray
    labels: LabelSet
    unsmoothed: np.ndarray | None = None
    head: np.ndarray | None = None

    @property
    def is_smoothed(self) -> bool:
        """Whether there are values without smoothing beside those with it."""
        return self.unsmoothed is not None and self.unsmoothed is not self.values

    def aggregated(self, uids: np.ndarray, rule: str) -> "Level":
        """Turn slices into series; without smoothing, too, by the same rule.

        Args:
            uids: str (n,), the series of each slice.
            rule: one of `ich_keras.metrics.aggregation.ALL_RULES`.
        """
        names, labels = uids.tolist(), self.labels
        series = aggregate(self.values, names, rule, labels, self.head)
        values = unsmoothed = series.to_numpy()
        if self.is_smoothed:
            assert self.unsmoothed is not None
            unsmoothed = aggregate(self.unsmoothed, names, rule, labels, self.head).to_numpy()
        owners = pd.Series(self.patients, index=uids).groupby(level=0).first()
        truth = aggregate(self.truth, names, "max", labels).to_numpy().astype(np.int8)
        return Level(truth, values, owners[series.index].to_numpy(), labels, unsmoothed)

    def beside_unsmoothed(self) -> dict:
        """Say what the level scores without smoothing, and what smoothing adds.

        Returns:
            {} without smoothing; else {"unsmoothed": {"log_loss", "auroc", "ap", "gain"}}.
            The gain is smoothed minus unsmoothed, as `paired_bootstrap` returns it; None where all
            rows are of one patient.
        """
        if not self.is_smoothed:
            return {}
        assert self.unsmoothed is not None
        scores = binary_metrics(self.truth, self.unsmoothed, label_set=self.labels)
        found: dict = {name: scores[name] for name in ("log_loss", "auroc", "ap")}
        found["gain"] = None
        if len(set(self.patients)) > 1:
            found["gain"] = paired_bootstrap(
                self.truth, self.values, self.unsmoothed, self.patients, label_set=self.labels
            )
        return {"unsmoothed": found}


def scored(level: Level, prevalence: list[float] | None, chosen: dict) -> dict:
    """Score slices or series.

    Args:
        level: what to score.
        prevalence: of the training set, for the constant baseline; None takes that of `level`.
        chosen: as `choose` returns it; empty where nothing was chosen.
    """
    return {
        **binary_metrics(level.truth, level.values, prevalence, level.labels),
        "intervals": _intervals(level),
        "calibration": _calibration(level, chosen.get("temperature")),
        "operating": _operating(level, chosen.get("thresholds")),
        "triage": _triage(level),
        **level.beside_unsmoothed(),
    }


def _triage(level: Level) -> dict | None:
    """Return the worklist of the label that stands for all; None without it, or of classes."""
    if level.labels.exclusive:
        return None
    column = level.labels.index(level.labels.shown)
    is_known = level.truth[:, column] != UNLABELLED
    return triage(level.truth[is_known, column] == 1, level.values[is_known, column])


def choose(level: Level) -> dict:
    """Fit temperature and thresholds; never to what is then scored."""
    return {
        "temperature": fit_temperature(level.truth, level.values, level.labels),
        "thresholds": choose_thresholds(level.truth, level.values, level.labels),
    }


def _intervals(level: Level) -> dict | None:
    if len(set(level.patients)) < 2:
        return None
    intervals = bootstrap(level.truth, level.values, level.patients, label_set=level.labels)
    return {"patients": len(set(level.patients)), "metrics": intervals}


def _calibration(level: Level, temperature: float | None) -> dict:
    truth, labels = level.truth, level.labels
    found = {
        "labels": calibration(truth, level.values, label_set=labels),
        "temperature": temperature,
    }
    if temperature is not None:
        scaled = with_temperature(level.values, temperature, labels)
        found["scaled"] = calibration(truth, scaled, label_set=labels)
        found["scaled_log_loss"] = binary_metrics(truth, scaled, label_set=labels)["log_loss"]
    return found


def _operating(level: Level, thresholds: dict | None) -> dict:
    return {
        "at_specificity": {
            wanted: rates_at(level.truth, level.values, limits, level.labels)
            for wanted, limits in (thresholds or {}).items()
        },
        "thresholds": threshold_table(level.truth, level.values, level.labels),
    }
