"""Training a sequence head on slice features: a new run, the slice network's with a context.

The new run folder is a copy of the run that made the features, with the head in it. Its choices,
metrics, predictions and reports are made anew, from the answers of both together.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ich_keras import files
from ich_keras.context import END_TO_END, write_context
from ich_keras.context_fitting import (
    STATE,
    ContextConfig,
    SeriesSet,
    choose_blend,
    fit_head,
    series_set,
)
from ich_keras.course import Course
from ich_keras.data.cache.cache import CTCache
from ich_keras.end_to_end import STATE as BOTH_STATE
from ich_keras.end_to_end import JointConfig, fit_both, require_trainable_together
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.evaluation import require_members, require_pixels
from ich_keras.inference import load_run, network_digest
from ich_keras.keras_settings import require_trainable_settings
from ich_keras.labels import LabelSet
from ich_keras.progress import Progress, Tell
from ich_keras.run_folder import RunFolder
from ich_keras.slice_features import SliceFeatures
from ich_keras.training import finish

# Of the slice network's run: what its training was, not what was made of it.
_COPIED = (
    "config.json", "recipe.json", "environment.json", "data.json", "split.json", "seen.npz",
    "weights.json", "history.csv", "best.weights.h5",
)  # fmt: skip


def train_context(
    features: SliceFeatures | Path | str,
    cache: CTCache,
    out: Path | str,
    config: ContextConfig | None = None,
    run: RunFolder | Path | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
    joint: JointConfig | None = None,
) -> Path:
    """Train a sequence head, choose its share on validation, and evaluate both networks together.

    Args:
        features: of the cache's slices, from `ich_keras.features`.
        cache: the one that the slice network was trained on, with labels.
        out: the new run folder.
        config: see `ContextConfig`.
        run: the slice network's run; None takes the folder that the features name.
        device: None takes "auto".
        progress: called as progress("training the head", steps, all steps, "epoch 1/30").
        tell: called with a line of text per epoch, and on the shares.
        joint: then train head and slice network together (`ich_keras.end_to_end`); None leaves the
            slice network as it is.

    Returns:
        The run folder.

    Raises:
        UsageError: `out` exists, the features are of a foreign network, or the run cannot be
            trained end to end.
        StaleError: features, cache and run do not belong together, or the run is not finished.
        DataError: a split has no series, or none with the labels that it shall learn from.
        DivergedError: a loss is not finite.
    """
    config, tell = config or ContextConfig(), tell or (lambda line: None)
    require_trainable_settings()
    out = files.require_absent(out)
    if not isinstance(features, SliceFeatures):
        features = SliceFeatures.open(features)
    features.require_cache(cache)
    source = _source(features, run)
    if joint is not None:
        require_trainable_together(source.recipe())
    # Small gradients would need scaling in float16.
    is_half = joint is not None and source.recipe().precision == "float16"
    recipe, model = load_run(source, device, "float32" if is_half else None)
    network = network_digest(model)
    labels = _require_fitting(features, source, network, recipe.labels, cache)
    sets = {part: _split_set(source, part, features, cache, labels) for part in ("train", "valid")}
    partial = out.with_name(f"{out.name}.partial")
    # Not OUT.lock, which may be a file of the user's.
    with files.lock(out.with_name(f"{out.name}.partial.lock"), is_kept=False):
        partial.mkdir(parents=True, exist_ok=True)
        if joint is None and (partial / BOTH_STATE).is_file():
            raise StaleError(
                f"{partial} was begun end to end.",
                f"Go on with --end-to-end, or remove {partial} to begin again.",
            )
        head, facts = fit_head(sets, config, labels, features, partial, progress, tell)
        if joint is not None:
            what = files.fingerprint([asdict(config), asdict(features.record) | {"source": ""}])
            sets["valid"], facts[END_TO_END] = fit_both(
                head, recipe, model, cache, sets, config, joint, what, partial, progress, tell
            )
            facts[END_TO_END]["began_with"] = network
            network = network_digest(model)
        blend, losses = choose_blend(head, sets["valid"], labels, config.learn_from)
        shown = ", ".join(f"{n} {b:g}" for n, b in zip(labels.names, blend, strict=True))
        tell(f"Share of the head in the logits, chosen on validation: {shown}.")
        for name in _COPIED:
            if (source.path / name).is_file():
                shutil.copy2(source.path / name, partial / name)
        if network != features.record.network:
            _save_network(model, source, partial)
        facts |= {"blend_log_loss": losses, "chosen_on": "valid"}
        spec = config.spec(features.record.width)
        write_context(partial, head, spec, labels, blend, network, facts)
        finish(RunFolder(partial), recipe, cache, progress, tell, Course())
        for state in (STATE, BOTH_STATE):
            (partial / state).unlink(missing_ok=True)
        files.replace(partial, out)
    return out


def _save_network(model: Any, source: RunFolder, folder: Path) -> None:
    """Write the weights of a slice network that was trained on, with the record of its run's."""
    from ich_keras.models.layers import functional
    from ich_keras.models.weights import HEAD, save_weights
    from ich_keras.models.weights_file import read_record

    record = read_record(source.best_weights)
    logits = functional(model.input, model.get_layer(HEAD).output, model.name)
    save_weights(logits, RunFolder(folder).best_weights, record)


def _source(features: SliceFeatures, run: RunFolder | Path | str | None) -> RunFolder:
    if features.record.is_foreign:
        raise UsageError(
            f"{features.path} holds features of {features.record.source}, a network of others: a"
            " run needs one of ours.",
            "Train a head on them in Python: ich_keras.models.sequence.",
        )
    found = RunFolder.at(run if run is not None else features.record.source)
    if not found.path.is_dir():
        raise UsageError(
            f"the run {found}, whose network made {features.path}, is not there.",
            "Say where it is now: --run RUN.",
        )
    return found.require_finished()


def _require_fitting(
    features: SliceFeatures, run: RunFolder, network: str, labels: LabelSet, cache: CTCache
) -> LabelSet:
    if features.record.network != network:
        raise StaleError(
            f"{features.path} holds features of another network than that of {run}.",
            f"Compute them again: ich features --run {run} --cache {cache.path} --out FILE.",
        )
    if cache.labels != labels:
        raise DataError(
            f"{cache.path} has the labels {cache.labels}; the run was trained for {labels}.",
            "Give the labels of the training.",
        )
    return labels


def _split_set(
    run: RunFolder, part: str, features: SliceFeatures, cache: CTCache, labels: LabelSet
) -> SeriesSet:
    members = run.split()
    require_members(members, part, cache)
    require_pixels(run, members, part, cache)
    found = series_set(features, cache, members.indices(cache.slices, part, labels), labels)
    if not len(found):
        raise DataError(
            f"no whole series of {cache.path} is in the {part} split of {run}.",
            "A sequence head needs splits by patient or series.",
        )
    return found
