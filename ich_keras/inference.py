"""Loading a run's network and computing probabilities, for validation, evaluation, prediction."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ich_keras.environment import choose_backend, choose_device, loaded_backend
from ich_keras.errors import DataError, StaleError
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics.logits import mean_answer
from ich_keras.progress import Progress
from ich_keras.recipe import RECIPE, Recipe
from ich_keras.run_checksums import require_unchanged
from ich_keras.run_edits import require_unedited
from ich_keras.run_folder import CACHE, PIXELS, RunFolder

if TYPE_CHECKING:
    from ich_keras.data.cache.cache import CTCache
    from ich_keras.data.views import Samples

# Columns that identify the slice of a prediction.
SLICE_COLUMNS = ("sop_instance_uid", "series_instance_uid", "slice_index", "position_mm")
# In the predictions of a split: which rows are of one patient. It counts from 0; no PatientID.
PATIENT_COLUMN = "patient_number"


def load_run(
    run: RunFolder | Path | str,
    device: str | None = None,
    precision: str | None = None,
    unfinished: bool = False,
) -> tuple[Recipe, Any]:
    """Load the network of a run with its best weights.

    Args:
        run: a run folder.
        device: None takes "auto"; it may differ from the device of the training.
        precision: None takes the run's, but bfloat16 only where the hardware supports it.
        unfinished: take the best weights so far of a training that was interrupted or still runs;
            `RunFolder.notice` says which.

    Returns:
        (the recipe as adapted to this machine, a keras.Model that gives probabilities).

    Raises:
        StaleError: the run is not finished, its recipe and weights do not match, or one of them
            was changed since.
        DataError: the weights are damaged.
    """
    return load_network(RunFolder.at(run).require_finished(unfinished), device, precision)


def load_network(
    run: RunFolder, device: str | None = None, precision: str | None = None
) -> tuple[Recipe, Any]:
    """Load the network of a run that need not be finished; see `load_run`."""
    run.require_begun()
    if not run.is_finished:
        require_unedited(run)
    recipe = run.recipe()
    recipe = recipe.on(choose_backend(), choose_device(device or "auto"))
    from ich_keras.models.classifier import classifier
    from ich_keras.models.weights import load_weights

    labels = recipe.labels
    model = classifier(recipe.network, precision=precision or recipe.precision, labels=labels)
    loaded = load_weights(model, run.best_weights, recipe.network, needs_head=True, labels=labels)
    _require_own_weights(run, loaded.record)
    if run.is_finished:
        require_unchanged(run, loaded.digest)
    return recipe, model


def _require_own_weights(run: RunFolder, record: dict) -> None:
    """Refuse weights of another training, or a recipe that is not theirs."""
    hint = "One of the two files was replaced: copy the original run folder again."
    made_with = record.get(RECIPE)
    if made_with is None or _settings(Recipe.from_dict(made_with)) != _settings(run.recipe()):
        raise StaleError(
            f"{run.recipe_file} is not the recipe that {run.best_weights.name} was trained with.",
            hint,
        )
    data = run.data()
    if record.get(CACHE) != data[CACHE] or record.get(PIXELS) != data.get(PIXELS):
        raise StaleError(
            f"{run.best_weights} was trained on another cache than {run.data_file.name} names.",
            hint,
        )


def _settings(recipe: Recipe) -> Recipe:
    """Return a recipe without the place of the training, which may change when it is resumed."""
    return replace(recipe, backend="", device="", precision="")


def network_digest(model: Any) -> str:
    """Return the SHA-256 of all weights of a network as they are in memory, 64 digits."""
    import keras

    content = hashlib.sha256()
    for variable in model.weights:
        values = np.ascontiguousarray(keras.ops.convert_to_numpy(variable))
        content.update(f"{values.dtype}{values.shape}".encode())
        content.update(values.tobytes())
    return content.hexdigest()


@dataclass(frozen=True, eq=False)
class Tap:
    """A network that gives its pooled features beside its answer, in one pass.

    Args:
        model: with two outputs; it shares all layers with the network.
    """

    model: Any

    def answer(self, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the answer to a batch (n, labels) and its pooled features (n, features)."""
        answer, features = self.model.predict_on_batch(inputs)
        return np.asarray(answer, np.float32), np.asarray(features, np.float32)


def tapped(model: Any) -> Tap:
    """Tap a network of ours before its head; it takes the same steps, on every backend."""
    from ich_keras.models.steps import choose_step

    return Tap(choose_step(with_features(model)))


def with_features(model: Any) -> Any:
    """Return a network of ours with a second output: its pooled features (n, features)."""
    from ich_keras.models.layers import functional

    features = model.get_layer("avgpool").output
    return functional(model.input, [model.output, features], model.name)


def batches_of(
    recipe: Recipe, cache: "CTCache", samples: "Samples", chosen: np.ndarray, **settings: Any
) -> Any:
    """Make batches of a run's samples, as its recipe says.

    Args:
        recipe: of the run.
        cache: what to read.
        samples: of the recipe's view.
        chosen: int (n,), numbers of samples.
        settings: further ones of `ich_keras.data.batches.view_batches`.

    Returns:
        Its loader.
    """
    from ich_keras.data.batches import view_batches

    return view_batches(
        cache,
        recipe.inputs.view,
        chosen,
        recipe.training.batch_size,
        size=recipe.inputs.size,
        intensity=recipe.inputs.intensity,
        samples=samples,
        workers=recipe.training.loader_workers,
        device=recipe.batch_device,
        **settings,
    )


def probabilities(
    model: Any,
    batches: Iterable,
    total: int,
    progress: Progress | None = None,
    step: str = "predicting",
    turns: Sequence[Callable[[np.ndarray], np.ndarray]] = (),
    tap: Tap | None = None,
    take: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Run a network over batches.

    Args:
        model: gives logits or probabilities, float32 (n, labels).
        batches: of inputs (n, size, size, channels) or (n, slices, size, size, channels), or of
            (inputs, labels).
        total: number of samples, for the progress.
        progress: called as progress(step, done, total).
        step: name of the step in the progress.
        turns: of test-time augmentation: the answers to the inputs as they are, and to what each
            makes of them, are averaged over their logits. The inputs must then be NumPy arrays.
        tap: of the same network; computes the answers to the inputs as they are, and features.
        take: called with the features of each batch, float32 (n, features), in order.

    Returns:
        float32 (total, labels), probabilities in the order of the model's labels.

    Raises:
        DataError: the network gave values that are not finite.
    """
    from ich_keras.models.classifier import ends_in_logits, labels_of

    parts, done = [], 0
    if progress is not None:
        progress(step, 0, total)
    # Only with the torch backend does `predict_on_batch` accept the loaders' tensors.
    takes_tensors = loaded_backend() == "torch"
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        inputs = inputs if takes_tensors else np.asarray(inputs)
        views = [inputs, *(turn(inputs) for turn in turns)]
        answers = []
        if tap is not None:
            answer, features = tap.answer(views.pop(0))
            answers.append(answer)
            if take is not None:
                take(features)
        answers += [np.asarray(model.predict_on_batch(view), np.float32) for view in views]
        parts.append(np.stack(answers))
        done += len(answers[0])
        if progress is not None:
            progress(step, done, total)
    labels = labels_of(model)
    nothing = np.zeros((1 + len(turns), 0, len(labels)), np.float32)
    outputs = np.concatenate(parts, axis=1) if parts else nothing  # (views, samples, labels)
    if not np.isfinite(outputs).all():
        count = int((~np.isfinite(outputs)).any(axis=(0, 2)).sum())
        raise DataError(
            f"{count} of {outputs.shape[1]} predictions are not finite.",
            "The weights or the inputs are damaged.",
        )
    if ends_in_logits(model) and labels.exclusive:
        powers = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        outputs = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)
    elif ends_in_logits(model):
        # Written with tanh, which cannot overflow.
        outputs = (0.5 * (1.0 + np.tanh(0.5 * outputs))).astype(np.float32)
    return mean_answer(list(outputs), labels) if turns else outputs[0]


def probability_table(
    slices: pd.DataFrame, values: np.ndarray, labels: LabelSet = SIX
) -> pd.DataFrame:
    """Add probabilities to the table of their slices.

    Args:
        slices: rows of a SeriesIndex' or cache's slice table.
        values: float32 (len(slices), labels).
        labels: their order.

    Returns:
        `SLICE_COLUMNS`, then one column per label. `series_instance_uid` ends in "#2", "#3" where
        one UID holds several volumes.
    """
    table = slices[[*SLICE_COLUMNS]].reset_index(drop=True)
    table["series_instance_uid"] = slices["series_uid"].to_numpy()
    return pd.concat([table, pd.DataFrame(values, columns=list(labels.names))], axis=1)
