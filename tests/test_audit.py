"""`ich audit` and `ich submission`: leaks and contradictions that were put there are found."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ich_keras.cli import main
from ich_keras.data.leakage import audit_data, equal_slices, label_faults
from ich_keras.data.pixels import require_distinct
from ich_keras.data.reading import pixel_hash
from ich_keras.data.split import SPLITS, find_split, make_split
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS
from ich_keras.submission_file import write_submission


class Cache:
    """A cache whose pixels and tables can be changed; with hashes, or as of an older version."""

    def __init__(self, cache, with_hashes=True):
        self.slices, self.series, self.path = cache.slices.copy(), cache.series, cache.path
        self._hu = cache.slices_hu(np.arange(len(cache)))
        self.read = 0
        self.labelling, self.labels = cache.labelling, cache.labels
        if not with_hashes:
            self.slices = self.slices.drop(columns="pixel_hash")

    def __len__(self):
        return len(self.slices)

    def put(self, rows, hu):
        self._hu[rows] = hu
        if "pixel_hash" in self.slices:
            self.slices["pixel_hash"] = [pixel_hash(image) for image in self._hu]

    def slices_hu(self, rows):
        self.read += len(rows)
        return self._hu[np.asarray(rows)]


def first_with_head(cache, rows):
    return next(row for row in rows if (cache.slices_hu([row]) > -500).mean() > 0.1)


def test_a_clean_split_has_no_leak(phantom_cache):
    split = make_split("patient", phantom_cache.slices, 0)
    found = audit_data(phantom_cache, split)
    assert found["leaks"] == []
    assert found["labels"] == dict.fromkeys(found["labels"], 0)
    assert found["equal_pixels"]["groups"] == 0
    counted = {part: counts["slices"] for part, counts in found["split"]["parts"].items()}
    assert counted == {part: len(split.indices(phantom_cache.slices, part)) for part in SPLITS}


@pytest.mark.parametrize("with_hashes", [True, False])
def test_every_kind_of_leak_is_told(phantom_cache, with_hashes):
    cache = Cache(phantom_cache, with_hashes)
    clean = make_split("patient", cache.slices, 0)
    train, test = (clean.indices(cache.slices, part) for part in ("train", "test"))
    head = first_with_head(cache, train)
    cache.put(test[0], cache._hu[head])
    cache.read = 0
    assert equal_slices(cache) == [sorted([head, test[0]])]
    assert cache.read == (1 if with_hashes else len(cache))
    found = audit_data(cache, clean)
    assert found["leaks"] == ["train and test share 1 groups of slices with equal pixels"]
    assert found["equal_pixels"]["of_different_patients"] == 1

    unknown = Cache(phantom_cache)
    unknown.slices["patient_id"] = ""
    found = audit_data(unknown, clean)
    assert found["leaks"] == [
        f"{len(unknown)} slices have no PatientID: nobody can tell whose they are"
    ]

    by_slices = find_split("thesis-slices", phantom_cache.slices, 0)
    leaks = audit_data(phantom_cache, by_slices)["leaks"]
    assert any("train and test share" in leak and "series" in leak for leak in leaks)
    assert any("valid and test share" in leak and "slices" in leak for leak in leaks)


@pytest.mark.parametrize("with_hashes", [True, False])
def test_slices_without_a_head_may_be_equal(phantom_cache, with_hashes):
    cache = Cache(phantom_cache, with_hashes)
    cache.put([3, 60, 99], -1000)
    assert equal_slices(cache) == []


def indices_of(split, cache):
    return {part: split.indices(cache.slices, part) for part in SPLITS}


@pytest.mark.parametrize(
    ("one", "other"), [("train", "valid"), ("train", "test"), ("valid", "test")]
)
def test_a_split_across_which_pixels_are_equal_is_refused(phantom_cache, one, other):
    cache = Cache(phantom_cache)
    split = make_split("patient", cache.slices, 0)
    indices = indices_of(split, cache)
    require_distinct(cache, split, indices)
    head, copy = first_with_head(cache, indices[one]), indices[other][-1]
    cache.put(copy, cache._hu[head])
    uids = cache.slices["sop_instance_uid"]
    with pytest.raises(DataError) as caught:
        require_distinct(cache, split, indices)
    assert caught.value.message == (
        f"split 'patient': {one} and {other} share 1 images of equal pixels:"
        f" {uids.iloc[head]} ({one}) and {uids.iloc[copy]} ({other})."
    )
    assert not any(name in str(caught.value) for name in cache.slices["patient_id"].unique())
    # Within one part they do no harm; neither does a copy that no part uses.
    elsewhere = {**indices, other: indices[other][:-1]}
    require_distinct(cache, split, elsewhere)
    elsewhere[one] = np.sort(np.append(indices[one], copy))
    require_distinct(cache, split, elsewhere)


def test_many_equal_pixels_are_counted_and_a_few_named(phantom_cache):
    cache = Cache(phantom_cache)
    split = make_split("patient", cache.slices, 0)
    indices = indices_of(split, cache)
    heads = [row for row in indices["train"] if (cache.slices_hu([row]) > -500).mean() > 0.1][:9]
    copies = indices["test"][: len(heads)]
    cache.put(copies, cache._hu[heads])
    with pytest.raises(DataError, match="train and test share 9 images of equal pixels") as caught:
        require_distinct(cache, split, indices)
    assert caught.value.message.count("(train)") == 5


def test_splits_that_leak_on_purpose_and_old_caches_are_not_refused(phantom_cache):
    cache = Cache(phantom_cache)
    cache.put(np.arange(len(cache)), cache._hu[first_with_head(cache, range(len(cache)))])
    for name in ("none", "thesis-slices", "thesis-series"):
        split = find_split(name, cache.slices, 0)
        require_distinct(cache, split, indices_of(split, cache))
    cache.slices = cache.slices.drop(columns="pixel_hash")
    split = make_split("patient", cache.slices, 0)
    require_distinct(cache, split, indices_of(split, cache))


def test_air_in_two_parts_is_no_leak(phantom_cache):
    cache = Cache(phantom_cache)
    split = make_split("patient", cache.slices, 0)
    indices = indices_of(split, cache)
    cache.put([rows[0] for rows in indices.values()], -1000)
    require_distinct(cache, split, indices)


def test_labels_that_contradict_each_other_are_counted(phantom_cache):
    slices = phantom_cache.slices.copy()
    slices[list(LABELS)] = 0
    slices.loc[0, "epidural"] = 1
    slices.loc[1, "any"] = 1
    slices.loc[2, list(LABELS)] = -1
    slices.loc[4, "position_mm"] = slices.loc[3, "position_mm"]
    slices.loc[4, ["any", "subdural"]] = 1
    assert label_faults(slices) == {
        "any_without_subtype": 1,
        "subtype_without_any": 1,
        "unlabelled": 1,
        "partly_labelled_series": 1,
        "same_place_other_labels": 1,
    }
    with pytest.raises(DataError, match="no labels"):
        label_faults(slices.drop(columns="any"))


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_fails_on_a_leaking_list(phantom_cache, phantom_cache_folder, tmp_path):
    done = invoke("audit", "--cache", phantom_cache_folder, "--split", "patient")
    assert done.exit_code == 0, done.output
    assert "no leak found" in done.output
    done = invoke("audit", "--cache", phantom_cache_folder)
    assert done.exit_code == 0, done.output
    assert "0 slices with `any` but no subtype" in done.output

    series = phantom_cache.series
    shared = series["patient_id"][series["patient_id"].duplicated()].iloc[0]
    parts = pd.Series(["train", "valid", "test"] * len(series))[: len(series)].to_numpy()
    rows = series["patient_id"] == shared
    parts[np.flatnonzero(rows)[:2]] = ["train", "test"]
    listed = pd.DataFrame({"series_uid": series["series_uid"], "split": parts})
    listed.to_csv(tmp_path / "split.csv", index=False)
    out = tmp_path / "audit.json"
    done = invoke(
        "audit", "--cache", phantom_cache_folder, "--split", tmp_path / "split.csv", "--out", out
    )
    assert done.exit_code == 3
    assert "LEAK: train and test share" in done.output
    assert "split 'file:split.csv' leaks" in done.output
    assert shared not in done.output  # a PatientID has no business in a log
    written = json.loads(out.read_text())
    assert written["split"]["shared"]["train/test"]["patients"] >= 1
    done = invoke("audit", "--cache", phantom_cache_folder, "--split", "thesis-slices")
    assert done.exit_code == 0
    assert "LEAK" in done.output


# The submission.


def predictions(n=3):
    random = np.random.default_rng(0)
    table = pd.DataFrame(random.random((n, 6)).astype(np.float32), columns=list(LABELS))
    return table.assign(sop_instance_uid=[f"ID_{number:09x}" for number in range(n)])


def test_a_submission_has_the_format_of_the_competition(tmp_path):
    table = predictions()
    path = write_submission(table, tmp_path / "submission.csv")
    lines = path.read_text().splitlines()
    assert lines[0] == "ID,Label"
    assert lines[1] == f"ID_000000000_epidural,{float(table['epidural'][0])!r}"
    assert [line.split(",")[0] for line in lines[7:13]] == [f"ID_000000001_{n}" for n in LABELS]
    again = pd.read_csv(path)
    assert len(again) == 18
    np.testing.assert_array_equal(
        again["Label"].to_numpy(np.float32).reshape(3, 6), table[list(LABELS)]
    )
    # What `read_rsna_labels` reads has the same IDs.
    pattern = (
        r"^ID_[0-9a-f]+_(epidural|intraparenchymal|intraventricular|subarachnoid|subdural|any)$"
    )
    assert again["ID"].str.match(pattern).all()


def test_a_submission_is_refused_when_it_would_be_wrong(tmp_path):
    table = predictions()
    out = tmp_path / "submission.csv"
    with pytest.raises(DataError, match=r"lack the column\(s\) sop_instance_uid, any"):
        write_submission(table.drop(columns=["sop_instance_uid", "any"]), out)
    with pytest.raises(DataError, match="image ID_000000000 is predicted more than once"):
        write_submission(pd.concat([table, table]), out)
    with pytest.raises(DataError, match="image ID_000000001 has values outside 0 to 1"):
        write_submission(table.assign(any=[0.1, np.nan, 0.2]), out)
    with pytest.raises(DataError, match="image ID_000000001 has values outside 0 to 1"):
        write_submission(table.assign(any=["0.1", "abc", "0.2"]), out)
    with pytest.raises(DataError, match=r"1 image.s. of the predictions have no sop_instance_uid"):
        write_submission(table.assign(sop_instance_uid=["ID_1", np.nan, "ID_2"]), out)
    with pytest.raises(DataError, match="the predictions have no row"):
        write_submission(table[:0], out)
    with pytest.raises(UsageError, match=r"absent\.csv does not exist"):
        write_submission(tmp_path / "absent.csv", out)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UsageError, match="cannot be read as predictions"):
        write_submission(tmp_path / "empty.csv", out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        write_submission(table, out)


def test_the_command_writes_what_predict_wrote(tmp_path):
    predictions().to_csv(tmp_path / "predictions.csv", index=False)
    out = tmp_path / "submission.csv"
    done = invoke("submission", "--predictions", tmp_path / "predictions.csv", "--out", out)
    assert done.exit_code == 0, done.output
    assert len(out.read_text().splitlines()) == 19


def test_a_submission_quotes_names_and_names_a_folder(tmp_path):
    table = pd.DataFrame([{"sop_instance_uid": 'a,"b', **dict.fromkeys(LABELS, 0.5)}])
    out = write_submission(table, tmp_path / "s.csv")
    found = pd.read_csv(out)
    assert found["ID"].tolist() == [f'a,"b_{label}' for label in LABELS]
    with pytest.raises(UsageError, match="is a folder"):
        write_submission(tmp_path, tmp_path / "t.csv")
