"""Fitting a sequence head: its series, its epochs, and its share beside the slice network."""

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.context import MOST_LOGIT, answered, blended, filled
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.seeds import sample_seed
from ich_keras.data.views import series_of_rows
from ich_keras.errors import DivergedError, StaleError, UsageError
from ich_keras.labels import LabelSet
from ich_keras.metrics.logits import logits_of, probabilities_of
from ich_keras.models.options import require_in_range, require_whole
from ich_keras.models.sequence import (
    SequenceSpec,
    adapt_features,
    sequence_head,
    sequence_losses,
)
from ich_keras.progress import Progress, Tell
from ich_keras.slice_features import SliceFeatures

LEARN_FROM = ("both", "slices", "series")
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
STATE = ".context.state.npz"  # hidden: no file of a finished run


@dataclass(frozen=True)
class ContextConfig:
    """How a sequence head is trained.

    Args:
        kind, width, depth, heads, dropout: see `SequenceSpec`.
        epochs: passes over the training series.
        batch_size: series per step.
        learning_rate: highest, of a cosine with a warm-up of 5 %.
        weight_decay: decoupled; kernels only.
        learn_from: labels of "slices", of "series", or "both".
        series_weight: of the loss of series beside that of slices.
        seed: of weights, dropout and order.
    """

    kind: str = "gru"
    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.3
    epochs: int = 30
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    learn_from: str = "both"
    series_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        self.spec(1)  # refuses bad shapes
        if self.learn_from not in LEARN_FROM:
            raise UsageError(
                f"learn_from is {self.learn_from!r}; expected one of {', '.join(LEARN_FROM)}."
            )
        require_whole("epochs", self.epochs, 1, 100_000)
        require_whole("batch_size", self.batch_size, 1, 100_000)
        require_in_range("learning_rate", self.learning_rate)
        require_in_range("weight_decay", self.weight_decay)

    def spec(self, features: int) -> SequenceSpec:
        """Return the shape of the head for so many features."""
        return SequenceSpec(self.kind, features, self.width, self.depth, self.heads, self.dropout)


@dataclass(frozen=True, eq=False)
class SeriesSet:
    """The series of a split, as a head takes them.

    Args:
        parts: of each its features, logits and positions (`ich_keras.context.filled`).
        slices: of each float32 (slices, labels), NaN where a label is missing.
        series: float32 (n, labels), the same for whole series.
        rows: of each int (slices,), its rows in the cache's table of slices.
    """

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    slices: list[np.ndarray]
    series: np.ndarray
    rows: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.parts)

    def batch(
        self, chosen: np.ndarray, learn_from: str
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the inputs and labels of some series."""
        inputs = filled([self.parts[number] for number in chosen])
        count = self.series.shape[1]
        slices = np.full((*inputs["mask"].shape, count), np.nan, np.float32)
        for row, number in enumerate(chosen):
            slices[row, : len(self.slices[number])] = self.slices[number]
        series = self.series[chosen]
        if learn_from == "slices":
            series = np.full_like(series, np.nan)
        if learn_from == "series":
            slices[:] = np.nan
        return inputs, {"slices": slices, "series": series}


def series_set(
    features: SliceFeatures, cache: CTCache, rows: np.ndarray, labels: LabelSet
) -> SeriesSet:
    """Take the series that some slices make up; only whole ones.

    Args:
        features: of the cache.
        cache: with labels.
        rows: int (n,), slices of a split.
        labels: of the head.
    """
    numbers, has_others = series_of_rows(cache.slices, rows, labels)
    uids = cache.series["series_uid"].iloc[numbers[~has_others]]
    names = list(labels.names)
    truth = _with_gaps(cache.slices[names])
    whole = _with_gaps(cache.series.set_index("series_uid").loc[uids, names])
    positions = cache.slices["position_mm"].to_numpy(np.float64)
    parts, slices = [], []
    rows_of = tuple(np.array(cache.series_rows(uid)) for uid in uids)
    for own in rows_of:
        logits = np.clip(features.logits[own], -MOST_LOGIT, MOST_LOGIT)
        parts.append((features.features[own].astype(np.float32), logits, positions[own]))
        slices.append(truth[own])
    return SeriesSet(parts, slices, whole, rows_of)


def _with_gaps(table: pd.DataFrame) -> np.ndarray:
    values = table.to_numpy(np.float32)
    return np.where(values < 0, np.nan, values).astype(np.float32)


def fit_head(
    sets: dict[str, SeriesSet],
    config: ContextConfig,
    labels: LabelSet,
    features: SliceFeatures,
    folder: Path,
    progress: Progress | None,
    tell: Tell,
) -> tuple[Any, dict[str, Any]]:
    """Train a head, epoch by epoch.

    Args:
        sets: of "train" and "valid".
        config: of the training.
        labels: of the head.
        features: that the sets are of.
        folder: receives the state after each epoch; one that is there is resumed.
        progress, tell: as in `ich_keras.context_training.train_context`.

    Returns:
        The head with the weights of its best epoch, and how it was trained, JSON-able.

    Raises:
        DivergedError: a loss is not finite.
        StaleError: the state in the folder is damaged, or of another training.
    """
    import keras

    train, valid = sets["train"], sets["valid"]
    steps = -(-len(train) // config.batch_size)
    keras.utils.set_random_seed(config.seed)
    head = sequence_head(config.spec(features.record.width), labels, "logits")
    adapt_features(head, np.concatenate([part[0] for part in train.parts]))
    head.compile(
        _optimizer(config, steps * config.epochs),
        **sequence_losses(labels, config.series_weight),
        auto_scale_loss=False,
    )
    head.optimizer.build(head.trainable_variables)
    what = files.fingerprint(
        {"config": asdict(config), "features": asdict(features.record) | {"source": ""}}
    )
    course = Epochs.load(folder / STATE, head, what, tell)
    for epoch in range(course.done, config.epochs):
        keras.utils.set_random_seed(sample_seed(config.seed, epoch, 0))
        losses = []
        for number, chosen in enumerate(order_of(train, config, epoch)):
            loss = head.train_on_batch(*train.batch(chosen, config.learn_from), return_dict=True)
            losses.append(float(loss["loss"]))
            if progress is not None:
                done, total = epoch * steps + number + 1, config.epochs * steps
                progress("training the head", done, total, f"epoch {epoch + 1}/{config.epochs}")
        if not np.isfinite(losses).all():
            raise DivergedError(
                f"the training loss of epoch {epoch + 1} is {np.mean(losses)}.",
                "Lower --learning-rate.",
            )
        course.add(head, float(np.mean(losses)), validation_loss(head, valid, labels, config))
        course.save(folder / STATE, head, what)
        files.fail_point(f"context epoch {epoch + 1}")
        row = course.rows[-1]
        best = " (best so far)" if course.best_epoch == epoch + 1 else ""
        tell(
            f"epoch {epoch + 1}/{config.epochs}: training loss {row['train_loss']:.4f}, validation"
            f" log loss {row['valid_log_loss']:.4f}{best}"
        )
    head.set_weights(course.best)
    return head, {
        "config": asdict(config),
        "history": course.rows,
        "best_epoch": course.best_epoch,
        "num_series": {part: len(one) for part, one in sets.items()},
    }


def _optimizer(config: ContextConfig, total_steps: int) -> Any:
    import keras

    from ich_keras.models.optimizer import learning_rate_schedule

    warmup = max(1, total_steps // 20)
    rate = learning_rate_schedule(config.learning_rate, "cosine", total_steps, warmup)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay, epsilon=1e-7)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


def order_of(train: SeriesSet, config: ContextConfig, epoch: int) -> Iterator[np.ndarray]:
    """Yield the numbers of the series of each step of an epoch."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(train))
    for start in range(0, len(order), config.batch_size):
        yield order[start : start + config.batch_size]


@dataclass
class Epochs:
    """The epochs so far, and the weights of the best one.

    Args:
        rows: of the history.
        best: its weights.
        best_epoch: its number, from 1; 0 for the weights that the training began with.
        baseline: the validation loss that an epoch must beat; None takes the first one.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)
    best_epoch: int = 0
    baseline: float | None = None

    @property
    def done(self) -> int:
        """The number of epochs so far."""
        return len(self.rows)

    def add(self, head: Any, train_loss: float, valid_loss: float) -> None:
        """Add an epoch, and keep its weights if it is the best."""
        losses = [] if self.baseline is None else [self.baseline]
        losses += [row["valid_log_loss"] for row in self.rows]
        self.rows.append(
            {"epoch": self.done + 1, "train_loss": train_loss, "valid_log_loss": valid_loss}
        )
        if not losses or valid_loss < min(losses):
            self.best, self.best_epoch = head.get_weights(), self.done

    def save(self, path: Path, head: Any, what: str) -> None:
        """Write the state: weights, those of the best epoch, and the optimiser's."""
        import keras

        arrays: dict[str, Any] = {f"weight/{n}": w for n, w in enumerate(head.get_weights())}
        slots = head.optimizer.variables
        arrays |= {f"slot/{n}": keras.ops.convert_to_numpy(v) for n, v in enumerate(slots)}
        arrays |= {f"best/{n}": w for n, w in enumerate(self.best)}
        record = {"what": what, "rows": self.rows, "best_epoch": self.best_epoch}
        text = json.dumps(record | {"baseline": self.baseline})
        with files.atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, record=np.array(text), **arrays)

    @classmethod
    def load(cls, path: Path, head: Any, what: str, tell: Tell) -> "Epochs":
        """Restore the state that an interrupted training left; a new course without one.

        Raises:
            StaleError: it is damaged, or of another training.
        """
        if not path.is_file():
            return cls()
        hint = f"Remove {path.parent} to begin again."
        try:
            with np.load(path, allow_pickle=False) as stored:
                record = json.loads(str(stored["record"]))
                groups = {
                    name: [stored[f"{name}/{n}"] for n in range(count)]
                    for name, count in (
                        ("weight", len(head.weights)),
                        ("slot", len(head.optimizer.variables)),
                        ("best", len(head.weights)),
                    )
                    if record["what"] == what
                }
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise StaleError(f"{path} is damaged ({error}).", hint) from error
        if record["what"] != what:
            raise StaleError(f"{path} is of a training with other settings or features.", hint)
        head.set_weights(groups["weight"])
        for variable, value in zip(head.optimizer.variables, groups["slot"], strict=True):
            variable.assign(value)
        course = cls(record["rows"], groups["best"], record["best_epoch"], record.get("baseline"))
        tell(f"Resuming after epoch {course.done}.")
        return course


def validation_loss(head: Any, valid: SeriesSet, labels: LabelSet, config: ContextConfig) -> float:
    """Return the log loss of the slices; of the series where nothing is known of slices."""
    truth, logits = _valid_answers(head, valid, "slices")
    if config.learn_from == "series" or not np.isfinite(truth).any():
        truth, logits = _valid_answers(head, valid, "series")
    return float(np.nanmean(_losses(truth, logits, labels)))


def _valid_answers(head: Any, valid: SeriesSet, level: str) -> tuple[np.ndarray, np.ndarray]:
    truth, logits = [], []
    for number in range(len(valid)):
        found = answered(head, filled([valid.parts[number]]))[level][0]
        if level == "slices":
            truth.append(valid.slices[number])
            logits.append(found[: len(truth[-1])])
        else:
            truth.append(valid.series[number : number + 1])
            logits.append(found[np.newaxis])
    return np.concatenate(truth), np.concatenate(logits)


def _losses(truth: np.ndarray, logits: np.ndarray, labels: LabelSet) -> np.ndarray:
    """Return the cross-entropy of each label, float64 (n, labels); NaN where it is missing."""
    values = probabilities_of(logits.astype(np.float64), labels)
    p, q = np.clip(values, 1e-7, 1), np.clip(1 - values, 1e-7, 1)
    if labels.exclusive:
        return -truth * np.log(p) * len(labels)
    return -(truth * np.log(p) + (1 - truth) * np.log(q))


def choose_blend(
    head: Any, valid: SeriesSet, labels: LabelSet, learn_from: str = "both"
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """Choose the head's share in the logits of each label by the log loss on validation slices.

    Where labels of slices are missing altogether, or the head shall learn from those of series
    alone, it has all.

    Args:
        head: trained.
        valid: the series of validation.
        labels: of the head.
        learn_from: see `ContextConfig`.

    Returns:
        float32 (labels,), and the loss of each share by label.
    """
    truth, logits = _valid_answers(head, valid, "slices")
    if learn_from == "series":
        truth = np.full_like(truth, np.nan)
    own = logits_of(
        probabilities_of(np.concatenate([part[1] for part in valid.parts]), labels), labels
    )
    losses: dict[str, dict[str, float]] = {name: {} for name in labels.names}
    for share in BLENDS:
        mixed = blended(own, logits, np.full(len(labels), share, np.float32), labels)
        each = _losses(truth, mixed, labels)
        if labels.exclusive:
            each = np.repeat(each.sum(axis=1, keepdims=True), len(labels), axis=1)
        for column, name in enumerate(labels.names):
            known = each[np.isfinite(truth[:, column]), column]
            if len(known):
                losses[name][f"{share:g}"] = float(known.mean())
    chosen = [
        float(min(found, key=lambda share: found[share])) if found else 1.0
        for found in losses.values()
    ]
    return np.array(chosen, np.float32), losses
