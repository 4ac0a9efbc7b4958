"""Several runs and turned inputs: means of logits by hand, what is written, what is refused."""

import json
import os
import shutil
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.special import expit, logit
from untrained_runs import copy_series, untrained_run

from ich_keras import prediction
from ich_keras.cli import main
from ich_keras.cli.results import predict
from ich_keras.ct.rejects import NothingUsable
from ich_keras.data.views import View
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import read_json, write_json
from ich_keras.inference import load_run, probabilities
from ich_keras.labels import LABELS, LabelSet
from ich_keras.metrics.logits import mean_answer
from ich_keras.metrics.smoothing import smooth
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import ModelSpec
from ich_keras.prediction import predict_folder
from ich_keras.prediction_journal import PredictionJournal
from ich_keras.prediction_members import averaged
from ich_keras.prediction_tables import FolderPrediction
from ich_keras.prediction_variants import TTA, tta_names, turns_of
from ich_keras.run_folder import RunFolder

KERNEL = "0.2 0.6 0.2"
COLUMNS = list(LABELS)
SLICES = ModelSpec((48, 48, 3), depth=10, width=8)
SLABS = replace(PRESETS["resnet10_3d_slab"].spec, input_shape=(3, 48, 48, 1), width=8)
SERIES = ModelSpec((20, 48, 48, 1), depth=10, width=8)


def made(folder, seed, spec, **data):
    keras.utils.set_random_seed(seed)
    return untrained_run(folder, f"narrow-{seed}", spec, **data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on slices and one on slabs; the first smooths."""
    place = tmp_path_factory.mktemp("runs")
    one = made(place / "one", 1, SLICES)
    two = made(place / "two", 2, SLICES)
    slab = made(place / "slab", 3, SLABS, view="slab", slices=3)
    write_json(
        one / "choices.json", {"smoothing": {"kernel": KERNEL}, "aggregation": {"rule": "noisy-or"}}
    )
    return one, two, slab


@pytest.fixture(scope="module")
def series_runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("series")
    return [made(place / str(seed), seed, SERIES, view="series", slices=20) for seed in (4, 5)]


@pytest.fixture(scope="module")
def images(phantom_folder, tmp_path_factory):
    return copy_series(phantom_folder / "images", 3, tmp_path_factory.mktemp("three") / "images")


@pytest.fixture(scope="module")
def alone(runs, images):
    return [predict_folder(run, images, batch_size=8) for run in runs]


@pytest.fixture(scope="module")
def ensemble(runs, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "out"
    told = []
    return out, predict_folder(runs, images, out, batch_size=8, tell=told.append), told


def test_the_mean_is_that_of_logits():
    one, two = np.array([[0.9, 0.2]]), np.array([[0.5, 0.2]])
    found = mean_answer([one, two], LabelSet(("a", "b")))
    np.testing.assert_allclose(found, [[0.75, 0.2]], rtol=1e-12)  # odds 9 and 1 -> 3
    random = np.random.default_rng(0)
    values = random.uniform(0.01, 0.99, (5, 40, 6))
    expected = expit(logit(values).mean(axis=0))
    np.testing.assert_allclose(mean_answer(list(values)), expected, rtol=1e-12)


def test_exclusive_labels_average_log_probabilities():
    labels = LabelSet(("a", "b", "c"), exclusive=True)
    one, two = np.array([[0.8, 0.1, 0.1]]), np.array([[0.2, 0.4, 0.4]])
    found = mean_answer([one, two], labels)
    powers = np.sqrt([[0.16, 0.04, 0.04]])
    np.testing.assert_allclose(found, powers / powers.sum(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("labels", [LabelSet(LABELS), LabelSet(LABELS, exclusive=True)])
def test_equal_answers_stay_as_they_are(dtype, count, labels):
    random = np.random.default_rng(1)
    values = random.uniform(size=(200, 6)).astype(dtype)
    values[:6] = np.eye(6)  # beyond what logits keep
    found = mean_answer([values] * count, labels)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_certain_answers_that_contradict_each_other_are_finite():
    values = mean_answer(
        [np.array([[0.0, 1.0, 0.5]]), np.array([[1.0, 1.0, 0.0]])], LabelSet(tuple("abc"))
    )
    np.testing.assert_allclose(values, [[0.5, 1.0, logit_mean(0.5, 1e-7)]], rtol=1e-6)


def logit_mean(*values):
    return expit(np.mean([logit(value) for value in values]))


def test_answers_of_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"answers of the shapes \(2, 6\), \(3, 6\); expected"):
        mean_answer([np.zeros((2, 6)), np.zeros((3, 6))])
    with pytest.raises(DataError, match="shapes none"):
        mean_answer([])


def test_an_ensemble_is_the_mean_of_its_members(alone, ensemble):
    _, found, told = ensemble
    for name in ("slices", "series"):
        # The mean is of what the networks give: a run's temperature is its own.
        raw = [f"raw_{column}" for column in COLUMNS]
        tables = [getattr(one, name)[raw].to_numpy() for one in alone]
        expected = expit(np.mean([logit(table.astype(float)) for table in tables], axis=0))
        np.testing.assert_allclose(getattr(found, name)[COLUMNS], expected, rtol=1e-5)
    # The other columns stay, but for the answers of a single run.
    answers = [
        column for column in alone[0].slices if column.startswith(("raw_", "decision_", "group_"))
    ]
    assert len(answers) == 3 * len(COLUMNS)
    pd.testing.assert_frame_equal(
        found.slices.drop(columns=COLUMNS), alone[0].slices.drop(columns=[*COLUMNS, *answers])
    )
    assert found.decisions is None and alone[0].decisions is not None
    assert found.slices[COLUMNS].dtypes.eq("float32").all()
    assert "3 runs: 3 times the computation of one run." in told
    for number, one in enumerate(alone):
        for name in ("slices", "series", "rejects"):
            pd.testing.assert_frame_equal(
                getattr(found.members[number], name), getattr(one, name), check_exact=True
            )


def test_what_an_ensemble_writes(runs, images, alone, ensemble, tmp_path):
    out, found, _ = ensemble
    assert sorted(path.name for path in out.iterdir()) == [
        *("members", "members.csv", "notice.txt", "predictions.csv", "rejects.csv", "series.csv"),
        "studies.csv",
    ]
    written = pd.read_csv(out / "predictions.csv")
    np.testing.assert_allclose(written[COLUMNS], found.slices[COLUMNS], rtol=1e-6)
    # Each member's folder is what it writes alone.
    predict_folder(runs[1], images, tmp_path / "alone", batch_size=8)
    for path in (tmp_path / "alone").iterdir():
        assert (out / "members" / "2" / path.name).read_bytes() == path.read_bytes()
    members = pd.read_csv(out / "members.csv", keep_default_na=False)
    assert members["run"].tolist() == ["one", "two", "slab"]
    assert members["view"].tolist() == ["slice", "slice", "slab"]
    assert members["smoothing"].tolist() == [KERNEL, "none", "none"]
    assert members["rule"].tolist() == ["noisy-or", "max", "max"]
    assert members["weights"].nunique() == 3
    notice = (out / "notice.txt").read_text()
    assert "Ensemble of 3 runs: the mean over their logits." in notice
    assert "no run's temperature or thresholds fit the mean" in notice
    assert "drawn phantoms only" in notice and "Ensemble" not in alone[0].notice


def test_one_run_in_a_list_is_that_run(runs, images, alone, tmp_path):
    found = predict_folder([runs[1]], images, tmp_path / "out", batch_size=8)
    for name in ("slices", "series", "rejects"):
        pd.testing.assert_frame_equal(
            getattr(found, name), getattr(alone[1], name), check_exact=True
        )
    assert found.notice == alone[1].notice and found.members == ()
    assert not (tmp_path / "out" / "members").exists()


def test_equal_members_average_to_themselves(alone):
    for count in (1, 2, 3):
        found = averaged([alone[0]] * count)
        pd.testing.assert_frame_equal(found.slices, alone[0].slices, check_exact=True)
        pd.testing.assert_frame_equal(found.series, alone[0].series, check_exact=True)


def test_a_run_smooths_what_it_predicts(runs, images, alone, tmp_path):
    plain = shutil.copytree(runs[0], tmp_path / "plain")
    write_json(plain / "choices.json", {"aggregation": {"rule": "noisy-or"}})  # an earlier run's
    raw = predict_folder(plain, images, batch_size=8).slices
    places = raw["series_instance_uid"], raw["position_mm"]
    expected = smooth(raw[COLUMNS].to_numpy(), *places, KERNEL)
    np.testing.assert_allclose(alone[0].slices[COLUMNS], expected, rtol=1e-6)
    assert not np.allclose(raw[COLUMNS], expected, rtol=1e-4)


def test_what_one_member_skips_is_in_no_mean(alone):
    uids = alone[0].series["series_instance_uid"]
    is_lost = alone[1].slices["series_instance_uid"] == uids[1]
    row = dict.fromkeys(alone[1].rejects.columns, "x") | {"path": "a.dcm", "code": "TILTED"}
    short = FolderPrediction(
        alone[1].slices[~is_lost],
        alone[1].series[alone[1].series["series_instance_uid"] != uids[1]],
        pd.DataFrame([row, row | {"path": "b.dcm"}]),
    )
    full = FolderPrediction(alone[0].slices, alone[0].series, pd.DataFrame([row]))
    for pair in ([full, short], [short, full]):
        found = averaged(pair)
        assert found.series["series_instance_uid"].tolist() == [uids[0], uids[2]]
        assert set(found.slices["series_instance_uid"]) == {uids[0], uids[2]}
        assert found.rejects["path"].tolist() == ["a.dcm", "b.dcm"]
        expected = mean_answer(
            [one.slices[~is_lost.to_numpy()][COLUMNS].to_numpy() for one in alone[:2]]
        )
        np.testing.assert_array_equal(found.slices[COLUMNS].to_numpy(), expected)
    none = FolderPrediction(short.slices.iloc[:0], short.series.iloc[:0], short.rejects)
    with pytest.raises(NothingUsable, match="no series was predicted by every run of the ensemble"):
        averaged([full, none])


def test_runs_on_whole_series_average_their_series(series_runs, images, tmp_path):
    found = predict_folder(series_runs, images, tmp_path / "out", batch_size=2)
    tables = [predict_folder(run, images, batch_size=2).series[COLUMNS] for run in series_runs]
    assert found.slices is None and not (tmp_path / "out" / "predictions.csv").exists()
    np.testing.assert_array_equal(
        found.series[COLUMNS].to_numpy(), mean_answer([table.to_numpy() for table in tables])
    )
    members = pd.read_csv(tmp_path / "out" / "members.csv")
    assert members["rule"].isna().all()


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_killed_ensemble_resumes_to_the_same_tables(runs, images, ensemble, tmp_path, stop):
    """Three series, three runs: nine groups."""
    out, add, done = tmp_path / "out", PredictionJournal.add, []

    def add_and_stop(journal, results):
        add(journal, results)
        done.append(results)
        if len(done) == stop:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PredictionJournal, "add", add_and_stop)
        predict_folder(runs, images, out, batch_size=8)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    # Neither fewer runs, nor another order, nor other options.
    for changed, match in (
        ({"run_dir": runs[0]}, "with ensemble (3 runs, .*); now it runs without ensemble"),
        ({"run_dir": runs[:2]}, "with ensemble (3 runs, .*); now it runs with ensemble (2 runs"),
        ({"tta": ("flip",)}, "without tta; now it runs with tta flip"),
    ):
        asked = {"run_dir": runs} | changed
        with pytest.raises(StaleError, match=match.replace("(", r"\(").replace(")", r"\)")):
            predict_folder(**asked, dicom_dir=images, out=out, batch_size=8)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    count = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictionJournal, "add", lambda *a: (add(*a), count.append(1)))
        predict_folder(runs, images, out, batch_size=8)
    assert len(count) == 9 - stop
    for path in (path for path in ensemble[0].rglob("*") if path.is_file()):
        assert (out / path.relative_to(ensemble[0])).read_bytes() == path.read_bytes()
    names = {path.name for path in out.rglob("*")}
    assert names == {path.name for path in ensemble[0].rglob("*")}


def test_starting_over_needs_one_file_removed(runs, images, ensemble, tmp_path):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*args):
            raise KeyboardInterrupt

        patch.setattr(prediction, "write_members", stop)
        predict_folder(runs, images, out, batch_size=8)
    (out / "prediction.journal").unlink()
    predict_folder(runs, images, out, batch_size=8)
    content = (out / "series.csv").read_bytes()
    assert content == (ensemble[0] / "series.csv").read_bytes()
    assert not list(out.glob("*.journal"))


def other_labels(run, folder, labels):
    """Copy a run, and say in its recipe that it was trained for other labels."""
    copy = RunFolder(shutil.copytree(run, folder))
    write_json(copy.recipe_file, read_json(copy.recipe_file) | {"labels": labels.to_dict()})
    return copy.path


def test_what_cannot_be_averaged_is_refused(runs, series_runs, images, tmp_path):
    one, two, slab = runs
    three = other_labels(two, tmp_path / "three", LabelSet(("a", "b", "c"), exclusive=True))
    turned = other_labels(two, tmp_path / "turned", LabelSet(LABELS[::-1], "any"))
    copied = shutil.copytree(two, tmp_path / "copied")
    unfinished = shutil.copytree(two, tmp_path / "unfinished")
    (unfinished / "report.md").unlink()
    link = tmp_path / "link"
    link.symlink_to(one)
    for given, tta, error, match in (
        ([], (), UsageError, "no run is given"),
        ([one, two, one], (), UsageError, "one is given twice"),
        ([one, link], (), UsageError, "link is given twice"),
        ([one, str(one) + os.sep], (), UsageError, "one is given twice"),
        ([two, copied], (), UsageError, "copied has the same weights as .*two: its answer would"),
        ([one, three], (), UsageError, "one answers epidural, .*, any, .*three one of a, b, c"),
        ([one, turned], (), UsageError, "turned any, subdural"),
        ([one, series_runs[0]], (), UsageError, "one answers per slice, .* per whole series"),
        ([series_runs[0], slab], (), UsageError, "answers per whole series, .*slab per slice"),
        ([one, unfinished], (), StaleError, "unfinished is not a finished run"),
        ([one, tmp_path / "absent"], (), StaleError, "absent is not a run folder"),
        ([one], ("rotate",), UsageError, "augmentation 'rotate'; expected some of flip, reverse"),
        ([one], "flip", UsageError, "tta is the text 'flip'; expected a sequence"),
        ([one], ("reverse",), UsageError, "'reverse' turns volumes upside down; a single slice"),
        ([slab, one], ("reverse",), UsageError, "a single slice has no order"),
    ):
        out = tmp_path / "new" / "out"
        with pytest.raises(error, match=match):
            predict_folder(given, images, out, tta=tta)
        assert not out.parent.exists()


def test_by_command(runs, images, tmp_path):
    args = ["predict", "--dicom", str(images), "--out", str(tmp_path / "out"), "--workers", "0"]
    both = [*args, "--run", str(runs[0]), "--run", str(runs[1])]
    result = CliRunner().invoke(main, [*both, "--tta", "flip"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "2 runs, 2 views of every input (plain, flip): 4 times the computation" in result.output
    assert "Test-time augmentation (flip): the mean over the logits." in result.output
    assert (tmp_path / "out" / "members" / "2" / "series.csv").is_file()
    again = [*args[:-3], str(tmp_path / "two"), "--run", str(runs[0]), "--run", str(runs[0])]
    result = CliRunner().invoke(main, again)
    assert result.exit_code == 2 and "is given twice" in result.output
    option = next(param for param in predict.params if param.name == "tta")
    assert list(option.type.choices) == list(TTA)


def test_unfinished_members_are_marked(runs, images, tmp_path):
    begun = shutil.copytree(runs[1], tmp_path / "begun")
    (begun / "report.md").unlink()
    found = predict_folder([runs[0], begun], images, unfinished=True, batch_size=8)
    assert found.notice.startswith("Unfinished: ")
    assert found.slices["unfinished"].str.startswith("Unfinished: ").all()
    assert "unfinished" not in found.members[0].slices
    assert not found.members[0].notice.startswith("Unfinished")


def test_an_ensemble_says_how_many_runs_know_only_phantoms(runs, images, tmp_path):
    real = RunFolder(shutil.copytree(runs[1], tmp_path / "real"))
    write_json(real.data_file, read_json(real.data_file) | {"synthetic": False})
    found = predict_folder([runs[0], real.path], images, batch_size=8)
    assert "1 of 2 runs were trained on drawn phantoms only." in found.notice
    assert set(found.series["trained_on"]) == {"head CT; 1 of 2 runs on drawn phantoms only"}
    assert set(found.members[1].series["trained_on"]) == {"head CT"}


def test_turns_by_hand():
    batch = np.arange(2 * 3 * 2 * 4 * 1).reshape(2, 3, 2, 4, 1)
    flip, reverse, both = turns_of(["flip", "reverse"])
    np.testing.assert_array_equal(flip(batch), batch[:, :, :, ::-1])
    np.testing.assert_array_equal(reverse(batch), batch[:, ::-1])
    np.testing.assert_array_equal(both(batch), batch[:, ::-1, :, ::-1])
    assert all(turn(batch).flags.c_contiguous for turn in (flip, reverse, both))
    flat = batch[:, 0]
    np.testing.assert_array_equal(turns_of(["flip"])[0](flat), flat[:, :, ::-1])
    assert turns_of([]) == ()
    assert tta_names(["reverse", "flip", "flip"], View("slab", 3)) == ("flip", "reverse")


@pytest.mark.parametrize(("which", "tta"), [(1, ("flip",)), (2, ("flip", "reverse"))])
def test_turned_inputs_are_averaged(runs, which, tta):
    """By hand: the network asked for each view by itself."""
    _, model = load_run(runs[which])
    random = np.random.default_rng(0)
    batch = random.normal(size=(4, *model.input_shape[1:])).astype("float32")
    found = probabilities(model, [batch], 4, turns=turns_of(tta))
    views = [batch, batch[..., ::-1, :]]
    if "reverse" in tta:
        views += [view[:, ::-1] for view in views]
    answers = [probabilities(model, [np.ascontiguousarray(view)], 4) for view in views]
    expected = expit(np.mean([logit(answer.astype(float)) for answer in answers], axis=0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, answers[0], rtol=1e-5)

    same = batch + batch[..., ::-1, :]  # symmetric inputs: nothing to average
    same = same + same[:, ::-1] if "reverse" in tta else same
    plain = probabilities(model, [same], 4)
    np.testing.assert_array_equal(probabilities(model, [same], 4, turns=turns_of(tta)), plain)


def test_tta_is_off_by_default_and_told(runs, images, alone, tmp_path):
    found = predict_folder(runs[1], images, tmp_path / "out", batch_size=8, tta=("flip",))
    assert not np.allclose(found.slices[COLUMNS], alone[1].slices[COLUMNS], rtol=1e-5)
    notice = (tmp_path / "out" / "notice.txt").read_text()
    assert "Test-time augmentation (flip): the mean over the logits." in notice
    assert "augmentation" not in alone[1].notice


def test_the_journal_holds_the_augmentation(runs, images, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*args):
            raise KeyboardInterrupt

        patch.setattr(prediction, "write_tables", stop)
        predict_folder(runs[2], images, tmp_path, batch_size=8, tta=("reverse", "flip"))
    line = (tmp_path / "prediction.journal").read_bytes().splitlines()[1].decode()
    assert '"tta"' in line and "flip, reverse" in line
    with pytest.raises(StaleError, match="with tta flip, reverse; now it runs without tta"):
        predict_folder(runs[2], images, tmp_path, batch_size=8)
    assert json.dumps("flip, reverse") in line
