"""Predictions of thin series are those of the thick series that they average to."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from test_prediction_resume import blank_tail, interrupted, tables
from untrained_runs import copy_series, untrained_run, validated

import ich_keras
from ich_keras.cli import main
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.reading import indexed_slices, read_indexed
from ich_keras.data.split_record import Split
from ich_keras.data.thin_series import SliceDistances
from ich_keras.errors import StaleError, UsageError
from ich_keras.external import evaluate_external
from ich_keras.files import write_json
from ich_keras.labels import LABELS
from ich_keras.metrics.logits import mean_answer
from ich_keras.models.spec import ModelSpec
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.phantom.plan import PhantomSpec, make_phantom
from ich_keras.prediction import predict_folder
from ich_keras.run_folder import RunFolder
from ich_keras.workflow import make_cache, prepare_index

COLUMNS = list(LABELS)
RAW = [f"raw_{name}" for name in LABELS]
SIDE = 64
THIN_MM, THICK_MM = (1.0, 4.0, 4.0), (5.0, 4.0, 4.0)
OLD = "Thin series were not averaged: the run does not say"


def with_distances(run, lower_mm, usual_mm=None):
    """Say in a run how far apart the slices of its training were."""
    path = RunFolder(run).data_file
    facts = json.loads(path.read_text())
    facts["slice_spacing_mm"] = SliceDistances(lower_mm, usual_mm or lower_mm).record()
    write_json(path, facts)
    return run


def make_run(folder, view="slice", usual_mm=5.0, width=8):
    if view == "slice":
        spec, data = ModelSpec((SIDE, SIDE, 3), depth=10, width=width), {}
    else:
        slices = {"slab": 9, "series": 20}[view]
        spec = ModelSpec((slices, SIDE, SIDE, 1), depth=10, width=width)
        data = {"view": view, "slices": slices}
    run = untrained_run(folder, f"narrow-{view}", spec, size=SIDE, **data)
    return with_distances(run, usual_mm)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on slices, on slabs and on series, trained on slices 5 mm apart."""
    folder = tmp_path_factory.mktemp("runs")
    return {view: make_run(folder / view, view) for view in ("slice", "slab", "series")}


@pytest.fixture(scope="module")
def thin():
    """60 slices of a phantom, 1 mm apart."""
    spec = PhantomSpec(4, 1, 0, ("subdural",), matrix=SIDE, slice_spacing_mm=(1.0, 1.0))
    return make_phantom(spec).hu[15:75]


@pytest.fixture(scope="module")
def thick(thin):
    """The same in 5 mm: the mean of each five slices."""
    return np.rint(thin.reshape(12, 5, SIDE, SIDE).mean(axis=1)).astype(np.int16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a thin series, 1 mm, and two thick ones."""
    place = tmp_path_factory.mktemp("both")
    for seed, spacing in ((1, (1.0, 1.0)), (2, (5.0, 5.0))):
        write_phantoms(place / str(seed), seed, seed=seed, matrix=SIDE, slice_spacing_mm=spacing)
    images = place / "images"
    images.mkdir()
    for path in place.glob("[12]/images/*.dcm"):
        shutil.copy(path, images)
    labels = pd.concat([pd.read_csv(place / name / "stage_2_train.csv") for name in "12"])
    labels.to_csv(place / "labels.csv", index=False)
    return images, place / "labels.csv"


@pytest.mark.parametrize("view", ["slice", "slab", "series"])
def test_a_thin_series_has_the_answer_of_the_thick_one(runs, thin, thick, view):
    run = runs[view]
    # Noisy-or and neighbours tell whether an averaged slice counts once.
    if view != "series":
        choices = {"aggregation": {"rule": "noisy-or"}, "smoothing": {"kernel": "0.3 0.4 0.3"}}
        write_json(RunFolder(run).choices_file, choices)
    found = ich_keras.predict_arrays(run, {"head": thin}, THIN_MM)
    expected = ich_keras.predict_arrays(run, {"head": thick}, THICK_MM)
    kept = ich_keras.predict_arrays(run, {"head": thin}, THIN_MM, thin="keep")
    values = found.series[COLUMNS].to_numpy()
    np.testing.assert_allclose(values, expected.series[COLUMNS].to_numpy(), rtol=1e-6)
    assert not np.allclose(values, kept.series[COLUMNS].to_numpy(), rtol=1e-4)
    facts = ["num_slices", "num_averaged", "averaged_mm"]
    assert found.series[facts].values.tolist() == [[60, 12, 5.0]]
    assert expected.series[facts].fillna(-1).values.tolist() == [[12, 0, -1]]
    assert kept.series[facts].fillna(-1).values.tolist() == [[60, 0, -1]]
    assert "1 of 1 series were averaged to slices 5 mm apart" in found.notice
    assert "predicted as they are (thin: keep)" in kept.notice
    assert "Thin series" not in expected.notice
    if view != "series":
        assert len(found.slices) == len(kept.slices) == 60
        assert found.slices["averaged_slice"].tolist() == np.repeat(np.arange(12), 5).tolist()
        assert kept.slices["averaged_slice"].isna().all()
        np.testing.assert_allclose(
            found.slices[COLUMNS], np.repeat(expected.slices[COLUMNS].to_numpy(), 5, 0), rtol=1e-6
        )
        RunFolder(run).choices_file.unlink()


def test_answers_of_a_thin_series_are_those_of_the_thick_one(thin, thick, tmp_path):
    run = make_run(tmp_path / "run")
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (200, 6))
    truth[:, 5] = truth[:, :5].max(axis=1)
    uids = np.repeat([f"1.{n}" for n in range(40)], 5)
    validated(run, truth, random.uniform(0.4, 0.6, (200, 6)), uids, np.repeat(np.arange(40), 5))
    found = ich_keras.predict_arrays(run, {"head": thin}, THIN_MM)
    expected = ich_keras.predict_arrays(run, {"head": thick}, THICK_MM)
    answers = [name for name in found.series if name.startswith(("decision_", "group_"))]
    assert len(answers) == 12
    assert found.series[answers].equals(expected.series[answers])
    np.testing.assert_allclose(found.series[RAW], expected.series[RAW], rtol=1e-6)
    # Where to look: other places, not five times the same tissue.
    look = found.look_first[found.look_first["label"] == found.look_first["label"].iloc[0]]
    other = expected.look_first[expected.look_first["label"] == look["label"].iloc[0]]
    assert look["slice_index"].tolist() == (5 * other["slice_index"] + 2).tolist()
    assert found.studies["num_averaged"].tolist() == [12]


def test_series_that_are_not_thin_are_untouched(runs, phantom_folder, tmp_path):
    written = {}
    images = copy_series(phantom_folder / "images", 4, tmp_path / "images")
    for choice in ("average", "keep"):
        predict_folder(runs["slice"], images, tmp_path / choice, thin=choice)
        written[choice] = tables(tmp_path / choice)
    assert written["average"] == written["keep"]
    series = pd.read_csv(tmp_path / "keep" / "series.csv")
    assert (series["num_averaged"] == 0).all() and series["averaged_mm"].isna().all()


def test_a_run_of_before_does_not_average_and_says_so(runs, thin, tmp_path):
    old = shutil.copytree(runs["slice"], tmp_path / "old")
    facts = json.loads((old / "data.json").read_text())
    del facts["slice_spacing_mm"]
    write_json(old / "data.json", facts)
    found = ich_keras.predict_arrays(old, {"head": thin}, THIN_MM)
    kept = ich_keras.predict_arrays(runs["slice"], {"head": thin}, THIN_MM, thin="keep")
    np.testing.assert_array_equal(found.slices[COLUMNS], kept.slices[COLUMNS])
    assert found.series["num_averaged"].tolist() == [0]
    assert OLD in found.notice
    silent = ich_keras.predict_arrays(old, {"head": thin}, THIN_MM, thin="keep")
    assert "Thin" not in silent.notice
    for damage in ({"median": 5.0}, [5.0]):
        write_json(old / "data.json", facts | {"slice_spacing_mm": damage})
        with pytest.raises(StaleError, match=r"data\.json is damaged: slice_spacing_mm: "):
            predict_folder(old, old, tmp_path / "out")


def sorted_series(images, uid):
    """The files of a series and their HU, inferior to superior."""
    index = index_folder(images)
    is_own = (index.slices["series_uid"] == uid).to_numpy()
    hu = [
        read_indexed(one, SIDE).hu
        for one, own in zip(indexed_slices(index), is_own, strict=True)
        if own
    ]
    return index.slices[is_own], np.stack(hu)


def test_holes_end_an_average_whether_files_are_absent_or_broken(runs, folder, tmp_path):
    images = shutil.copytree(folder[0], tmp_path / "images")
    series = index_folder(images).series
    uid = series["series_uid"][series["slice_spacing_mm"].idxmin()]
    slices, hu = sorted_series(images, uid)
    paths = [images / name for name in slices["container"]]
    paths[12].unlink()
    blank_tail(paths[40])
    for other in slices["container"].index[41:]:
        (images / slices["container"][other]).unlink()
    found = predict_folder(runs["slice"], images)
    own = found.slices[found.slices["series_instance_uid"] == uid]
    assert len(own) == 39
    # Parts of 12 and 27 slices: 6 + 6; then 6 + 5 + 5 + 5 + 6 mm.
    numbers = own["averaged_slice"].to_numpy(int)
    assert np.bincount(numbers).tolist() == [6, 6, 6, 5, 5, 5, 6]
    kept = np.delete(np.arange(40), 12)
    means = [np.rint(hu[kept[numbers == n]].mean(axis=0)) for n in range(7)]
    # One by one: what it makes of single slices does not depend on their distance.
    arrays = {f"n{n}": np.stack([mean] * 3).astype(np.int16) for n, mean in enumerate(means)}
    for n, hu_of in enumerate(arrays.values()):
        hu_of[0, 0, 0] += n  # equal volumes are refused
    alone = ich_keras.predict_arrays(runs["slice"], arrays, THICK_MM).slices
    middle = alone.groupby("series_instance_uid", sort=False).nth(1)
    order = middle["path"].str.extract(r"n(\d)", expand=False).astype(int)
    expected = middle.iloc[np.argsort(order)][COLUMNS].to_numpy()
    np.testing.assert_allclose(own[COLUMNS], expected[numbers], rtol=1e-5)


def test_the_order_of_files_does_not_matter(runs, folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    paths = sorted(folder[0].iterdir())
    for path, other in zip(paths, paths[::-1], strict=True):
        shutil.copy(path, images / other.name)
    one, other = (predict_folder(runs["slab"], place) for place in (folder[0], images))
    joined = one.slices.merge(other.slices, on="sop_instance_uid")
    assert len(joined) == len(one.slices)
    for name in COLUMNS:
        np.testing.assert_allclose(joined[f"{name}_x"], joined[f"{name}_y"], rtol=1e-5)
    assert joined["averaged_slice_x"].equals(joined["averaged_slice_y"].rename("averaged_slice_x"))


@pytest.mark.parametrize(("view", "groups"), [("slice", 1), ("slice", 2), ("series", 1)])
def test_an_interrupted_prediction_resumes_byte_by_byte(runs, folder, tmp_path, view, groups):
    size = {"batch_size": 1}
    predict_folder(runs[view], folder[0], tmp_path / "whole", **size)
    out = interrupted(runs[view], folder[0], tmp_path / "out", groups, **size)
    with pytest.raises(StaleError) as caught:
        predict_folder(runs[view], folder[0], out, thin="keep", **size)
    assert "with averaging thin series (2.5 to 5 mm); now it runs without" in str(caught.value)
    predict_folder(runs[view], folder[0], out, **size)
    assert tables(out) == tables(tmp_path / "whole")


def test_each_run_of_an_ensemble_goes_by_its_own_training(runs, folder, tmp_path):
    other = make_run(tmp_path / "other", usual_mm=2.5, width=4)
    both = [runs["slice"], other]
    found = predict_folder(both, folder[0], tmp_path / "out", batch_size=8)
    alone = [predict_folder(run, folder[0], batch_size=8) for run in both]
    counts = [one.series["num_averaged"].tolist() for one in alone]
    is_thin = np.array(counts[0]) > 0
    assert is_thin.sum() == 1
    assert abs(sum(counts[1]) - 2 * sum(counts[0])) <= 1
    expected = mean_answer([one.slices[RAW].to_numpy() for one in alone])
    np.testing.assert_array_equal(found.slices[COLUMNS].to_numpy(), expected)
    expected = mean_answer([one.series[RAW].to_numpy() for one in alone])
    np.testing.assert_array_equal(found.series[COLUMNS].to_numpy(), expected)
    # The mean has no averaged slices of its own.
    assert found.series["num_averaged"].isna().tolist() == is_thin.tolist()
    assert found.slices["averaged_slice"].isna().all()
    assert "averaged to slices 5 mm apart" in found.notice
    assert "averaged to slices 2.5 mm apart" in found.notice
    twin = make_run(tmp_path / "twin", usual_mm=5.0, width=4)
    same = predict_folder([runs["slice"], twin], folder[0], batch_size=8)
    assert same.series["num_averaged"].tolist() == counts[0]
    assert same.slices["averaged_slice"].equals(alone[0].slices["averaged_slice"])
    assert same.notice.count("averaged to slices") == 1


@pytest.mark.parametrize("view", ["slice", "slab", "series"])
def test_external_scores_are_of_the_predicted_answers(runs, folder, tmp_path, view):
    images, labels = folder
    run = RunFolder(shutil.copytree(runs[view], tmp_path / "run"))
    members = {"train": ("1.9",), "valid": (), "test": ()}
    Split("patient", 0, "series_uid", members).save(run.split_file)
    cache = make_cache(prepare_index(images, labels), tmp_path / "cache", size=SIDE)
    for choice in ("average", "keep"):
        predicted = predict_folder(run, images, thin=choice)
        found = evaluate_external(run, CTCache.open(cache.path), tmp_path / choice, thin=choice)
        series = found.series.set_index("series_uid")
        own = predicted.series.set_index("series_instance_uid").loc[series.index]
        np.testing.assert_allclose(series[COLUMNS], own[COLUMNS], rtol=1e-5)
        for name in ("num_averaged", "averaged_mm"):
            assert series[name].fillna(-1).tolist() == own[name].fillna(-1).tolist()
        assert found.metrics["thin"] and found.metrics["thin"] in predicted.notice
        if view != "series":
            slices = found.slices.set_index("sop_instance_uid")
            own = predicted.slices.set_index("sop_instance_uid").loc[slices.index]
            np.testing.assert_allclose(slices[COLUMNS], own[COLUMNS], rtol=1e-5)
            assert slices["averaged_slice"].equals(own["averaged_slice"])
            assert found.metrics["slice"]["n"]["samples"] == len(cache)


def test_the_commands_take_thin(runs, folder, tmp_path):
    def call(*arguments):
        return CliRunner().invoke(main, [*map(str, arguments)], env={"COLUMNS": "100"})

    base = ("predict", "--run", runs["slice"], "--dicom", folder[0], "--workers", 0)
    result = call(*base, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Thin series: 1 of 3 series were averaged to slices 5 mm apart" in result.output
    assert "Thin series: 1 of 3" in (tmp_path / "out" / "notice.txt").read_text()
    result = call(*base, "--out", tmp_path / "kept", "--thin", "keep")
    assert "(thin: keep)" in " ".join(result.output.split())
    result = call("evaluate", "--run", runs["slice"], "--cache", tmp_path, "--thin", "keep")
    assert result.exit_code != 0 and "--thin is for --external." in result.output
    with pytest.raises(UsageError, match="thin 'no'; expected one of average, keep"):
        predict_folder(runs["slice"], folder[0], tmp_path / "never", thin="no")
    assert not (tmp_path / "never").exists()
