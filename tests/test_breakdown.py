"""Scores broken down by what the tables say of series: counted by hand, and by scikit-learn."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from narrow import preset_of
from older_files import sealed_manifest
from sklearn.metrics import log_loss, roc_auc_score

from ich_keras import files
from ich_keras.breakdown import (
    BLEED_SIZE,
    MIN_SAMPLES,
    ML_BANDS,
    MM_BANDS,
    MOST_GROUPS,
    OTHERS,
    UNKNOWN,
    bleed_size_note,
    breakdown_rows,
    broken_down,
    shown_label,
    unknown_properties,
)
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.tables import write_table
from ich_keras.data.cache.cache import CTCache
from ich_keras.errors import DataError
from ich_keras.evaluation import evaluate
from ich_keras.external import evaluate_external
from ich_keras.external_summary import external_summary
from ich_keras.labels import LabelSet
from ich_keras.levels import Level
from ich_keras.metrics.intervals import bootstrap
from ich_keras.models.spec import ModelSpec
from ich_keras.phantom.dicom import BLEED_ML, MANIFEST, write_phantoms
from ich_keras.phantom.plan import PhantomSpec, make_phantom
from ich_keras.phantom.record import bleed_volumes_ml, with_bleed_volumes
from ich_keras.report import report_text
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.workflow import make_cache, prepare_index

ONE = LabelSet(("any",), "any")


def level_of(truth, values, patients=None):
    truth = np.asarray(truth, np.int8).reshape(-1, 1)
    patients = [f"p{n}" for n in range(len(truth))] if patients is None else patients
    values = np.asarray(values, float).reshape(-1, 1)
    return Level(truth, values, np.array(patients, object), ONE)


def table_of(count, **columns):
    return pd.DataFrame({"verdict": ["ok"] * count, "kernel": [""] * count} | columns)


def counts(groups):
    return {
        name: (found["samples"], found["patients"], found["positive"])
        for name, found in groups.items()
    }


def test_groups_are_counted_as_by_hand():
    table = table_of(
        8,
        scanner=["GE A", "GE A", "SIEMENS B", "", "GE A", "SIEMENS B", "", ""],
        kernel=["H30s\\3", "H30s", "BONE | <b>", "", "H30s", "H30s", "", ""],
        slice_spacing_mm=[1.5, -5.0, 1.6, np.nan, 6.0, 6.1, 3.5, 0.5],
        slice_thickness_mm=[5.0, 5.0, np.nan, 1.0, 2.0, 10.0, 5.0, np.nan],
        age_group=["18 to 39", "under 18", "", "80 and over", "18 to 39", "", "", ""],
        sex=["M", "F", "O", "", "F", "F", "M", "M"],
        contrast=["yes", "no", "", "", "yes", "", "", "no"],
        verdict=["ok", "ok", "tilted", "ok", "gap,tilted", "ok", "ok", "ok"],
    )
    truth = [1, 0, 1, 1, 0, -1, 0, 1]  # the sixth series has no label
    patients = ["a", "a", "b", "c", "d", "e", "f", "f"]
    by = broken_down(level_of(truth, np.linspace(0.1, 0.9, 8), patients), table)
    assert counts(by["scanner"]) == {"GE A": (3, 2, 1), "SIEMENS B": (1, 1, 1), UNKNOWN: (3, 2, 2)}
    assert counts(by["kernel"]) == {"H30s": (3, 2, 1), "BONE b": (1, 1, 1), UNKNOWN: (3, 2, 2)}
    assert counts(by["slice_spacing"]) == {
        "up to 1.5 mm": (2, 2, 2),
        "1.5 to 3.5 mm": (2, 2, 1),
        "3.5 to 6 mm": (2, 2, 0),
        UNKNOWN: (1, 1, 1),
    }
    assert counts(by["slice_thickness"]) == {
        "up to 1.5 mm": (1, 1, 1),
        "1.5 to 3.5 mm": (1, 1, 0),
        "3.5 to 6 mm": (3, 2, 1),
        UNKNOWN: (2, 2, 2),
    }
    assert counts(by["age_group"]) == {
        "under 18": (1, 1, 0),
        "18 to 39": (2, 2, 1),
        "80 and over": (1, 1, 1),
        UNKNOWN: (3, 2, 2),
    }
    assert counts(by["sex"]) == {"F": (2, 2, 0), "M": (3, 2, 2), "O": (1, 1, 1), UNKNOWN: (1, 1, 1)}
    assert counts(by["contrast"]) == {"no": (2, 2, 1), "yes": (2, 2, 1), UNKNOWN: (3, 3, 2)}
    assert counts(by["verdict"]) == {"ok": (5, 3, 3), "gap,tilted": (1, 1, 0), "tilted": (1, 1, 1)}
    for groups in by.values():
        assert sum(found["samples"] for found in groups.values()) == 7
        assert sum(found["positive"] for found in groups.values()) == 4
        assert all(found["auroc_any"] is None for found in groups.values())  # of too few
    assert list(by["age_group"]) == ["under 18", "18 to 39", "80 and over", UNKNOWN]
    assert BLEED_SIZE not in by
    json.dumps(by)


def many(random, count=200):
    truth = random.integers(0, 2, count)
    values = np.clip(random.normal(0.4 + 0.2 * truth, 0.2), 0.01, 0.99)
    patients = [f"p{n // 2}" for n in range(count)]
    table = table_of(
        count,
        sex=random.choice(["F", "M", ""], count, p=[0.5, 0.46, 0.04]).tolist(),
        slice_spacing_mm=random.choice([1.0, 5.0], count),
        bleed_ml=np.where(truth == 1, random.choice([0.5, 5.0, 20.0, 31.0, np.nan], count), 0.0),
    )
    return truth, values, patients, table


def test_scores_of_groups_are_those_of_scikit_learn():
    truth, values, patients, table = many(np.random.default_rng(0))
    by = broken_down(level_of(truth, values, patients), table)
    chosen = {name: (table["sex"] == name).to_numpy() for name in ("F", "M")}
    owners = np.array(patients)
    for name, rows in chosen.items():
        found = by["sex"][name]
        assert found["auroc_any"] == pytest.approx(roc_auc_score(truth[rows], values[rows]))
        assert found["log_loss"] == pytest.approx(log_loss(truth[rows], values[rows]), abs=1e-9)
        alone = bootstrap(truth[rows, None], values[rows, None], owners[rows], label_set=ONE)
        ends = [alone["auroc/any"][end] for end in ("low", "high")]
        assert found["auroc_any_interval"] == ends and ends[0] < found["auroc_any"] < ends[1]
    unknown = by["sex"][UNKNOWN]
    assert unknown["samples"] < MIN_SAMPLES and unknown["auroc_any"] is None
    # All series are one group of what is not known of any.
    whole = by["scanner"][UNKNOWN]
    assert whole["auroc_any"] == pytest.approx(roc_auc_score(truth, values))


def test_sizes_of_bleeds_are_scored_against_all_series_without_one():
    truth, values, patients, table = many(np.random.default_rng(1))
    by = broken_down(level_of(truth, values, patients), table)
    ml = table[BLEED_ML].to_numpy()
    bands = dict(zip(ML_BANDS, (ml <= 5, (ml > 5) & (ml <= 30), ml > 30), strict=True))
    bands[UNKNOWN] = np.isnan(ml)
    groups = by[BLEED_SIZE]
    assert list(groups) == list(bands)
    for name, is_in in bands.items():
        rows = (truth == 1) & is_in
        found = groups[name]
        assert found["samples"] == found["positive"] == rows.sum() >= MIN_SAMPLES
        assert found["patients"] == len(set(np.array(patients)[rows]))
        assert found["negative"] == (truth == 0).sum()
        both = rows | (truth == 0)
        assert found["auroc_any"] == pytest.approx(roc_auc_score(truth[both], values[both]))
    assert sum(found["samples"] for found in groups.values()) == truth.sum()
    assert f"against the {(truth == 0).sum()} series without a bleed" in bleed_size_note(by)


def test_a_group_of_one_kind_or_one_patient_has_what_is_defined():
    truth, values = [1] * 12 + [0, 1] * 6, np.linspace(0.2, 0.8, 24)
    table = table_of(24, sex=["F"] * 12 + ["M"] * 12)
    by = broken_down(level_of(truth, values, [f"p{n}" for n in range(12)] + ["q"] * 12), table)
    assert by["sex"]["F"]["auroc_any"] is None
    assert by["sex"]["F"]["auroc_any_interval"] == [None, None]
    assert by["sex"]["F"]["log_loss"] == pytest.approx(-np.log(values[:12]).mean())
    assert by["sex"]["M"]["auroc_any"] == pytest.approx(roc_auc_score(truth[12:], values[12:]))
    assert "auroc_any_interval" not in by["sex"]["M"]


def test_too_many_groups_become_one():
    names = [f"GE {n:03d}" for n in range(50) for _ in range(1 + (n < 25))]
    by = broken_down(level_of([0, 1] * 37 + [1], np.full(75, 0.5)), table_of(75, scanner=names))
    groups = by["scanner"]
    assert len(groups) == MOST_GROUPS and list(groups)[-1] == OTHERS
    assert [found["samples"] for found in groups.values()] == [2] * 19 + [75 - 38]


def test_a_table_without_the_columns_is_unknown():
    table = pd.DataFrame({"verdict": ["ok"] * 3})
    by = broken_down(level_of([1, 0, 1], [0.5] * 3), table)
    assert {name: list(groups) for name, groups in by.items() if name != "verdict"} == {
        name: [UNKNOWN] for name in by if name != "verdict"
    }
    assert unknown_properties(by) == [name.replace("_", " ") for name in by if name != "verdict"]
    assert [row.group for row in breakdown_rows(by)] == ["ok"]
    assert shown_label(by) == "any" and bleed_size_note(by) == ""
    assert broken_down(level_of([-1], [0.5]), table[:1])["verdict"] == {}


def test_rows_show_intervals_and_what_is_missing():
    truth, values, patients, table = many(np.random.default_rng(2))
    by = broken_down(level_of(truth, values, patients), table)
    rows = {(row.title, row.group): row for row in breakdown_rows(by)}
    found = by["sex"]["F"]
    low, high = found["auroc_any_interval"]
    assert rows["sex", "F"].auroc == f"{found['auroc_any']:.3f} ({low:.3f}-{high:.3f})"
    assert rows["sex", "F"].samples == str(found["samples"])
    assert rows["sex", UNKNOWN].auroc == rows["sex", UNKNOWN].log_loss == "n/a"
    assert "scanner" not in {title for title, _ in rows}


def test_the_record_of_phantoms_has_the_volume_of_all_bleeds(tmp_path):
    phantom = make_phantom(PhantomSpec(3, 0, 0, ("subarachnoid", "intraventricular"), matrix=96))
    voxel_ml = phantom.scan.pixel_mm**2 * phantom.scan.slice_spacing_mm / 1000
    of_any = np.logical_or(*(phantom.mask(name) for name in phantom.spec.subtypes))
    assert phantom.bleed_ml == pytest.approx(of_any.sum() * voxel_ml)
    assert phantom.bleed_ml <= sum(map(phantom.volume_ml, phantom.spec.subtypes))
    assert make_phantom(PhantomSpec(3, 1, 1, (), matrix=96)).bleed_ml == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Phantoms that are large enough to hold every part of a test split: (folder, index)."""
    folder = tmp_path_factory.mktemp("made") / "data"
    write_phantoms(folder, 24, seed=5, matrix=32)
    return folder, prepare_index(folder / "images", folder / "stage_2_train.csv")


def test_an_index_and_a_cache_have_the_volumes_of_the_record(made, tmp_path):
    folder, index = made
    record = json.loads((folder / MANIFEST).read_text())["series"]
    expected = {one["series_instance_uid"]: one[BLEED_ML] for one in record}
    assert index.series.set_index("series_instance_uid")[BLEED_ML].to_dict() == expected
    assert (index.series[BLEED_ML][index.series["any"] == 1] > 0).all()
    index.save(tmp_path / "index")
    assert SeriesIndex.load(tmp_path / "index").equals(index)
    cache = make_cache(index, tmp_path / "cache", size=32)
    assert cache.series.set_index("series_uid")[BLEED_ML].to_dict() == expected
    # The folder above the images will do; elsewhere there is no record, and no column.
    above = with_bleed_volumes(index.series.drop(columns=BLEED_ML), folder)
    assert above[BLEED_ML].tolist() == index.series[BLEED_ML].tolist()
    shutil.copytree(folder / "images", tmp_path / "elsewhere" / "images")
    alone = prepare_index(tmp_path / "elsewhere" / "images")
    assert BLEED_ML not in alone.series


def test_real_series_beside_a_record_are_none_of_it(made):
    folder, index = made
    real = index.series.drop(columns=BLEED_ML).assign(patient_id="somebody")
    assert BLEED_ML not in with_bleed_volumes(real, folder)


def test_records_of_older_versions_give_the_sum(made, tmp_path):
    content = json.loads((made[0] / MANIFEST).read_text())
    for one in content["series"]:
        del one[BLEED_ML]
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    found = bleed_volumes_ml(tmp_path / MANIFEST)
    for one in content["series"]:
        expected = sum(bleed["volume_ml"] for bleed in one["bleeds"])
        assert found[one["series_instance_uid"]] == expected


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"series": 3}',
        '{"series": [{"series_instance_uid": "ID_1"}]}',
        '{"series": [{"series_instance_uid": "ID_1", "bleed_ml": "much"}]}',
        '{"series": [{"series_instance_uid": "ID_1", "bleed_ml": -1}]}',
        '{"series": [{"series_instance_uid": "ID_1", "bleed_ml": 1e999}]}',
        '{"series": [{"series_instance_uid": "ID_1", "bleed_ml": NaN}]}',
        '{"series": [{"series_instance_uid": "ID_1", "bleeds": [{"volume_ml": null}]}]}',
    ],
)
def test_a_damaged_record_is_told(made, tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    series = made[1].series.drop(columns=BLEED_ML)
    with pytest.raises(DataError, match=r"phantoms\.json, the record .* is damaged") as caught:
        with_bleed_volumes(series, tmp_path)
    assert "remove the file" in caught.value.hint


def without_traits(path):
    """Take from a cache the columns that older versions did not write."""
    manifest = json.loads((path / "manifest.json").read_text())
    names = ["scanner", "slice_thickness_mm", "age_group", "sex", "contrast", BLEED_ML]
    columns = list(manifest["tables"]["series"]["columns"])
    series = CTCache.open(path).series[columns].drop(columns=names)
    manifest["tables"]["series"] = write_table(path / "series.csv", series)
    sealed_manifest(path, manifest)
    return CTCache.open(path)


@pytest.fixture(scope="module")
def run(phantom_cache, tmp_path_factory):
    spec = ModelSpec((32, 32, 3), depth=10, width=8)
    with preset_of("tiny", spec):
        config = RunConfig(
            preset="tiny",
            device="cpu",
            precision="float32",
            data=DataConfig(size=32),
            fit=FitConfig(epochs=1, batch_size=32),
        )
        return train(config, phantom_cache, tmp_path_factory.mktemp("run") / "run")


def test_a_run_s_own_test_has_the_same_breakdown(run, phantom_cache):
    folder = RunFolder(run)
    by = folder.metrics("test")["series"]["by"]
    uids = folder.split().members["test"]
    series = phantom_cache.series.set_index("series_uid").loc[list(uids)]
    assert sum(found["samples"] for found in by["verdict"].values()) == len(uids)
    tilted = by["verdict"]["tilted"]
    assert tilted["samples"] == (series["verdict"] == "tilted").sum()
    assert tilted["positive"] == ((series["verdict"] == "tilted") & (series["any"] == 1)).sum()
    sizes = by[BLEED_SIZE]
    assert sum(found["samples"] for found in sizes.values()) == (series["any"] == 1).sum()
    report = folder.report_file.read_text()
    assert report == report_text(folder)
    assert f"| verdict | tilted | {tilted['samples']} |" in report
    assert "Known of no series: scanner, kernel, slice thickness, age group, sex" in report
    assert report.count("Groups of series") == 1  # of the test, not of the validation


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_each_series_is_in_the_groups_of_its_own_row(run, phantom_cache, tmp_path, split):
    copy = RunFolder(shutil.copytree(run, tmp_path / "copy"))
    by = evaluate(copy, phantom_cache, split, device="cpu")["series"]["by"]
    rows = phantom_cache.series.set_index("series_uid").loc[list(copy.split().members[split])]
    above = rows["slice_spacing_mm"] > 6
    for group, part in (("3.5 to 6 mm", rows[~above]), ("above 6 mm", rows[above])):
        expected = (len(part), part["patient_id"].nunique(), (part["any"] == 1).sum())
        assert counts(by["slice_spacing"]).get(group, (0, 0, 0)) == expected


def test_a_report_of_an_older_run_goes_without(run, tmp_path):
    copy = RunFolder(shutil.copytree(run, tmp_path / "copy"))
    metrics = copy.metrics("test")
    del metrics["series"]["by"]
    files.write_json(copy.metrics_file("test"), metrics)
    assert "Groups of series" not in report_text(copy)


def test_external_data_and_an_older_cache(run, made, tmp_path):
    cache = make_cache(made[1], tmp_path / "cache", size=48)
    metrics = evaluate_external(run, cache).metrics
    table = cache.series
    sizes = metrics["by"]["series"][BLEED_SIZE]
    assert sum(found["samples"] for found in sizes.values()) == (table["any"] == 1).sum()
    spacing = metrics["by"]["series"]["slice_spacing"]
    assert {name: found["samples"] for name, found in spacing.items()} == {
        "3.5 to 6 mm": (table["slice_spacing_mm"] <= 6).sum(),
        "above 6 mm": (table["slice_spacing_mm"] > 6).sum(),
    }
    text = external_summary(metrics, 100)
    assert "bleed size" in text and "Known of no series: scanner" in text
    older = without_traits(tmp_path / "cache")
    again = evaluate_external(run, older).metrics
    assert again["by"]["series"]["sex"].keys() == {UNKNOWN}
    assert BLEED_SIZE not in again["by"]["series"]
    assert again["series"] == metrics["series"]
    assert set(spacing) <= set(MM_BANDS)


def test_an_older_cache_is_evaluated_as_before(phantom_cache, run, tmp_path):
    path = tmp_path / "older"
    shutil.copytree(phantom_cache.path, path)
    copy = shutil.copytree(run, tmp_path / "run")
    before = RunFolder(copy).metrics("test")
    metrics = evaluate(copy, without_traits(path), "test", device="cpu")
    assert metrics["series"]["by"]["sex"].keys() == {UNKNOWN}
    for part in (before, metrics):
        part["series"].pop("by")
    assert metrics["series"]["auroc"] == pytest.approx(before["series"]["auroc"], abs=1e-6)


def test_whole_series_are_broken_down_too(made, tmp_path):
    """Of a network on whole series, the rows of the level are those of the table."""
    cache = make_cache(made[1], tmp_path / "cache", size=32)
    with preset_of("tiny3d", ModelSpec((9, 32, 32, 1), depth=10, width=8)):
        config = RunConfig(
            preset="tiny3d",
            device="cpu",
            precision="float32",
            data=DataConfig(size=32, slices=9),
            norm="group",
            fit=FitConfig(epochs=1),
        )
        run = RunFolder(train(config, cache, tmp_path / "run"))
    by = run.metrics("test")["series"]["by"]
    series = cache.series.set_index("series_uid").loc[list(run.split().members["test"])]
    assert sum(found["samples"] for found in by["verdict"].values()) == len(series)
    for name, found in by["verdict"].items():
        rows = series[series["verdict"] == name]
        assert found["samples"] == len(rows)
        assert found["positive"] == (rows["any"] == 1).sum()
        assert found["patients"] == rows["patient_id"].nunique()
