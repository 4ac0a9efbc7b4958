"""What a training was, for its stored result: of a run, and of a sequence head on one."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from experiments.heads import (
    END_TO_END,
    built_head,
    cost_of,
    features_cost,
    head_operations,
    head_record,
    padded_lengths,
)
from experiments.place import Place
from experiments.runs import RUNS
from experiments.settle import RunCost
from ich_keras.data.cache.cache import CTCache
from ich_keras.labels import ANY, LABELS, SIX
from ich_keras.metrics.aggregation import aggregate, head_of
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
from ich_keras.run_folder import RunFolder


@dataclass(frozen=True)
class Trained:
    """What a training was, for result.json.

    Args:
        environment: where and when it began, with the machine.
        fit: settings to show; they replace those of the configuration.
        history: history.csv, as text.
        seconds: of the training alone.
        peak_bytes: see `memory.Peak`; None where it was not recorded.
        best_epoch: whose weights were kept, from 1.
        samples_seen, steps: samples and optimiser steps.
        operations: multiply-adds of the training alone.
        more: further entries.
    """

    environment: dict[str, Any]
    fit: dict[str, Any]
    history: str
    seconds: float
    peak_bytes: dict[str, int | None] | None
    best_epoch: int
    samples_seen: int
    steps: int
    operations: int
    more: dict[str, Any] = field(default_factory=dict)


def of_run(place: Place, key: str, seed: int, cost: RunCost) -> Trained:
    """Return the training of a run on slices, slabs or series."""
    run = RunFolder(place.run_dir(key, seed))
    history = pd.read_csv(run.history_file)
    samples = cost.samples_per_epoch * len(history)
    return Trained(
        environment=run.environment(),
        fit={},
        history=run.history_file.read_text(encoding="utf-8"),
        seconds=float(history["seconds"].sum()),
        peak_bytes=cost_of(place, key, seed).get("peak_bytes"),
        best_epoch=run.best_epoch(),
        samples_seen=samples,
        steps=run.data()["plan"]["total_steps"] // run.recipe().training.accumulate,
        operations=3 * samples * cost.operations_per_sample,
    )


def of_head(place: Place, key: str, seed: int, cache: CTCache, cost: RunCost) -> Trained:
    """Return the training of a sequence head, with what it stands on beside it."""
    run, on = RunFolder(place.run_dir(key, seed)), RUNS[key].on
    assert on is not None
    own, features, record = (
        cost_of(place, key, seed),
        features_cost(place, on, seed),
        head_record(run),
    )
    config, joint = record["config"], record.get(END_TO_END)
    history = pd.DataFrame(record["history"])
    best_epoch = record["best_epoch"]
    if joint is not None:
        # Epochs of both together follow those of the head alone; 0 keeps what they began with.
        both = pd.DataFrame(joint["history"])
        best_epoch = len(history) + joint["best_epoch"] if joint["best_epoch"] else best_epoch
        both["epoch"] += len(history)
        history = pd.concat([history, both], ignore_index=True)
    # Heads are judged by their loss; only the answers of both networks together have an AUROC.
    history["valid_auroc_any"] = np.nan
    split, head = run.split(), built_head(record)
    lengths = {
        part: padded_lengths(
            cache.slices.iloc[split.indices(cache.slices, part)].groupby("series_uid").size()
        )
        for part in ("train", "test")
    }
    of_head = {
        part: [head_operations(head, int(length)) for length in found]
        for part, found in lengths.items()
    }
    num_series = record["num_series"]["train"]
    of_training = 3 * config["epochs"] * sum(of_head["train"])
    seen, steps = num_series * config["epochs"], _steps(num_series, config)
    if joint is not None:
        # A chunk of slices is computed once more for its gradient.
        slices = 4 * split.indices(cache.slices, "train").size * cost.operations_per_sample
        epochs = joint["config"]["epochs"]
        of_training += epochs * (slices + 3 * sum(of_head["train"]))
        seen, steps = seen + num_series * epochs, steps + _steps(num_series, joint["config"])
    tested = int(split.indices(cache.slices, "test").size)
    below = of_run(place, on, seed, cost)
    _, metrics = evaluated(RunFolder(place.run_dir(on, seed)), "test")
    return Trained(
        environment=own.get("environment", {}),
        fit={name: config[name] for name in ("batch_size", "epochs", "learning_rate")}
        | {"accumulate": 1},
        history=history.to_csv(index=False, lineterminator="\n"),
        seconds=own.get("seconds", 0.0) + features.get("seconds", 0.0),
        peak_bytes=_highest(own.get("peak_bytes"), features.get("peak_bytes")),
        best_epoch=best_epoch,
        samples_seen=seen,
        steps=steps,
        operations=of_training + len(cache.slices) * cost.operations_per_sample,
        more={
            "head": {
                "config": config,
                "share": dict(zip(LABELS, record["blend"], strict=True)),
                "end_to_end": joint and {k: joint[k] for k in ("config", "best_epoch")},
            },
            "predicting_operations": round(
                (sum(of_head["test"]) + tested * cost.operations_per_sample) / len(of_head["test"])
            ),
            # The slice network that it stands on, as it was trained here. Where the stored result
            # of that run is of an earlier training, the two may differ.
            "on": {
                "key": on,
                "started": below.environment.get("started"),
                "seconds": round(below.seconds, 1),
                "peak_bytes": below.peak_bytes,
                "training_operations": below.operations,
                "metrics": {
                    level: {"log_loss": part["log_loss"], "auroc_any": part["auroc"][ANY]}
                    for level, part in metrics.items()
                },
            },
        },
    )


def _steps(num_series: int, config: dict[str, Any]) -> int:
    return -(-num_series // config["batch_size"]) * config["epochs"]


def _highest(*peaks: dict[str, int | None] | None) -> dict[str, int | None] | None:
    """Return the highest of several peaks; None where one was not recorded."""
    found = [peak for peak in peaks if peak is not None]
    if len(found) < len(peaks):
        return None
    return {
        name: max(values) if (values := [p[name] for p in found if p[name] is not None]) else None
        for name in found[0]
    }


def evaluated(run: RunFolder, split: str) -> tuple[pd.DataFrame, dict]:
    """Return a finished run's predictions and metrics of a split, without smoothing."""
    found = run.metrics(split)
    assert found is not None  # a finished run has been evaluated
    table = pd.read_csv(run.predictions_file(split), dtype={"sop_instance_uid": str})
    return unsmoothed(table, found)


def unsmoothed(table: pd.DataFrame, metrics: dict) -> tuple[pd.DataFrame, dict]:
    """Return predictions and metrics without smoothing along z.

    The experiments compare what networks answer, also with results of before there was smoothing.
    The report shows it as a control, with one kernel for all.
    """
    columns = [f"unsmoothed_{label}" for label in LABELS]
    if columns[0] not in table:
        return table, metrics
    values, truth = table[columns].to_numpy(), table[list(TRUTH_COLUMNS)].to_numpy()
    of_levels = {"slice": (truth, values)}
    if "series" in metrics:
        uids = table["series_instance_uid"].tolist()
        rule, head = metrics["series"]["aggregation"]["rule"], head_of(table, SIX)
        series = aggregate(values, uids, rule, head=head).to_numpy()
        of_levels["series"] = (aggregate(truth, uids).to_numpy().astype(int), series)
    found = {}
    for level, part in metrics.items():
        prevalence = part["baseline"]["prevalence"]["probabilities"]
        again = binary_metrics(*of_levels[level], [prevalence[label] for label in LABELS])
        found[level] = part | again
    table = table.drop(columns=list(LABELS))
    return table.rename(columns=dict(zip(columns, LABELS, strict=True))), found
