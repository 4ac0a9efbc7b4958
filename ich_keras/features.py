"""Slice features: what a 2D network makes of every slice of a cache, computed once.

The network is that of a run, or a torch network of others. A computation that was interrupted
resumes: `<file>.partial` holds the finished blocks (`ich_keras.slice_features`).
"""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ich_keras import files
from ich_keras.counting import number_of
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.writer import write_at
from ich_keras.data.inputs import slice_input
from ich_keras.data.intensity import Intensity, intensity_of
from ich_keras.data.views import Samples
from ich_keras.environment import loaded_backend
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.evaluation import require_size
from ich_keras.inference import batches_of, load_run, network_digest
from ich_keras.labels import SIX, LabelSet, label_set
from ich_keras.progress import Progress
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder
from ich_keras.slice_features import (
    BLOCK,
    CRC,
    DONE,
    FEATURES,
    LOGITS,
    FeatureRecord,
    SliceFeatures,
    blocks,
    crc_of,
    create,
    num_blocks,
    read_at,
    read_record,
    require_finite_rows,
)

# Gives the features (n, features) and the logits (n, labels) of slices, by their numbers.
_Answer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class ForeignNetwork:
    """A torch network of others that makes features of slices, such as a foundation model.

    Args:
        module: takes float32 (n, channels, size, size) and gives (n, features), or more axes, over
            which the mean is taken after the second.
        name: what it is called.
        size: rows and columns of its input.
        intensity: from HU to its input: "windows", "wide", "head-z-score", or an `Intensity`.
        batch_size: slices per pass.
    """

    module: Any
    name: str
    size: int
    intensity: str | Intensity = "windows"
    batch_size: int = 32

    def digest(self) -> str:
        """Return the SHA-256 of its weights and its input, 64 digits."""
        content = hashlib.sha256(repr((self.size, intensity_of(self.intensity))).encode())
        for name, value in self.module.state_dict().items():
            values = np.ascontiguousarray(value.detach().cpu().float().numpy())
            content.update(f"{name}{values.shape}".encode())
            content.update(values.tobytes())
        return content.hexdigest()

    def features(self, hu: np.ndarray) -> np.ndarray:
        """Return the features of slices.

        Args:
            hu: int16 (n, rows, columns), HU.

        Returns:
            float32 (n, features).
        """
        import torch

        inputs = slice_input(hu, self.size, intensity_of(self.intensity))
        parameter = next(iter(self.module.parameters()), None)
        device = "cpu" if parameter is None else parameter.device
        was_training = self.module.training
        self.module.eval()
        with torch.inference_mode():
            found = self.module(torch.from_numpy(inputs).permute(0, 3, 1, 2).to(device))
        self.module.train(was_training)
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != len(hu):
            shown = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise UsageError(
                f"{self.name} gave {shown} for {number_of(len(hu), 'slice')}; expected a tensor"
                f" ({len(hu)}, features).",
                "Wrap it in a module that returns its pooled features.",
            )
        pooled = found.flatten(2).mean(2) if found.ndim > 2 else found
        return pooled.float().cpu().numpy()


def extract_features(
    run: RunFolder | Path | str,
    cache: CTCache,
    out: Path | str,
    half: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> SliceFeatures:
    """Compute features and logits of every slice of a cache with the network of a run.

    Args:
        run: a finished run on slices, stacks or slabs; a slab's features are those of its middle
            slice.
        cache: of the run's size; any patients.
        out: the new file.
        half: keep features in float16, half the space.
        device: None takes "auto".
        progress: called as progress("computing features", slices done, all slices).

    Returns:
        The features, read back.

    Raises:
        UsageError: `out` exists, the run is one on whole series, or the cache has another size.
        StaleError: the run is not finished, or `<out>.partial` is of another network or cache.
        DataError: the network gave values that are not finite.
    """
    run = RunFolder.at(run)
    recipe, model = load_run(run, device)
    view = recipe.inputs.view
    if view.kind == "series":
        raise UsageError(
            f"{run} answers whole series; features are of slices.",
            "Give a run on slices, stacks or slabs.",
        )
    require_size(recipe, cache)
    samples = recipe.inputs.samples(cache)
    tap = tapped_logits(model)

    def answer(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return slice_answers(tap, recipe, cache, samples, rows)

    record = _record_of(cache, network_digest(model), str(run), recipe.labels, half)
    return _computed(answer, record, Path(out), progress)


def extract_foreign_features(
    network: ForeignNetwork,
    cache: CTCache,
    out: Path | str,
    labels: LabelSet | None = None,
    half: bool = False,
    progress: Progress | None = None,
) -> SliceFeatures:
    """Compute features of every slice of a cache with a torch network of others.

    Args:
        network: an adapter around it.
        cache: any.
        out, half, progress: as for `extract_features`.
        labels: that a head will answer; None takes those of the cache, or RSNA's six. The logits
            are 0: the head learns from the features alone.

    Raises:
        UsageError: `out` exists, or the network gives no features.
        StaleError: `<out>.partial` is of another network or cache.
        DataError: the network gave values that are not finite.
    """
    if labels is None:
        labels = SIX if cache.labelling is None else cache.labels
    labels = label_set(labels)

    def answer(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            network.features(cache.slices_hu(rows[start : start + network.batch_size]))
            for start in range(0, len(rows), network.batch_size)
        ]
        features = np.concatenate(parts)
        return features, np.zeros((len(rows), len(labels)), np.float32)

    record = _record_of(cache, network.digest(), network.name, labels, half, is_foreign=True)
    return _computed(answer, record, Path(out), progress)


def slice_answers(
    tap: Any, recipe: Recipe, cache: CTCache, samples: Samples, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute features and logits of some slices.

    Args:
        tap: from `tapped_logits`.
        recipe: of the network's run.
        cache: what to read.
        samples: of the recipe's view.
        rows: int (n,), numbers of slices.

    Returns:
        Features (n, features) and logits (n, labels).
    """
    parts = [
        tap.predict_on_batch(_inputs(batch)) for batch in batches_of(recipe, cache, samples, rows)
    ]
    logits, features = (np.concatenate([np.asarray(p[n]) for p in parts]) for n in (0, 1))
    return features, logits


def tapped_logits(model: Any) -> Any:
    """Return a network that gives logits and pooled features in one pass; it shares all layers."""
    from ich_keras.models.layers import functional
    from ich_keras.models.steps import choose_step
    from ich_keras.models.weights import HEAD

    outputs = [model.get_layer(HEAD).output, model.get_layer("avgpool").output]
    return choose_step(functional(model.input, outputs, model.name))


def _inputs(batch: Any) -> Any:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    # Only with the torch backend does `predict_on_batch` accept the loaders' tensors.
    return inputs if loaded_backend() == "torch" else np.asarray(inputs)


def _record_of(
    cache: CTCache,
    network: str,
    source: str,
    labels: LabelSet,
    half: bool,
    is_foreign: bool = False,
) -> FeatureRecord:
    return FeatureRecord(
        network=network,
        source=source,
        cache=cache.fingerprint,
        pixels=cache.pixels_digest,
        labels=labels,
        count=len(cache),
        width=0,  # known with the first block
        dtype="float16" if half else "float32",
        is_foreign=is_foreign,
    )


def _computed(
    answer: _Answer, record: FeatureRecord, out: Path, progress: Progress | None
) -> SliceFeatures:
    """Compute what lacks, block by block, and give the finished file its name."""
    files.require_absent(out)
    partial = out.with_name(f"{out.name}.partial")
    # Not OUT.lock, which may be a file of the user's.
    with files.lock(out.with_name(f"{out.name}.partial.lock"), is_kept=False):
        if not partial.exists():
            first = answer(np.arange(min(BLOCK, record.count)))[0]
            create(partial, replace(record, width=int(first.shape[1])))
        there, offsets = read_record(partial)
        # A run folder may have been moved.
        own = replace(record, width=there.width, source=there.source)
        if there != own:
            raise StaleError(
                f"{partial} was begun with another network, cache or option.",
                "Remove it, or give another --out.",
            )
        _fill(partial, there, offsets, answer, progress)
        files.replace(partial, out)
    return SliceFeatures.open(out)


def _fill(
    partial: Path,
    record: FeatureRecord,
    offsets: dict[str, int],
    answer: _Answer,
    progress: Progress | None,
) -> None:
    done = read_at(partial, offsets[DONE], "u1", (num_blocks(record.count),))
    crc = read_at(partial, offsets[CRC], "<u4", (num_blocks(record.count),))
    features = read_at(partial, offsets[FEATURES], record.dtype, (record.count, record.width))
    logits = read_at(partial, offsets[LOGITS], "float32", (record.count, len(record.labels)))
    for number, rows in blocks(record.count):
        if progress is not None:
            progress("computing features", rows.start, record.count)
        # After a crash of the machine a mark may be older than what it stands for.
        if done[number] and crc_of(features, logits, rows) == crc[number]:
            continue
        found, own = answer(np.arange(rows.start, rows.stop))
        where = f"slices {rows.start} to {rows.stop - 1}"
        require_finite_rows(found, own, where)
        with np.errstate(over="ignore"):
            found = found.astype(record.dtype)
        if not np.isfinite(found).all():
            raise DataError(
                f"the features of {where} are too large for float16.", "Leave --half out."
            )
        own = own.astype(np.float32)
        row_bytes = record.width * found.dtype.itemsize
        write_at(partial, offsets[FEATURES] + rows.start * row_bytes, found)
        write_at(partial, offsets[LOGITS] + rows.start * own.shape[1] * 4, own)
        value = zlib.crc32(own.tobytes(), zlib.crc32(found.tobytes()))
        write_at(partial, offsets[CRC] + 4 * number, np.array([value], "<u4"))
        write_at(partial, offsets[DONE] + number, np.ones(1, np.uint8))
        files.fail_point(f"features {number}")
    if progress is not None:
        progress("computing features", record.count, record.count)
