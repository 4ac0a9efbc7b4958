"""Runs that nothing trained, with all that a training and its evaluation leave behind."""

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from narrow import preset_of

from ich_keras.config import DataConfig, RunConfig
from ich_keras.ct.tables import csv_text
from ich_keras.data.split import Split
from ich_keras.files import write_json
from ich_keras.inference import PATIENT_COLUMN
from ich_keras.labels import SIX
from ich_keras.levels import Level, choose, scored
from ich_keras.metrics.binary import truth_columns
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import RECORD
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder

SLICES_PER_SERIES = 4
SHARE = 0.07  # of slices with a label
SLICES = ModelSpec((16, 16, 3), depth=10, width=4)
SERIES = ModelSpec((20, 16, 16, 1), depth=10, width=4)


def answers(labels=SIX, num_series=24, seed=0, skill=1.5):
    """Draw truth and probabilities of slices: int8 and float32 (slices, labels)."""
    random = np.random.default_rng(seed)
    count = num_series * SLICES_PER_SERIES
    if labels.exclusive:
        # Classes of whole series.
        classes = np.repeat(random.integers(0, len(labels), num_series), SLICES_PER_SERIES)
        truth = np.eye(len(labels), dtype=np.int8)[classes]
        powers = np.exp(random.normal(skill * truth, 1.0))
        return truth, (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    truth = (random.random((count, len(labels))) < SHARE).astype(np.int8)
    if labels.any_label is not None:
        others = [n for n, name in enumerate(labels.names) if name != labels.any_label]
        truth[:, labels.any_column] = truth[:, others].max(axis=1)
    logits = random.normal(skill * (2 * truth - 1) - 0.5, 1.5)
    return truth, (1 / (1 + np.exp(-logits))).astype(np.float32)


def _begun_run(folder, spec, labels, view):
    """Write settings, and a file of weights that holds a record alone: nothing here predicts."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    with preset_of("tiny", spec):
        data = DataConfig(size=16, **view)
        config = RunConfig(preset="tiny", precision="float32", data=data)
        recipe = Recipe.of(config, 16, labels)
    write_json(run.config_file, config.to_dict())
    write_json(run.recipe_file, recipe.to_dict())
    with h5py.File(run.best_weights, "w") as file:
        file.attrs[RECORD] = json.dumps({"epoch": 2})
    run.report_file.write_text("done")
    return run


def made_run(
    folder: Path, labels=SIX, is_series=False, seed=0, data_seed=0, test="t", synthetic=True, **data
) -> RunFolder:
    """Write a run that was tested on the answers drawn with a seed.

    Args:
        folder: a new one.
        labels, is_series: of the run.
        seed: of its probabilities.
        data_seed: of the truth.
        test: the first letter of its test series' names.
        synthetic: what data.json says.
        data: entries of data.json.
    """
    view = {"view": "series", "slices": 20} if is_series else {}
    run = _begun_run(folder, SERIES if is_series else SLICES, labels, view)
    truth, _ = answers(labels, seed=data_seed)
    values = answers(labels, seed=data_seed, skill=1 + seed)[1]
    count = len(truth) // SLICES_PER_SERIES
    uids = np.repeat([f"{test}{number}" for number in range(count)], SLICES_PER_SERIES)
    patients = np.repeat(np.arange(count) // 2, SLICES_PER_SERIES)
    level = Level(truth, values, patients.astype(str), labels)
    rule = "mean" if labels.exclusive else "max"
    whole = level.aggregated(uids, rule)
    choices = {"slice": choose(level), "series": choose(whole)}
    levels = {"series": whole} if is_series else {"slice": level, "series": whole}
    if not is_series:
        choices |= {"aggregation": {"rule": rule, "chosen_on": "valid"}}
    shares = truth.mean(axis=0).tolist()
    metrics = {name: scored(part, shares, choices[name]) for name, part in levels.items()}
    if not is_series:
        metrics["series"]["aggregation"] = choices["aggregation"]
    write_json(run.choices_file, choices)
    write_json(run.metrics_file("test"), metrics)
    table = pd.DataFrame(levels["series" if is_series else "slice"].values, columns=labels.names)
    truths = levels["series" if is_series else "slice"].truth
    if is_series:
        table.insert(0, "series_instance_uid", pd.unique(uids))
        patients = patients[::SLICES_PER_SERIES]
    else:
        table.insert(0, "series_instance_uid", uids)
        table.insert(0, "sop_instance_uid", [f"{uid}.{n}" for n, uid in enumerate(uids)])
    table[truth_columns(labels)] = truths
    table[PATIENT_COLUMN] = patients
    run.predictions_file("test").write_text(csv_text(table))
    members = {"train": ("a",), "valid": ("b",), "test": tuple(sorted(set(uids)))}
    Split("patient", 0, "series_uid", members).save(run.split_file)
    plan = {f"num_{what}": dict.fromkeys(members, 3) for what in ("patients", "series", "slices")}
    plan |= {"warning": "", "note": "", "weights": "", "num_positive": {labels.names[0]: 1}}
    record = {"cache": "none", "pixels": None, "synthetic": synthetic, "plan": plan}
    write_json(run.data_file, record | data)
    write_json(run.environment_file, {"backend": "torch", "device": "cpu", "versions": {"a": "1"}})
    rows = [[1, 1e-3, 0.7, 0.6, 0.6, 2.0], [2, 1e-3, 0.5, 0.55, 0.7, 2.5]]
    columns = ["epoch", "learning_rate", "train_loss", "valid_log_loss"]
    columns += [f"valid_auroc_{labels.shown}", "seconds"]
    run.history_file.write_text(pd.DataFrame(rows, columns=columns).to_csv(index=False))
    return run
