"""Runs that nothing trained and a few series to predict, for tests of what predicts."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from narrow import preset_of

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.series import index_folder
from ich_keras.ct.tables import csv_text
from ich_keras.files import write_json
from ich_keras.labels import SIX
from ich_keras.metrics.aggregation import aggregate, choose_rule
from ich_keras.metrics.binary import truth_columns
from ich_keras.metrics.calibration import fit_temperature
from ich_keras.metrics.operating import choose_thresholds
from ich_keras.models.classifier import classifier
from ich_keras.models.weights import save_weights
from ich_keras.recipe import RECIPE, Recipe
from ich_keras.run_folder import RunFolder


def series_paths(images: Path, count: int) -> list[list[Path]]:
    """Files of the first series of a folder, slice by slice."""
    slices = index_folder(images).slices
    files = [group["container"].tolist() for _, group in slices.groupby("series_uid", sort=False)]
    return [list(map(Path, paths)) for paths in files[:count]]


def copy_series(images: Path, count: int, out: Path) -> Path:
    """Copy the files of the first series into a new folder."""
    out.mkdir(parents=True)
    for paths in series_paths(images, count):
        for path in paths:
            shutil.copy(path, out)
    return out


def untrained_run(folder, preset, spec, size=48, labels=SIX, **data):
    """Write what a finished run must have to predict; the weights are the initial ones."""
    run = RunFolder(folder)
    with preset_of(preset, spec):
        config = RunConfig(
            preset=preset,
            precision="float32",
            data=DataConfig(size=size, **data),
            fit=FitConfig(batch_size=16),
        )
        recipe = Recipe.of(config, size, labels)
    facts = {"cache": "none", "pixels": None}
    write_json(run.config_file, config.to_dict())
    write_json(run.recipe_file, recipe.to_dict())
    write_json(run.data_file, {**facts, "synthetic": True})
    network = classifier(recipe.network, precision="float32", labels=labels)
    save_weights(
        network, run.best_weights, {RECIPE: recipe.to_dict(), **facts, "labels": list(labels.names)}
    )
    run.report_file.write_text("done")
    return folder


def validated(folder, truth, values, uids, patients, is_series=False):
    """Write what an evaluation of the validation split leaves, and return the choices."""
    run = RunFolder(folder)
    labels = run.recipe().labels
    values = np.asarray(values, np.float32)
    table = pd.DataFrame(values, columns=list(labels.names))
    table.insert(0, "series_instance_uid", uids)
    if not is_series:
        table.insert(0, "sop_instance_uid", [f"1.{n}" for n in range(len(table))])
    table[truth_columns(labels)] = np.asarray(truth)
    table["patient_number"] = patients
    run.predictions_file("valid").write_text(csv_text(table))
    level = {
        "temperature": fit_temperature(truth, values, labels),
        "thresholds": choose_thresholds(truth, values, labels),
    }
    if is_series:
        choices = {"series": level}
    else:
        rule, losses = choose_rule(truth, values, uids, labels)
        whole = aggregate(truth, uids, "max", labels).to_numpy().astype(int)
        series = aggregate(values, uids, rule, labels).to_numpy()
        choices = {
            "aggregation": {"rule": rule, "chosen_on": "valid", "log_loss": losses},
            "slice": level,
            "series": {
                "temperature": fit_temperature(whole, series, labels),
                "thresholds": choose_thresholds(whole, series, labels),
            },
        }
    write_json(run.choices_file, choices)
    return choices
