"""End to end: a sequence head and its slice network are trained together, on whole series.

The head is fitted on fixed features first (`ich_keras.context_fitting`). Then one optimiser moves
both, the slice network at a lower rate. A sample is a whole series. The gradient goes through the
slice network in chunks, which are computed again (`ich_keras.models.torch.chunked`): memory is that
of a chunk. Batch normalisation keeps the statistics, scale and shift of the run. On torch.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ich_keras import files
from ich_keras.context import MOST_LOGIT
from ich_keras.context_fitting import (
    ContextConfig,
    Epochs,
    SeriesSet,
    order_of,
    validation_loss,
)
from ich_keras.data.batches import CTDataset, RawBatch, is_drawn
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.device_inputs import DeviceInputs
from ich_keras.data.seeds import sample_seed
from ich_keras.environment import loaded_backend
from ich_keras.errors import DataError, DivergedError, UsageError
from ich_keras.features import slice_answers, tapped_logits
from ich_keras.models.optimizer import Adam, learning_rate_schedule
from ich_keras.models.options import require_in_range, require_whole
from ich_keras.models.sequence import sequence_losses
from ich_keras.models.window_layers import keep_from_decay, window_layer
from ich_keras.progress import Progress, Tell
from ich_keras.recipe import Recipe
from ich_keras.slice_features import require_finite_rows

if TYPE_CHECKING:
    import torch

STATE = ".both.state.npz"
_STEP = "training head and slice network"


@dataclass(frozen=True)
class JointConfig:
    """How head and slice network are trained together.

    What it does not say (weight decay, the labels that are learned from, their weights, seed) is
    as in the head's `ContextConfig`.

    Args:
        epochs: passes over the training series.
        batch_size: series per step.
        learning_rate: highest, of the head; a cosine with a warm-up of 5 %.
        backbone_factor: the slice network's rate is this multiple of the head's.
        chunk: slices whose graph is in memory at once.
    """

    epochs: int = 3
    batch_size: int = 4
    learning_rate: float = 1e-4
    backbone_factor: float = 0.1
    chunk: int = 32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "chunk"):
            require_whole(name, getattr(self, name), 1, 100_000)
        for name in ("learning_rate", "backbone_factor"):
            require_in_range(name, getattr(self, name))


def require_trainable_together(recipe: Recipe) -> None:
    """Refuse what cannot be trained end to end.

    Args:
        recipe: of the slice network's run.

    Raises:
        UsageError: another backend than torch, or an augmentation of the user's.
    """
    backend = loaded_backend()
    if backend != "torch":
        raise UsageError(
            f"end to end needs the backend torch; Keras runs on {backend}.",
            "Set --backend torch, or leave --end-to-end out: heads alone train on every backend.",
        )
    if recipe.training.own_augment is not None:
        raise UsageError(
            f"the run was augmented by a function of yours, {recipe.training.own_augment}, which"
            " end to end does not take.",
            "Train the slice network with --augment fast, thesis, flip or none.",
        )


class SeriesChunks:
    """The inputs of whole series, a chunk of slices at a time; one draw for all slices of a series.

    Args:
        recipe: of the slice network's run.
        cache: what to read.
        size: slices of a chunk.
        seed: of the augmentation.
    """

    def __init__(self, recipe: Recipe, cache: CTCache, size: int, seed: int) -> None:
        inputs, training, device = recipe.inputs, recipe.training, recipe.batch_device
        augment = None if training.augment == "none" else training.augment
        is_raw = device is not None and is_drawn(augment)
        self._size = size
        self._dataset = CTDataset(
            cache.pixels,
            cache.samples(inputs.view),
            inputs.size,
            augment,
            seed,
            inputs.intensity,
            training.reverse,
            is_raw,
            groups=pd.factorize(cache.slices["series_uid"])[0],
        )
        self._device = None
        if is_raw:
            assert device is not None  # `is_raw` covers it
            self._device = DeviceInputs(
                device, inputs.intensity, inputs.view.is_volume, inputs.size
            )

    def of(self, epoch: int, rows: np.ndarray) -> "Iterator[np.ndarray | torch.Tensor]":
        """Yield the inputs of slices, float32 (n, ..., channels).

        Args:
            epoch: of the draws.
            rows: int (n,), numbers of slices.
        """
        for start in range(0, len(rows), self._size):
            batch = self._dataset[epoch, rows[start : start + self._size]]
            if isinstance(batch, RawBatch):
                assert self._device is not None  # only then is there a raw one
                yield self._device.make(self._device.send(batch))[0]
            else:
                yield batch[0]


@dataclass(frozen=True, eq=False)
class _Both:
    """Head and slice network, as `Epochs` keeps their weights and the optimiser."""

    head: Any
    network: Any
    optimizer: Any

    @property
    def weights(self) -> list[Any]:
        return [*self.head.weights, *self.network.weights]

    def get_weights(self) -> list[np.ndarray]:
        return [*self.head.get_weights(), *self.network.get_weights()]

    def set_weights(self, values: list[np.ndarray]) -> None:
        count = len(self.head.weights)
        self.head.set_weights(values[:count])
        self.network.set_weights(values[count:])


def fit_both(
    head: Any,
    recipe: Recipe,
    model: Any,
    cache: CTCache,
    sets: dict[str, SeriesSet],
    config: ContextConfig,
    joint: JointConfig,
    what: str,
    folder: Path,
    progress: Progress | None,
    tell: Tell,
) -> tuple[SeriesSet, dict[str, Any]]:
    """Train a head and its slice network together; both end with the weights of their best epoch.

    Args:
        head: fitted on the slice network's features.
        recipe, model: the slice network's, from `load_run`.
        cache: of the training.
        sets: of "train" and "valid".
        config: the head's.
        joint: of this training.
        what: digest of all that it begins with.
        folder: receives the state after each epoch; one that is there is resumed.
        progress, tell: as in `ich_keras.context_training.train_context`.

    Returns:
        The series of validation with the slice network's new answers, and how it was trained,
        JSON-able. Epoch 0 is what it began with: it is kept where no epoch was better.

    Raises:
        DivergedError: a loss is not finite.
        StaleError: the state in the folder is damaged, or of another training.
    """
    from ich_keras.models.torch.chunked import ChunkedNetwork, chunked_gradients

    _freeze(recipe, model)
    tap = tapped_logits(model)
    network = ChunkedNetwork(tap)
    config = replace(config, batch_size=joint.batch_size)
    train, valid = sets["train"], sets["valid"]
    steps = -(-len(train) // joint.batch_size)
    variables = [*network.variables, *head.trainable_variables]
    optimizer = _optimizer(joint, config, head, model, steps * joint.epochs)
    optimizer.build(variables)
    both = _Both(head, model, optimizer)
    chunks = SeriesChunks(recipe, cache, joint.chunk, config.seed)
    what = files.fingerprint({"begins with": what, "joint": asdict(joint)})
    course = Epochs.load(folder / STATE, both, what, tell)
    if not course.rows:
        course.best = both.get_weights()
        course.baseline = validation_loss(head, valid, recipe.labels, config)
    for epoch in range(course.done, joint.epochs):
        losses = []
        for number, chosen in enumerate(order_of(train, config, epoch)):
            rows = np.concatenate([train.rows[one] for one in chosen])
            loss, gradients = chunked_gradients(
                network,
                head.trainable_variables,
                lambda rows=rows, epoch=epoch: chunks.of(epoch, rows),  # type: ignore[misc]
                _SeriesLoss(head, recipe, config, train, chosen),
                sample_seed(config.seed, epoch, number),
            )
            _step(optimizer, gradients, variables)
            losses.append(float(loss))
            if progress is not None:
                done, total = epoch * steps + number + 1, joint.epochs * steps
                progress(_STEP, done, total, f"epoch {epoch + 1}/{joint.epochs}")
        if not np.isfinite(losses).all():
            raise DivergedError(
                f"the training loss of epoch {epoch + 1} of both together is {np.mean(losses)}.",
                "Lower --joint-rate.",
            )
        try:
            again = _answered_again(tap, recipe, cache, valid)
        except DataError as error:
            raise DivergedError(error.message, "Lower --joint-rate.") from error
        course.add(
            both, float(np.mean(losses)), validation_loss(head, again, recipe.labels, config)
        )
        course.save(folder / STATE, both, what)
        files.fail_point(f"both epoch {epoch + 1}")
        row = course.rows[-1]
        best = " (best so far)" if course.best_epoch == epoch + 1 else ""
        tell(
            f"both together, epoch {epoch + 1}/{joint.epochs}: training loss"
            f" {row['train_loss']:.4f}, validation log loss {row['valid_log_loss']:.4f}{best}"
        )
    both.set_weights(course.best)
    if not course.best_epoch:
        tell(
            f"No epoch of both together was better than the head alone ({course.baseline:.4f}): the"
            " slice network stays as it was."
        )
        again = valid
    else:
        again = _answered_again(tap, recipe, cache, valid)
    return again, {
        "config": asdict(joint),
        "history": course.rows,
        "best_epoch": course.best_epoch,
        "began_with_log_loss": course.baseline,
    }


def _freeze(recipe: Recipe, model: Any) -> None:
    """Freeze batch normalisation, and what the run froze."""
    import keras

    from ich_keras.models.classifier import freeze

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    if recipe.training.freeze is not None:
        freeze(model, recipe.training.freeze)


class _Adam(Adam):
    """Adam whose full rate is for some variables, whatever they are called.

    Layers of a head and of a slice network may have one name.
    """

    full_rate: frozenset[int] = frozenset()

    def _is_head(self, variable: Any) -> bool:
        return self.backbone_factor == 1 or id(variable) in self.full_rate


def _optimizer(
    joint: JointConfig, config: ContextConfig, head: Any, model: Any, total_steps: int
) -> Any:
    warmup = max(1, total_steps // 20)
    layers = {variable.path.split("/")[0] for variable in head.trainable_variables}
    optimizer = _Adam(
        learning_rate_schedule(joint.learning_rate, "cosine", total_steps, warmup),
        backbone_factor=joint.backbone_factor,
        head_layers=tuple(sorted(layers)),
        weight_decay=config.weight_decay or None,
    )
    windows = window_layer(model)
    at_full_rate = head.trainable_variables + ([] if windows is None else windows.variables)
    optimizer.full_rate = frozenset(map(id, at_full_rate))
    if config.weight_decay:
        keep_from_decay(optimizer, model)
    return optimizer


def _step(optimizer: Any, gradients: list[Any], variables: list[Any]) -> None:
    import torch

    with torch.no_grad():
        optimizer.apply(gradients, variables)


class _SeriesLoss:
    """The loss of a head on some series, as a function of the slice network's answers."""

    def __init__(
        self,
        head: Any,
        recipe: Recipe,
        config: ContextConfig,
        train: SeriesSet,
        chosen: np.ndarray,
    ) -> None:
        import keras

        self._head, self._weight = head, config.series_weight
        self._losses = sequence_losses(recipe.labels, config.series_weight)["loss"]
        inputs, truth = train.batch(chosen, config.learn_from)
        self._mask = inputs["mask"]
        self._inputs, self._truth = (
            {name: keras.ops.convert_to_tensor(one) for name, one in arrays.items()}
            for arrays in (inputs, truth)
        )

    def __call__(self, logits: "torch.Tensor", features: "torch.Tensor") -> "torch.Tensor":
        from ich_keras.models.torch.chunked import padded

        mask = self._mask
        inputs = self._inputs | {
            "features": padded(features, mask),
            "logits": padded(logits.clamp(-MOST_LOGIT, MOST_LOGIT), mask),
        }
        answers = self._head(inputs, training=True)
        of_slices, of_series = (
            self._losses[name](self._truth[name], answers[name]) for name in ("slices", "series")
        )
        return of_slices + self._weight * of_series


def _answered_again(tap: Any, recipe: Recipe, cache: CTCache, series: SeriesSet) -> SeriesSet:
    """Return series with the slice network's answers of now."""
    rows = np.concatenate(series.rows)
    features, logits = slice_answers(tap, recipe, cache, cache.samples(recipe.inputs.view), rows)
    require_finite_rows(features, logits, "the validation split")
    logits = np.clip(logits, -MOST_LOGIT, MOST_LOGIT)
    ends = np.cumsum([len(one) for one in series.rows])[:-1]
    parts = [
        (own, answer, places)
        for own, answer, (_, _, places) in zip(
            np.split(features, ends), np.split(logits, ends), series.parts, strict=True
        )
    ]
    return replace(series, parts=parts)
