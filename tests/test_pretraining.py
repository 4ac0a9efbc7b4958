"""Phantoms as pretraining: whose patients, what is written, what the page says of it."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from narrow import preset_of
from sklearn.metrics import roc_auc_score

from ich_keras.data.split import audit, split_by_patient
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.labels import ANY, LABELS
from ich_keras.metrics.intervals import mean_paired_bootstrap
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import read_weights

# Not installed: it runs from a clone.
sys.path.append(str(Path(__file__).parents[1]))

from experiments import pretraining
from experiments.__main__ import main
from experiments.pretraining import AS_IT_IS, STARTS, Answered, Measured, few_patients, scores_of
from experiments.pretraining_page import page_text, write_page
from experiments.pretraining_plans import PLANS, resized, tiny

PLAN = tiny(PLANS["resnet18_2d"])


def slice_table(count=40):
    """Slices of patients, every third of whom bleeds on some."""
    rows = [
        {
            "patient_id": f"P{patient:02d}",
            "study_instance_uid": f"T{patient}",
            "series_uid": f"S{patient}",
            "sop_instance_uid": f"ID_{patient}_{number}",
            **dict.fromkeys(LABELS, int(patient % 3 == 0 and number > 1)),
        }
        for patient in range(count)
        for number in range(4)
    ]
    return pd.DataFrame(rows)


def test_half_of_the_few_patients_bleed_and_the_rest_stays():
    slices = slice_table()
    whole = split_by_patient(slices, 0)
    few = few_patients(whole, slices, 6)
    audit(few, slices)
    train = slices.iloc[few.indices(slices, "train")]
    assert train["patient_id"].nunique() == 6
    assert train.groupby("patient_id")[ANY].max().sum() == 3
    for part in ("valid", "test"):
        assert few.members[part] == whole.members[part]
    assert few_patients(whole, slices, 6) == few
    assert few_patients(split_by_patient(slices, 1), slices, 6).members != few.members
    with pytest.raises(DataError, match="training patients are bleeding; expected 20"):
        few_patients(whole, slices, 40)


def test_plans_differ_in_seed_and_style_and_can_be_resized():
    for plan in PLANS.values():
        assert plan.source.seed != plan.target.seed
        assert plan.source.mix != plan.target.mix
        assert plan.source.slice_spacing_mm[1] <= plan.target.slice_spacing_mm[0]
        assert len(plan.seeds) >= 3 and plan.patients <= 16
    assert resized(PLAN, None, None, None) == PLAN
    other = resized(PLAN, 50, 64, 9)
    assert (other.source.num_series, other.size, other.epochs) == (50, 64, 9)
    assert other.target == PLAN.target


def test_a_work_folder_is_of_one_plan(tmp_path):
    pretraining._claim(PLAN, tmp_path / "work")
    pretraining._claim(PLAN, tmp_path / "work")
    with pytest.raises(StaleError, match="was made by another pretraining"):
        pretraining._claim(replace(PLAN, epochs=7), tmp_path / "work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty"):
        pretraining._claim(PLAN, tmp_path / "mine")
    with pytest.raises(UsageError, match=r"expected one that ends in \.weights\.h5"):
        pretraining.measure(PLAN, tmp_path / "new", tmp_path / "weights.h5")
    assert not (tmp_path / "new").exists()


def answered(seed, quality, patients=40):
    random = np.random.default_rng(seed)
    truth = np.repeat(random.random((patients * 3, 1)) < 0.4, 6, axis=1).astype(int)
    values = np.clip(0.5 + quality * (truth - 0.5) + random.normal(0, 0.2, truth.shape), 0.01, 0.99)
    names = np.repeat([f"SECRET{n:02d}" for n in range(patients)], 3)
    return Answered(truth, values, names, np.char.add("S", names))


def measured(seeds=3, patients=40, real=None):
    answers = {
        start: [answered(seed, quality, patients) for seed in range(seeds)]
        for start, quality in zip((*STARTS, AS_IT_IS), (0.05, 0.4, 0.2), strict=True)
    }
    rows = [
        {"start": start, "seed": seed, **scores_of(one)}
        | {"counting voxels, AUROC per slice": 0.5, "learning rate": 3e-4}
        for start, group in answers.items()
        for seed, one in enumerate(group)
    ]
    record = {"auroc_any_of_other_phantoms": {"slice": 0.9}, "patients": {"train": 1500}}
    plan = replace(PLAN, seeds=tuple(range(seeds)))
    scores = pd.DataFrame(rows)
    scores.loc[scores["start"] == AS_IT_IS, "learning rate"] = np.nan
    return Measured(plan, Path("w.weights.h5"), record, scores, answers, real)


def test_scores_are_those_of_scikit_learn():
    one = answered(0, 0.3)
    found = scores_of(one)
    truth, values = one.truth[:, -1], one.values[:, -1]
    assert found["AUROC of any per slice"] == pytest.approx(roc_auc_score(truth, values))
    series = pd.DataFrame({"t": truth, "v": values}).groupby(one.series).max()
    expected = roc_auc_score(series["t"], series["v"])
    assert found["AUROC of any per series"] == pytest.approx(expected)
    loss = -np.log(np.where(one.truth == 1, one.values, 1 - one.values)).mean()
    assert found["log loss per slice"] == pytest.approx(loss)


def test_the_page_compares_both_starts_and_claims_nothing(tmp_path, monkeypatch):
    fewer = partial(mean_paired_bootstrap, resamples=40)
    monkeypatch.setattr("experiments.pretraining_page.mean_paired_bootstrap", fewer)
    real = pd.DataFrame(
        {
            "rank": [1, 2, 3],
            "probability": [0.9, 0.5, 0.1],
            "series": [1, 2, 3],
            "label": ["subdural", "", "no bleed"],
        }
    )
    made = measured(real=real)
    text = page_text(made)
    assert "They say nothing about patients." in text and "Too small" not in text
    assert "SECRET" not in write_page(tmp_path, made).read_text()
    pairs = [
        (one.truth, one.values, other.values, one.patients)
        for one, other in zip(made.answers["pretrained"], made.answers["scratch"], strict=True)
    ]
    row = fewer(pairs)["auroc/any"]
    bounds = f"{row['low']:.3f} to {row['high']:.3f}"
    assert f"| AUROC of any | {row['value']:.3f} | {bounds} |" in text
    assert row["value"] > 0
    # Those with a label are shown, with their rank among all.
    assert "| 1 | subdural | 0.9000 |" in text and "| 3 | no bleed | 0.1000 |" in text
    assert "| 2 |" not in text and "3 real slices" in text
    assert "None were given" in page_text(measured())
    assert "**Too small for any conclusion**: 2 seed(s), 40" in page_text(measured(seeds=2))
    assert "3 seed(s), 12 test patients" in page_text(measured(patients=12))
    table = pd.read_csv(tmp_path / "scores.csv")
    assert table["start"].tolist() == [s for s in (*STARTS, AS_IT_IS) for _ in range(3)]


def test_the_command_refuses_labels_without_slices(tmp_path):
    done = CliRunner().invoke(main, ["pretrain", "--tiny", "--real-labels", __file__])
    assert done.exit_code == 2 and "--real-labels given without --real" in done.output


@pytest.mark.slow
def test_weights_are_made_and_measured(tmp_path, monkeypatch, phantom_folder):
    with preset_of("narrow", ModelSpec((48, 48, 3), depth=10, width=4)):
        monkeypatch.setitem(PLANS, "resnet18_2d", replace(PLANS["resnet18_2d"], preset="narrow"))
        work = tmp_path / "work"
        words = ["pretrain", "--tiny", "--work", str(work), "--device", "cpu", "--threads", "1"]
        words += ["--real", str(phantom_folder / "images")]
        words += ["--real-labels", str(phantom_folder / "stage_2_train.csv")]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        file = read_weights(work / "phantoms_resnet18_2d.weights.h5")
        assert file.digest is not None
        record = file.record
        assert (record["licence"], record["synthetic"]) == ("Apache-2.0", True)
        assert record["phantoms"]["seed"] == PLAN.source.seed
        assert record["patients"]["train"] > 0 and "say nothing about patients" in record["note"]
        text = (work / "results" / "README.md").read_text()
        assert "Too small for any conclusion" in text
        assert "no bleed" in text and "ID_" not in text
        # Finished parts are taken as they are.
        monkeypatch.setattr("ich_keras.training.train", None)
        before = (work / "results" / "scores.csv").read_bytes()
        again = CliRunner().invoke(main, words)
        assert again.exit_code == 0, again.output
        assert (work / "results" / "scores.csv").read_bytes() == before
        other = CliRunner().invoke(main, [*words, "--epochs", "2"])
        assert other.exit_code == 6 and "was made by another pretraining" in other.output
