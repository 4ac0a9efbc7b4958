"""Answers: calibrated probabilities, decisions, groups, slices to look at; and their refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from untrained_runs import copy_series, untrained_run, validated

from ich_keras.answer_rules import OperatingPoint, answer_rules
from ich_keras.answers import with_answers
from ich_keras.cli import main
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import write_json
from ich_keras.labels import LabelSet
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder
from ich_keras.prediction_journal import PredictionJournal
from ich_keras.prediction_tables import FolderPrediction
from ich_keras.run_checksums import write_checksums
from ich_keras.run_folder import RunFolder
from ich_keras.submission_file import write_submission

TWO = LabelSet(("bleed", "any"), "any")
THREE = LabelSet(("low grade", "middle", "high"), exclusive=True)
PATIENTS = 40


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run on slices with two labels and a validation of 40 patients, 3 slices each."""
    folder = tmp_path_factory.mktemp("two") / "run"
    spec = ModelSpec((16, 16, 3), depth=10, width=8)
    untrained_run(folder, "tiny", spec, size=16, labels=TWO)
    validated(folder, *rows_of(np.random.default_rng(0)))
    return folder


def rows_of(random):
    """Labels, probabilities, series and patients of 40 patients with 3 slices each."""
    patients = np.repeat(np.arange(PATIENTS), 3)
    bleeds = np.repeat(np.arange(PATIENTS) % 2, 3)
    truth = np.stack([bleeds * (np.arange(len(patients)) % 3 > 0)] * 2, axis=1)
    # Around what an untrained network says, so that every answer occurs.
    values = 0.5 + 0.1 * random.normal(size=truth.shape) + 0.1 * truth
    return truth, np.clip(values, 0.01, 0.99), [f"1.2.{p}" for p in patients], patients


@pytest.fixture
def copy(two, tmp_path):
    return Path(shutil.copytree(two, tmp_path / "copy"))


@pytest.fixture(scope="module")
def images(phantom_folder, tmp_path_factory):
    return copy_series(phantom_folder / "images", 2, tmp_path_factory.mktemp("two") / "images")


def prediction_of(values, labels=TWO, series=None, rule="max"):
    """A prediction of one series with these raw probabilities of its slices."""
    values = np.asarray(values, np.float32)
    names = list(labels.names)
    slices = pd.DataFrame(values, columns=names)
    for place, (name, column) in enumerate(
        {
            "sop_instance_uid": [f"9.{n}" for n in range(len(values))],
            "series_instance_uid": "9",
            "slice_index": range(len(values)),
            "path": "a.dcm",
            "instance_number": "1",
            "image_position_z_mm": 0.0,
        }.items()
    ):
        slices.insert(place, name, column)
    whole = values.max(axis=0) if rule == "max" else values.mean(axis=0)
    found = {"series_instance_uid": ["9"], **{n: [v] for n, v in zip(names, whole, strict=True)}}
    rejects = pd.DataFrame({"path": []})
    return FolderPrediction(slices, pd.DataFrame(found), rejects, "Notice.", labels)


def expected_thresholds(values, truth, wanted, is_sensitivity):
    """By trying every value: the highest that reaches the sensitivity, or the lowest one above."""
    values = values.astype(np.float32).astype(np.float64)
    if is_sensitivity:
        reach = [t for t in values if (values[truth == 1] >= t).mean() >= wanted - 1e-12]
        return max(reach)
    candidates = np.nextafter(values, np.inf)
    return min(t for t in candidates if (values[truth == 0] < t).mean() >= wanted - 1e-12)


@pytest.mark.parametrize(
    "asked",
    [{}, {"specificity": 0.95}, {"specificity": 0.8}, {"sensitivity": 0.95}, {"sensitivity": 1.0}],
)
def test_thresholds_are_those_of_every_value_tried(two, asked):
    rules = answer_rules(RunFolder(two), OperatingPoint(**asked))
    truth, values, _, _ = rows_of(np.random.default_rng(0))
    wanted = next(iter(asked.values()), 0.9)
    for column, label in enumerate(TWO.names):
        expected = expected_thresholds(
            values[:, column], truth[:, column], wanted, "sensitivity" in asked
        )
        assert rules.levels["slice"].thresholds[label] == expected
    # Series: the rule that the run chose, over three slices each.
    rule = json.loads((two / "choices.json").read_text())["aggregation"]["rule"]
    stacked = np.float64(np.float32(values[:, 1])).reshape(PATIENTS, 3)
    made = {
        "max": stacked.max(axis=1),
        "mean of the top 3": stacked.mean(axis=1),
        "noisy-or": 1 - (1 - stacked).prod(axis=1),
    }[rule]
    is_true = truth[:, 1].reshape(PATIENTS, 3).max(axis=1)
    limit = rules.levels["series"].thresholds["any"]
    rates = {
        "specificity": (made[is_true == 0] < limit),
        "sensitivity": made[is_true == 1] >= limit,
    }
    assert rates[next(iter(asked), "specificity")].mean() >= wanted - 1e-12


def test_tables_hold_what_the_rules_say(two):
    rules = answer_rules(RunFolder(two), OperatingPoint(error_rate=0.2))
    raw = np.array([[0.3, 0.2], [0.45, 0.9], [0.7, 0.55]], np.float32)
    found = with_answers(prediction_of(raw), rules)
    part = rules.levels["slice"]
    truth, values, _, patients = rows_of(np.random.default_rng(0))
    for column, label in enumerate(TWO.names):
        odds = (raw[:, column] / (1 - raw[:, column])) ** (1 / part.temperature)
        np.testing.assert_allclose(found.slices[label], odds / (1 + odds), rtol=1e-5)
        np.testing.assert_array_equal(found.slices[f"raw_{label}"], raw[:, column])
        expected = np.where(raw[:, column] >= part.thresholds[label], "yes", "no")
        assert found.slices[f"decision_{label}"].tolist() == expected.tolist()
        # Each patient counts once: the share of its slices of the class that look at most so.
        groups = []
        scores = values[:, column].astype(np.float32)
        for x in raw[:, column]:
            p = {}
            for wanted in (1, 0):
                own = [
                    np.mean((s <= x) if wanted else (s >= x))
                    for n in range(PATIENTS)
                    if len(s := scores[(patients == n) & (truth[:, column] == wanted)])
                ]
                p[wanted] = (1 + sum(own)) / (len(own) + 1)
            out = p[1] <= 0.2, p[0] <= 0.2
            groups.append({(True, False): "low", (False, True): "high"}.get(out, "unsure"))
        assert found.slices[f"group_{label}"].tolist() == groups
    series = found.series.iloc[0]
    limit = rules.levels["series"].thresholds["any"]
    assert series["raw_any"] == np.float32(0.9)
    assert series["decision_any"] == ("yes" if np.float32(0.9) >= limit else "no")
    assert series["group_any"] in ("low", "unsure", "high")


def test_series_are_ranked_by_rules_that_other_patients_chose(copy):
    """No fold is scored with a rule that its own patients had a say in."""
    random = np.random.default_rng(38)  # whose folds choose two rules
    truth, values, uids, patients = rows_of(random)
    validated(copy, truth, values, uids, patients)
    rules = answer_rules(RunFolder(copy), OperatingPoint(error_rate=0.2))
    values = values.astype(np.float32).astype(np.float64)
    made = {
        "max": lambda a: a.max(axis=0),
        "mean of the top 3": lambda a: np.sort(a, axis=0)[-3:].mean(axis=0),
        "noisy-or": lambda a: 1 - (1 - a).prod(axis=0),
    }
    is_true = truth.reshape(PATIENTS, 3, 2).max(axis=1)
    folds, chosen = np.arange(PATIENTS) % 5, []
    for fold in range(5):
        losses = {}
        for rule, function in made.items():
            p = np.stack([function(values[patients == n]) for n in range(PATIENTS)])[folds != fold]
            t = is_true[folds != fold]
            losses[rule] = -np.mean((t * np.log(p) + (1 - t) * np.log(1 - p)) @ [1 / 3, 2 / 3])
        chosen.append(min(losses, key=losses.get))
    assert len(set(chosen)) == 2
    assert rules.levels["series"].rules == tuple(chosen)
    raw = random.uniform(0.4, 0.8, (4, 2)).astype(np.float32)
    found = with_answers(prediction_of(raw), rules).series
    for column, label in enumerate(TWO.names):
        p = {}
        for wanted in (1, 0):
            count = 1
            for n in range(PATIENTS):
                function = made[chosen[n % 5]]
                score = function(values[patients == n])[column]
                new = function(raw.astype(np.float64))[column]
                like = score <= new if wanted else score >= new
                count += like and is_true[n, column] == wanted
            p[wanted] = count / (1 + (is_true[:, column] == wanted).sum())
        out = p[1] <= 0.2, p[0] <= 0.2
        expected = {(True, False): "low", (False, True): "high"}.get(out, "unsure")
        assert found[f"group_{label}"].tolist() == [expected]


def test_slices_to_look_at_first_are_those_of_the_label_that_is_yes(two):
    rules = answer_rules(RunFolder(two), OperatingPoint())
    raw = np.full((7, 2), 0.01, np.float32)
    raw[[1, 3, 5], 0] = 0.8, 0.95, 0.9
    # A series with bleed yes; nothing else is decided.
    found = with_answers(prediction_of(raw), rules).look_first
    assert found["label"].unique().tolist() == ["bleed"]
    assert found["sop_instance_uid"].tolist() == ["9.3", "9.5", "9.1", "9.0", "9.2"]
    assert found["rank"].tolist() == [1, 2, 3, 4, 5]
    assert set(found["decision"]) == {"yes"}
    # Where all is no: by "any", which stands for all.
    raw[:] = np.linspace(0.01, 0.02, 14).reshape(7, 2)
    found = with_answers(prediction_of(raw), rules).look_first
    assert found["label"].unique().tolist() == ["any"]
    assert found["sop_instance_uid"].tolist() == ["9.6", "9.5", "9.4", "9.3", "9.2"]
    assert set(found["decision"]) == {"no"}


def test_exclusive_labels_are_decided_on_what_the_network_gave(tmp_path):
    spec = ModelSpec((16, 16, 3), depth=10, width=8)
    run = untrained_run(tmp_path / "run", "tiny", spec, size=16, labels=THREE)
    random = np.random.default_rng(4)
    classes = np.repeat(np.arange(60) % 3, 2)
    truth = np.eye(3, dtype=int)[classes]
    values = np.exp(random.normal(size=truth.shape) + 1.5 * truth)
    values /= values.sum(axis=1, keepdims=True)
    patients = np.repeat(np.arange(60), 2)
    choices = validated(run, truth, values, [f"1.{p}" for p in patients], patients)
    assert choices["aggregation"]["rule"] == "mean"
    rules = answer_rules(RunFolder(run), OperatingPoint())
    raw = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], np.float32)
    found = with_answers(prediction_of(raw, THREE, rule="mean"), rules)
    temperature = choices["slice"]["temperature"]
    powers = raw.astype(np.float64) ** (1 / temperature)
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.slices[list(THREE.names)], expected, rtol=1e-5)
    for column, label in enumerate(THREE.names):
        limit = choices["slice"]["thresholds"]["0.90"][label]
        expected = np.where(raw[:, column] >= limit, "yes", "no").tolist()
        assert found.slices[f"decision_{label}"].tolist() == expected
    assert "threshold_calibrated" not in found.decisions["levels"]["slice"]["labels"]["middle"]


def test_a_folder_is_answered_and_says_how(two, images, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(
        main,
        f"predict --run {two} --dicom {images} --out {out} --sensitivity 0.9 --error-rate 0.2"
        " --workers 0 --device cpu".split(),
    )
    assert done.exit_code == 0, done.output
    slices, series = (pd.read_csv(out / f"{name}.csv") for name in ("predictions", "series"))
    kinds = ("", "raw_", "decision_", "group_")
    answers = [f"{kind}{label}" for kind in kinds for label in TWO.names]
    assert list(slices.columns)[-9:] == [*answers, "trained_on"]
    assert list(series.columns) == [
        "series_instance_uid",
        "num_slices",
        "verdict",
        "num_rejected",
        "num_averaged",
        "averaged_mm",
        "domain_distance",
        "domain",
        "contrast",
        "operated",
        "empty",
        *answers,
        "trained_on",
    ]
    content = json.loads((out / "decisions.json").read_text())
    assert content["operating_point"] == {"sensitivity": 0.9}
    assert content["error_rate"] == 0.2
    for level, table in (("slice", slices), ("series", series)):
        part = content["levels"][level]
        assert part["labels"]["any"]["positive_patients"] == PATIENTS / 2
        for label in TWO.names:
            limit = part["labels"][label]["threshold"]
            # Calibrated values are decided alike: a temperature keeps their order.
            calibrated = part["labels"][label]["threshold_calibrated"]
            for kind, at in (("raw_", limit), ("", calibrated)):
                is_near = np.isclose(table[f"{kind}{label}"], at, atol=1e-6)
                expected = np.where(table[f"{kind}{label}"] >= at, "yes", "no")
                assert (table[f"decision_{label}"] == expected)[~is_near].all()
            assert set(table[f"group_{label}"]) <= {"low", "unsure", "high"}
    first = pd.read_csv(out / "look_first.csv")
    assert set(first["series_instance_uid"]) == set(series["series_instance_uid"])
    notice = (out / "notice.txt").read_text()
    assert "Decisions per series: yes where raw_* is at least the highest threshold" in notice
    assert "sensitivity 0.9 on validation (bleed 0." in notice
    assert "low is wrong for about 20 % at most of those with the label" in notice
    assert "in the worst case for twice as many" in notice
    assert "void outside the training domain" in notice
    shown = " ".join(done.output.split())
    assert all(" ".join(line.split()) in shown for line in notice.splitlines())
    assert "series yes no low unsure high" in shown
    # RSNA's format takes what the network gave.
    with pytest.raises(DataError, match="lack the column.s. raw_epidural"):
        write_submission(slices, tmp_path / "s.csv")


def test_a_submission_takes_the_network_s_own_probabilities(tmp_path):
    names = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
    row = {"sop_instance_uid": "ID_1", **dict.fromkeys(names, 0.25)}
    row |= {f"raw_{name}": 0.75 for name in names}
    found = pd.read_csv(write_submission(pd.DataFrame([row]), tmp_path / "s.csv"))
    assert found["Label"].tolist() == [0.75] * 6


def test_a_run_without_choices_answers_with_what_the_network_gave(copy, images):
    (copy / "choices.json").unlink()
    found = predict_folder(copy, images)
    for label in TWO.names:
        np.testing.assert_array_equal(found.slices[label], found.slices[f"raw_{label}"])
        assert set(found.series[f"decision_{label}"]) == {""} == set(found.slices[f"group_{label}"])
    assert "without decisions and groups: the run has no choices made on validation" in found.notice
    with pytest.raises(StaleError, match="sensitivity 0.9 was asked for, but .* has no choices"):
        predict_folder(copy, images, sensitivity=0.9)


def test_a_run_whose_validation_is_lost_decides_without_groups(copy, tmp_path):
    (copy / "predictions-valid.csv").unlink()
    rules = answer_rules(RunFolder(copy), OperatingPoint())
    found = with_answers(prediction_of([[0.3, 0.9]]), rules)
    assert found.series["decision_any"].tolist() == ["yes"]
    assert found.series["group_any"].tolist() == [""]
    assert "No groups per series for bleed, any: the run has lost its pred" in found.notice
    assert "void outside" not in found.notice
    # Specificities that training keeps need no more; others do.
    assert answer_rules(RunFolder(copy), OperatingPoint(specificity=0.95)).levels
    with pytest.raises(StaleError, match=r"specificity 0\.8 was asked for, but .*does not exist"):
        answer_rules(RunFolder(copy), OperatingPoint(specificity=0.8))


def test_predictions_that_name_no_patient_give_no_groups(copy):
    path = copy / "predictions-valid.csv"
    pd.read_csv(path).drop(columns="patient_number").to_csv(path, index=False)
    rules = answer_rules(RunFolder(copy), OperatingPoint(sensitivity=0.8))
    assert rules.levels["slice"].thresholds["any"] is not None
    assert "do not say which are of one patient" in rules.levels["slice"].ungrouped["any"]
    assert any("--split valid makes them again" in line for line in rules.sentences())


def test_too_few_patients_are_told(copy):
    rules = answer_rules(RunFolder(copy), OperatingPoint(error_rate=0.01))
    found = with_answers(prediction_of([[0.3, 0.9]]), rules)
    assert found.series["group_any"].tolist() == [""]
    assert (
        "No groups per series for bleed, any: validation has 20 patients with it and 20 without, 99"
        " of each needed for an error rate of 0.01." in found.notice
    )
    told = found.decisions["levels"]["series"]["labels"]["any"]["no_groups"]
    assert told.startswith("validation has 20 patients")


def test_missing_labels_and_one_class_leave_the_decision_open(copy):
    truth, values, uids, patients = rows_of(np.random.default_rng(0))
    truth[:, 0] = 1  # no negative
    truth[:, 1] = np.where(truth[:, 1], -1, 0)  # no positive, some missing
    validated(copy, truth, values, uids, patients)
    rules = answer_rules(RunFolder(copy), OperatingPoint())
    found = with_answers(prediction_of([[0.3, 0.9]]), rules)
    assert found.slices["decision_bleed"].tolist() == [""]
    assert found.slices["decision_any"].tolist() == ["yes"]
    assert found.slices["group_any"].tolist() == [""]
    assert "None for bleed: validation has no negative slice." in found.notice
    rules = answer_rules(RunFolder(copy), OperatingPoint(sensitivity=0.9))
    assert rules.levels["slice"].thresholds["any"] is None
    assert "None for any: validation has no positive slice." in " ".join(rules.sentences())
    # A missing label is no negative one.
    rules = answer_rules(RunFolder(copy), OperatingPoint(specificity=0.5))
    known = np.sort(values[truth[:, 1] == 0, 1].astype(np.float32))
    half = np.float64(known[len(known) // 2 - 1])
    assert rules.levels["slice"].thresholds["any"] == np.nextafter(half, 1)


def test_a_split_of_slices_leaves_series_without_answers(copy):
    choices = json.loads((copy / "choices.json").read_text())
    write_json(copy / "choices.json", {"slice": choices["slice"]})
    rules = answer_rules(RunFolder(copy), OperatingPoint())
    found = with_answers(prediction_of([[0.3, 0.9]]), rules)
    assert found.slices["decision_any"].tolist() == ["yes"]
    assert found.series["decision_any"].tolist() == [""]
    assert found.series["any"].tolist() == found.series["raw_any"].tolist()
    assert "the run's split cuts series apart" in found.notice


def test_a_run_on_series_answers_per_series(tmp_path):
    spec = ModelSpec((12, 16, 16, 1), depth=10, width=8)
    run = untrained_run(
        tmp_path / "run", "tiny3d", spec, size=16, labels=TWO, view="series", slices=12
    )
    truth, values, uids, patients = rows_of(np.random.default_rng(0))
    truth, values, patients = truth[1::3], values[1::3], patients[1::3]
    choices = validated(run, truth, values, uids[1::3], patients, is_series=True)
    rules = answer_rules(RunFolder(run), OperatingPoint())
    prediction = prediction_of([[0.3, 0.9]])
    found = with_answers(
        FolderPrediction(None, prediction.series, prediction.rejects, "", TWO), rules
    )
    assert found.slices is None and found.look_first is None
    limit = choices["series"]["thresholds"]["0.90"]["any"]
    assert found.series["decision_any"].tolist() == ["yes" if limit <= 0.9 else "no"]
    assert found.series["group_any"].tolist() == ["high"]
    assert rules.levels["series"].rules == ("",)
    # Choices of a run on slices do not fit.
    write_json(run / "choices.json", {"slice": choices["series"]})
    with pytest.raises(StaleError, match="is of another run: its choices are of slice"):
        answer_rules(RunFolder(run), OperatingPoint())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sensitivity": 1.5}, "sensitivity 1.5; expected a share above 0, at most 1"),
        ({"sensitivity": 95}, "sensitivity 95; .* Give 0.95 for 95 %"),
        ({"specificity": 0.0}, "specificity 0.0; expected a share above 0"),
        ({"specificity": -0.1}, "specificity -0.1; expected"),
        ({"specificity": float("nan")}, "specificity nan; expected"),
        ({"sensitivity": "high"}, "sensitivity 'high'; expected"),
        ({"sensitivity": True}, "sensitivity True; expected"),
        ({"error_rate": 0.6}, "error rate 0.6; expected a share above 0, at most 0.5"),
        ({"error_rate": 10}, "error rate 10; .* Give 0.1 for 10 %"),
        ({"error_rate": 0}, "error rate 0; expected"),
        (
            {"sensitivity": 0.9, "specificity": 0.8},
            "specificity 0.8 and sensitivity 0.9 are both given; a threshold is chosen for one",
        ),
    ],
)
def test_operating_points_that_cannot_be_are_refused(two, images, tmp_path, asked, message):
    with pytest.raises(UsageError, match=message):
        predict_folder(two, images, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def changed(**changes):
    def change(choices):
        for name, value in changes.items():
            choices["slice"][name] = value

    return change


def renamed(choices):
    limits = choices["slice"]["thresholds"]["0.90"]
    choices["slice"]["thresholds"]["0.90"] = {"fracture": limits["bleed"], "any": limits["any"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(temperature=0), "choices.json is damaged: the temperature per slice is 0"),
        (changed(temperature="hot"), "the temperature per slice is 'hot'"),
        (changed(temperature=None), "the temperature per slice is None"),
        (changed(thresholds=[1]), r"the thresholds per slice are \[1\]"),
        (changed(thresholds={"x": {}}), "the thresholds per slice for 'x'"),
        (
            changed(thresholds={"0.90": {"bleed": 2.0, "any": 0.5}}),
            "the threshold of bleed per slice is 2.0",
        ),
        (renamed, "is of another run: its choices are for fracture, any, expected bleed, any"),
        (lambda choices: choices.pop("slice"), "is of another run: its choices are of series"),
    ],
)
def test_damaged_choices_and_those_of_another_run_are_refused(
    copy, images, tmp_path, change, message
):
    choices = json.loads((copy / "choices.json").read_text())
    change(choices)
    write_json(copy / "choices.json", choices)
    with pytest.raises(StaleError, match=message) as caught:
        predict_folder(copy, images, tmp_path / "out")
    assert "ich evaluate --run" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("any", 1.5, "a value is not a probability"),
        ("any", np.nan, "a value is not a probability"),
        ("any", "much", "is damaged"),
        ("true_any", 2, "a true label is none of 0, 1 and -1"),
        ("patient_number", "Doe", "patient_number does not hold whole numbers"),
        ("bleed", None, "is damaged: .*bleed"),
    ],
)
def test_damaged_predictions_on_validation_are_refused(copy, column, value, message):
    path = copy / "predictions-valid.csv"
    table = pd.read_csv(path)
    table = table.drop(columns=column) if value is None else table.assign(**{column: value})
    table.to_csv(path, index=False)
    with pytest.raises(StaleError, match=f"predictions-valid.csv is damaged.*{message}|{message}"):
        answer_rules(RunFolder(copy), OperatingPoint())
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(StaleError, match=r"predictions-valid.csv is damaged"):
        answer_rules(RunFolder(copy), OperatingPoint())


@pytest.mark.parametrize("name", ["choices.json", "predictions-valid.csv"])
def test_files_that_were_exchanged_since_are_refused(copy, images, tmp_path, name):
    run = RunFolder(copy)
    write_checksums(run, None, run.report_file.read_text())
    answer_rules(run, OperatingPoint())
    (copy / name).write_text((copy / name).read_text().replace("1", "2", 1))
    with pytest.raises(StaleError, match=f"{name} was changed after the training"):
        answer_rules(run, OperatingPoint())
    with pytest.raises(StaleError, match=f"{name} was changed after the training"):
        predict_folder(copy, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_are_those_of_the_call_that_finishes(two, images, tmp_path, monkeypatch):
    add = PredictionJournal.add

    def add_and_stop(journal, results):
        add(journal, results)
        raise KeyboardInterrupt

    monkeypatch.setattr(PredictionJournal, "add", add_and_stop)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(two, images, tmp_path / "out", batch_size=4)
    monkeypatch.undo()
    for out in ("out", "alone"):
        predict_folder(two, images, tmp_path / out, batch_size=4, sensitivity=0.8)
    found = [{p.name: p.read_bytes() for p in (tmp_path / o).iterdir()} for o in ("out", "alone")]
    assert found[0] == found[1]


def test_an_unfinished_training_answers_with_what_the_network_gave(copy, images, tmp_path):
    (copy / "report.md").unlink()
    found = predict_folder(copy, images, unfinished=True)
    assert "without decisions and groups: the training is unfinished." in found.notice
    assert set(found.series["decision_any"]) == {""}
    with pytest.raises(UsageError, match=r"specificity 0\.95 was asked for, but .* is unfinished"):
        predict_folder(copy, images, tmp_path / "out", unfinished=True, specificity=0.95)
    assert not (tmp_path / "out").exists()
