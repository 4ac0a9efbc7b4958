"""The context of a run: a sequence head that answers slices again, from all slices of their series.

A run with a context holds two files more: context.json says what the head is, context.weights.h5
holds its weights. Wherever the run's slice network answers the slices of a series, the head takes
its logits and pooled features and answers them again; the two are blended for each label, as was
chosen on the validation split. All that follows (smoothing, series, temperature, thresholds) is
chosen on the blended answers.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import fingerprint, read_json, sha256_of, write_json
from ich_keras.inference import network_digest, probabilities, tapped
from ich_keras.labels import LabelSet
from ich_keras.metrics.aggregation import HEAD
from ich_keras.metrics.logits import logits_of, probabilities_of
from ich_keras.progress import Progress
from ich_keras.run_folder import RunFolder

FILE, WEIGHTS = "context.json", "context.weights.h5"
SCHEMA = 1
END_TO_END = "end_to_end"  # the entry of context.json on the training of both networks together
LENGTH_STEP = 16  # series are filled up to a multiple: few shapes to compile for
# The head sees no surer answers: float32 probabilities hold no more.
MOST_LOGIT = 12.0
_COPY = "Copy the original run folder again."
_NAMES = {
    "gru": "a GRU",
    "lstm": "an LSTM",
    "conv": "convolutions along z",
    "transformer": "a transformer",
    "attention": "gated attention pooling",
}
# Heat maps are of the slice network: nothing takes a head's answer back to pixels.
MAPS_ALONE = (
    "Heat maps explain the slice network's own answers alone, not what the sequence head makes of"
    " them."
)


def context_sentence(run: RunFolder) -> str:
    """Say that a run answers in context, and by which share; "" where it has no sequence head.

    Raises:
        StaleError: its context.json is damaged.
    """
    path = run.path / FILE
    if not path.is_file():
        return ""
    record = read_json(path)
    try:
        name = _NAMES[record["spec"]["kind"]]
        shares = dict(zip(record["labels"], map(float, record["blend"]), strict=True))
        together = bool(record.get(END_TO_END, {"best_epoch": 0})["best_epoch"])
    except (KeyError, TypeError, ValueError) as error:
        raise StaleError(f"{path} is damaged ({error!r}).", _COPY) from error
    also = " Head and slice network were trained together." if together else ""
    values = sorted(set(shares.values()))
    if values == [0]:
        return (
            f"A sequence head ({name}) was trained, and no label was better with it on validation:"
            f" the slice network answers alone.{also}"
        )
    told = (
        f"{values[0]:g} for every label"
        if len(values) == 1
        else ", ".join(f"{label} {share:g}" for label, share in shares.items())
    )
    return (
        f"Each slice is answered in the context of its series by {name}; its share in the logits,"
        f" beside the slice network's, is {told}.{also}"
    )


@dataclass(frozen=True, eq=False)
class Context:
    """A sequence head, ready to answer.

    Args:
        head: a `ich_keras.models.sequence` model that ends in logits.
        labels: of its answers.
        blend: float32 (labels,), the head's share in the logits, 0 to 1.
        digest: of its weights and blend, 64 digits.
    """

    head: Any
    labels: LabelSet
    blend: np.ndarray
    digest: str

    @classmethod
    def load(cls, run: RunFolder, labels: LabelSet, model: Any) -> Self | None:
        """Load the context of a run; None where it has none.

        Args:
            run: its folder.
            labels: of the run.
            model: its slice network.

        Raises:
            StaleError: it is damaged, or of another network or other labels.
        """
        path = run.path / FILE
        if not path.is_file():
            if (run.path / WEIGHTS).exists() or run.rule() == HEAD:
                raise StaleError(f"{run} has lost its {FILE}.", _COPY)
            return None
        from ich_keras.models.sequence import SequenceSpec, sequence_head

        record = read_json(path)
        try:
            schema, checksum = record["schema"], record["weights"]
            spec = SequenceSpec(**record["spec"])
            blend = np.array(record["blend"], np.float32)
            names, of = list(record["labels"]), record["network"]
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise StaleError(f"{path} is damaged ({error}).", _COPY) from error
        if schema != SCHEMA:
            raise StaleError(f"{path} has version {schema}; this one reads {SCHEMA}.")
        network = network_digest(model)
        if of != network or names != list(labels.names):
            what = "another network than that" if of != network else "other labels than those"
            raise StaleError(f"{path} is of {what} of {run}.", _COPY)
        weights = run.path / WEIGHTS
        if not weights.is_file() or sha256_of(weights) != checksum:
            raise StaleError(f"{weights} is lost or does not match its checksum.", _COPY)
        head = sequence_head(spec, labels, "logits")
        head.load_weights(weights)
        digest = fingerprint({"weights": checksum, "blend": blend.tolist()})
        return cls(head, labels, blend, digest)

    def answer(
        self,
        values: np.ndarray,
        features: np.ndarray,
        series_uids: Any,
        positions_mm: Any,
    ) -> np.ndarray:
        """Answer slices again: the first of what `answer_all` returns, with its arguments."""
        return self.answer_all(values, features, series_uids, positions_mm)[0]

    def answer_all(
        self,
        values: np.ndarray,
        features: np.ndarray,
        series_uids: Any,
        positions_mm: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Answer slices again, and their series.

        Args:
            values: float32 (slices, labels), the slice network's probabilities; each series from
                inferior to superior.
            features: float (slices, features), its pooled features.
            series_uids: str (slices,).
            positions_mm: float (slices,), along the normal.

        Returns:
            Probabilities, float32 (slices, labels) twice: of each slice, blended; and the head's
            own answer to the series of each slice, in which the slice network has no share.
        """
        values = np.asarray(values, np.float32)
        own = logits_of(values, self.labels)
        found, of_series = own.copy(), own.copy()
        numbers = pd.factorize(np.asarray(series_uids, object))[0]
        positions = np.asarray(positions_mm, np.float64)
        for number in range(numbers.max() + 1 if len(numbers) else 0):
            rows = np.flatnonzero(numbers == number)
            # One series at a time: its answers do not depend on those beside it.
            inputs = filled([(features[rows], own[rows], positions[rows])])
            head = answered(self.head, inputs)
            logits = head["slices"][0, : len(rows)]
            found[rows] = blended(own[rows], logits, self.blend, self.labels)
            of_series[rows] = head["series"][0]
        slices, series = (probabilities_of(one, self.labels) for one in (found, of_series))
        return slices.astype(np.float32), series.astype(np.float32)


def answers(
    model: Any,
    batches: Iterable,
    table: pd.DataFrame,
    context: Context | None,
    progress: Progress | None = None,
    step: str = "predicting",
    take: Callable[[np.ndarray], None] | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run a run's network over batches, and answer its slices again where it has a context.

    Args:
        model: the slice network.
        batches: as for `ich_keras.inference.probabilities`.
        table: a row per sample; of slices, with the columns series_uid and position_mm.
        context: None leaves the answers as they are.
        progress, step: as there.
        take: called with the features of each batch; None takes none.

    Returns:
        Probabilities, float32 (samples, labels); and the head's answers to the series of the
        slices, of the same shape, or None without a context.
    """
    features: list[np.ndarray] = []

    def kept(found: np.ndarray) -> None:
        if take is not None:
            take(found)
        if context is not None:
            features.append(found)

    tap = None if take is None and context is None else tapped(model)
    values = probabilities(model, batches, len(table), progress, step, tap=tap, take=kept)
    if context is None or not features:
        return values, None
    places = table["series_uid"], table["position_mm"]
    return context.answer_all(values, np.concatenate(features), *places)


def filled(series: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the inputs of a head: series filled up at their ends to one length.

    Args:
        series: of each its features (slices, features), logits (slices, labels) and positions, mm
            (slices,).
    """
    longest = max(len(features) for features, _, _ in series)
    length = -(-longest // LENGTH_STEP) * LENGTH_STEP
    width, count = series[0][0].shape[1], series[0][1].shape[1]
    inputs = {
        "features": np.zeros((len(series), length, width), np.float32),
        "logits": np.zeros((len(series), length, count), np.float32),
        "places_mm": np.zeros((len(series), length), np.float32),
        "mask": np.zeros((len(series), length), np.float32),
    }
    for row, (features, logits, positions) in enumerate(series):
        here = slice(0, len(features))
        inputs["features"][row, here] = features
        inputs["logits"][row, here] = np.clip(logits, -MOST_LOGIT, MOST_LOGIT)
        # Relative: float32 holds less of far away places.
        inputs["places_mm"][row, here] = positions - positions[0]
        inputs["mask"][row, here] = 1
    return inputs


def answered(head: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a head on one batch.

    Raises:
        DataError: it gave values that are not finite.
    """
    found = {name: np.asarray(one) for name, one in head.predict_on_batch(inputs).items()}
    if not all(np.isfinite(one).all() for one in found.values()):
        raise DataError(
            "the sequence head gave values that are not finite.",
            "Its weights or the features are damaged.",
        )
    return found


def blended(own: np.ndarray, head: np.ndarray, blend: np.ndarray, labels: LabelSet) -> np.ndarray:
    """Blend the logits of slice network and head: float64 (n, labels).

    Where the head has no share, the slice network's logits stay as they are, to the last bit.
    """
    if labels.exclusive:  # logits of classes have no zero of their own
        head = head - np.logaddexp.reduce(head.astype(np.float64), axis=-1, keepdims=True)
    mixed = (1 - blend) * own + blend * head
    return np.where(blend == 0, own, mixed)


def write_context(
    run: Path, head: Any, spec: Any, labels: LabelSet, blend: np.ndarray, network: str, facts: dict
) -> None:
    """Write the two files of a context into a run folder.

    Args:
        run: the folder.
        head, spec: the head and its shape.
        labels: of its answers.
        blend: float (labels,).
        network: `network_digest` of the slice network.
        facts: further entries, JSON-able: how it was trained and what was chosen.
    """
    weights = run / WEIGHTS
    head.save_weights(weights, overwrite=True)
    record = {
        "schema": SCHEMA,
        "spec": asdict(spec),
        "labels": list(labels.names),
        "blend": [float(one) for one in blend],
        "network": network,
        "weights": sha256_of(weights),
    }
    write_json(run / FILE, record | facts)
