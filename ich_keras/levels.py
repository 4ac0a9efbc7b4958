"""What is scored: probabilities and truth of slices, or of the series that they make."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ich_keras.labels import LabelSet
from ich_keras.metrics.aggregation import aggregate
from ich_keras.metrics.binary import binary_metrics
from ich_keras.metrics.intervals import paired_bootstrap


@dataclass(frozen=True, eq=False)
class Level:
    """Probabilities and truth of slices, or of series.

    Args:
        truth: int (n, labels), 0 or 1; -1 is missing.
        values: float (n, labels), probabilities.
        patients: str (n,), the patient of each row.
        labels: their order.
        unsmoothed: as `values`, without smoothing along z; `values` itself where there is none.
    """

    truth: np.ndarray
    values: np.ndarray
    patients: np.ndarray
    labels: LabelSet
    unsmoothed: np.ndarray

    def aggregated(self, uids: np.ndarray, rule: str) -> "Level":
        """Turn slices into series; without smoothing, too, by the same rule.

        Args:
            uids: str (n,), the series of each slice.
            rule: a key of `ich_keras.metrics.aggregation.RULES`.
        """
        names, labels = uids.tolist(), self.labels
        series = aggregate(self.values, names, rule, labels)
        values = unsmoothed = series.to_numpy()
        if self.unsmoothed is not self.values:
            unsmoothed = aggregate(self.unsmoothed, names, rule, labels).to_numpy()
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
        if self.unsmoothed is self.values:
            return {}
        scores = binary_metrics(self.truth, self.unsmoothed, label_set=self.labels)
        found: dict = {name: scores[name] for name in ("log_loss", "auroc", "ap")}
        found["gain"] = None
        if len(set(self.patients)) > 1:
            found["gain"] = paired_bootstrap(
                self.truth, self.values, self.unsmoothed, self.patients, label_set=self.labels
            )
        return {"unsmoothed": found}
