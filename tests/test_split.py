import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_keras.data.split import (
    LEAKING,
    SPLITS,
    Split,
    audit,
    make_split,
    split_by_patient,
    split_from_file,
    split_none,
    thesis_series_split,
    thesis_slice_split,
)
from ich_keras.data.stratify import stratify
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS

SECRET = "DOE^JANE"


def slice_table(patients: int, seed: int = 0, rates=(0.15, 0.3, 0.3, 0.3, 0.3)) -> pd.DataFrame:
    """One or two series of 3 to 9 slices per patient; bleeds in a third of a sick series."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        for series in range(rng.integers(1, 3)):
            sick = rng.random(5) < rates
            for number in range(rng.integers(3, 10)):
                labels = sick & (rng.random(5) < 0.4)
                name = f"{patient:03d}.{series}"
                # The patient's part of the image IDs is mixed up, as in RSNA's random ones.
                uid = f"ID_{(patient * 7919 + series * 104729 + number * 1299709) % 999983:06d}"
                uids = (uid, f"ser.{name}", f"ser.{name}", f"stu.{name}", f"{SECRET}{patient:03d}")
                rows.append((*uids, *labels, labels.any()))
    columns = ["sop_instance_uid", "series_uid", "series_instance_uid", "study_instance_uid"]
    table = pd.DataFrame(rows, columns=[*columns, "patient_id", *LABELS])
    assert table["sop_instance_uid"].is_unique
    return table.astype(dict.fromkeys(LABELS, np.int8))


def parts_of(split, slices):
    return {
        part: set(slices["sop_instance_uid"].iloc[split.indices(slices, part)]) for part in SPLITS
    }


def test_patient_split_has_the_fractions_in_patients_slices_and_labels():
    slices = slice_table(400)
    split = split_by_patient(slices, seed=1)
    report = audit(split, slices)
    per_patient = slices.groupby("patient_id")[list(LABELS)].max()
    for part, fraction in zip(SPLITS, (0.70, 0.15, 0.15), strict=True):
        counts = report["parts"][part]
        assert counts["patients"] == pytest.approx(400 * fraction, abs=3)
        assert counts["slices"] == pytest.approx(len(slices) * fraction, rel=0.05)
        rows = slices.iloc[split.indices(slices, part)]
        positive = rows.groupby("patient_id")[list(LABELS)].max().sum()
        for label in LABELS:
            assert positive[label] == pytest.approx(per_patient[label].sum() * fraction, abs=5)
            assert counts["positive"][label] == rows[label].sum()
    assert report["left_out"] == report["unlabelled"] == 0
    assert all(not any(groups.values()) for groups in report["shared"].values())
    json.dumps(report)


def test_every_part_has_a_label_that_three_patients_have():
    slices = slice_table(40, rates=(0, 0.3, 0.3, 0.3, 0.3))
    with_rare = ["DOE^JANE003", "DOE^JANE017", "DOE^JANE031"]
    rare = slices["patient_id"].isin(with_rare)
    slices.loc[rare, ["epidural", "any"]] = 1
    for seed in range(10):
        report = audit(split_by_patient(slices, seed), slices)
        assert all(report["parts"][part]["positive"]["epidural"] > 0 for part in SPLITS)


def test_stratify_by_hand():
    # One label, equal sizes, 20 patients of which 10 are positive: 7/1.5/1.5 of either kind, which
    # is rounded to 7/2/1 or 7/1/2, and the other way round for the second kind.
    positive = np.repeat([[1], [0]], 10, axis=0)
    parts = stratify(
        positive, np.full(20, 5), np.array([0.7, 0.15, 0.15]), np.random.default_rng(0)
    )
    assert np.bincount(parts).tolist() == [14, 3, 3]
    assert np.bincount(parts[:10])[0] == 7
    assert sorted(np.bincount(parts[:10])[1:]) == [1, 2]


def test_large_patients_are_shared_out():
    sizes = np.array([40] * 20 + [4] * 80)
    parts = stratify(
        np.zeros((100, 6), int), sizes, np.array([0.7, 0.15, 0.15]), np.random.default_rng(0)
    )
    assert np.bincount(parts[:20]).tolist() == [14, 3, 3]
    assert np.bincount(parts).tolist() == [70, 15, 15]


def test_split_depends_on_the_seed_but_not_on_the_order_of_rows():
    slices = slice_table(60)
    split = split_by_patient(slices, seed=5)
    shuffled = slices.sample(frac=1, random_state=1)
    assert split_by_patient(shuffled, seed=5) == split
    assert parts_of(split, shuffled) == parts_of(split, slices)
    assert split_by_patient(slices, seed=6) != split


@settings(max_examples=25)
@given(patients=st.integers(3, 25), seed=st.integers(0, 10**6), rate=st.floats(0.05, 0.9))
def test_parts_are_never_empty_disjoint_and_complete(patients, seed, rate):
    slices = slice_table(patients, seed, rates=(rate,) * 5)
    slices.loc[0, list(LABELS)] = 0
    slices.loc[1, ["subdural", "any"]] = 1
    split = split_by_patient(slices, seed)
    rows = [split.indices(slices, part) for part in SPLITS]
    assert sorted(np.concatenate(rows)) == list(range(len(slices)))
    patients_of = [set(slices["patient_id"].iloc[part]) for part in rows]
    assert all(patients_of)
    assert sum(map(len, patients_of)) == patients


def test_unlabelled_slices_are_in_no_part():
    slices = slice_table(30)
    slices.loc[slices.index[::7], list(LABELS)] = -1
    for name in ("patient", *LEAKING):
        split = make_split(name, slices, seed=0)
        for part in SPLITS:
            assert (slices["any"].iloc[split.indices(slices, part)] >= 0).all()
        assert audit(split, slices)["unlabelled"] == len(slices.index[::7])


def test_save_and_load_without_patient_ids(tmp_path):
    slices = slice_table(20)
    split = split_by_patient(slices, seed=2)
    path = tmp_path / "split.json"
    split.save(path)
    assert SECRET not in path.read_text()
    assert Split.load(path) == split
    assert make_split(path, slices, seed=0) == split
    path.write_text('{"schema": 1, "name": "x"}')
    with pytest.raises(DataError, match="lacks fields of a split"):
        Split.load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="is not a split file"):
        Split.load(path)


def test_none_uses_every_slice_three_times():
    slices = slice_table(1)
    split = make_split("none", slices, seed=0)
    for part in SPLITS:
        assert split.indices(slices, part).tolist() == list(range(len(slices)))
    assert "overfitting" in split.warning
    assert audit(split, slices)["shared"]["train/test"]["slices"] == len(slices)


def test_thesis_slices_are_cut_at_four_fifths_of_the_sorted_ids():
    slices = slice_table(30)
    split = thesis_slice_split(slices)
    uids = sorted(slices["sop_instance_uid"])
    num_train = int(0.8 * len(uids))
    parts = parts_of(split, slices)
    assert parts["train"] == set(uids[:num_train])
    assert parts["valid"] == parts["test"] == set(uids[num_train:])
    shared = audit(split, slices)["shared"]
    assert shared["train/valid"]["slices"] == 0
    assert shared["train/valid"]["patients"] > 10
    assert "too good" in split.warning


def test_thesis_series_are_cut_at_four_fifths_of_the_sorted_series():
    slices = slice_table(31)
    split = thesis_series_split(slices)
    series = sorted(set(slices["series_uid"]))
    assert split.members["train"] == tuple(series[: int(0.8 * len(series))])
    assert split.members["test"] == split.members["valid"] == tuple(series[len(series) * 4 // 5 :])
    assert split.warning


def test_thesis_sizes():
    # 752,803 slices gave 602,242 / 150,561; 6,750 series gave 5,400 / 1,350 (thesis, 4.3).
    numbers = np.arange(6750)
    slices = pd.DataFrame({"sop_instance_uid": numbers.astype(str), "series_uid": "S"})
    slices = slices.assign(**dict.fromkeys(LABELS, numbers % 2))
    split = thesis_slice_split(slices)
    assert [len(split.members[part]) for part in SPLITS] == [5400, 1350, 1350]
    assert (752_803 * 4 // 5, 752_803 - 752_803 * 4 // 5) == (602_242, 150_561)


def write_lists(path, slices, key, parts):
    table = slices[[key]].drop_duplicates().assign(reader="x")
    table["split"] = parts(table[key])
    table.to_csv(path, index=False)
    return path


def by_patient_number(uids):
    numbers = uids.str.extract(r"(?:stu\.|ser\.|JANE)(\d{3})")[0].astype(int)
    return np.array(SPLITS)[numbers % 3]


@pytest.mark.parametrize(
    "key", ["patient_id", "study_instance_uid", "series_instance_uid", "series_uid"]
)
def test_file_names_patients_studies_or_series(tmp_path, key):
    slices = slice_table(12)
    path = write_lists(tmp_path / "lists.csv", slices, key, by_patient_number)
    split = make_split(path, slices, seed=0)
    expected = by_patient_number(slices["patient_id"])
    for part in SPLITS:
        assert split.indices(slices, part).tolist() == np.flatnonzero(expected == part).tolist()
    assert (split.name, split.warning, split.note) == ("file:lists.csv", "", "")


def test_file_of_slices_counts_what_does_not_fit(tmp_path):
    slices = slice_table(12)
    slices["part"] = by_patient_number(slices["patient_id"])
    lines = [f"{row.part},{row.sop_instance_uid}" for row in slices.iloc[5:].itertuples()]
    path = tmp_path / "lists.csv"
    path.write_text("\n".join(["split,sop_instance_uid", *lines, lines[-1], "train,NA", ""]))
    split = make_split(path, slices, seed=0)
    assert split.key == "sop_instance_uid"
    assert set(np.concatenate([split.indices(slices, part) for part in SPLITS])) == set(
        range(5, len(slices))
    )
    assert split.note == (
        f"{len(slices) - 5} of {len(slices) - 4} values of sop_instance_uid in lists.csv belong to "
        f"labelled slices, the others do not (line {len(slices) - 2}); 1 repeated row in "
        "lists.csv; 5 labelled slices that the split list does not name, left out"
    )
    assert audit(split, slices)["left_out"] == 5


def test_unknown_and_unnamed_patients_are_counted_and_not_named(tmp_path):
    slices = slice_table(12)
    path = write_lists(tmp_path / "lists.csv", slices, "patient_id", by_patient_number)
    lines = path.read_text().splitlines()
    strangers = [f"{SECRET}-{number},x,train" for number in range(7)]
    path.write_text("\n".join([*lines[:3], *strangers, *lines[4:], ""]))  # without patient 2
    split = make_split(path, slices, seed=0)
    left_out = int((slices["patient_id"] == f"{SECRET}002").sum())
    assert split.note == (
        "11 of 18 values of patient_id in lists.csv belong to labelled slices, the others do not "
        "(line 4; line 5; line 6; line 7; line 8; and 2 more); "
        f"{left_out} labelled slices that the split list does not name, left out; "
        "1 patient of whom it names no slice"
    )
    path.write_text("\n".join([lines[0], *strangers, ""]))
    with pytest.raises(DataError, match="none of its 7 values of patient_id belongs to") as caught:
        make_split(path, slices, seed=0)
    assert SECRET not in str(caught.value)


def test_a_split_of_other_data_says_what_does_not_fit(tmp_path):
    slices = slice_table(30)
    path = tmp_path / "split.json"
    split_by_patient(slices, seed=0).save(path)
    assert make_split(path, slices, seed=0).note == ""
    series = slices["series_uid"].unique()
    lost = slices[slices["series_uid"] != series[0]]
    assert make_split(path, lost, seed=0).note == (
        f"1 of {len(series)} values of series_uid belong to no labelled slice"
    )
    more = pd.concat([slices, slices[-4:].assign(series_uid="new", patient_id="new")])
    assert make_split(path, more, seed=0).note == (
        "4 labelled slices that the split does not name, left out"
    )
    others = slices.assign(series_uid="other-" + slices["series_uid"])
    message = f"none of its {len(series)} values of series_uid belongs to a labelled slice"
    with pytest.raises(DataError, match=message):
        make_split(path, others, seed=0)


BAD_LISTS = {
    "empty": ("", "is empty; expected a CSV file"),
    "semicolons": ("patient_id;split\nA;train\n", "are separated by semicolons; expected commas"),
    "tabs": ("patient_id\tsplit\nA\ttrain\n", "are separated by tabs; expected commas"),
    "header only": ("patient_id,split\n", "has a header but no rows"),
    "no split": ("patient_id,fold\nA,train\n", "the header is 'patient_id,fold'; expected"),
    "no ids": (
        "name,split\nA,train\n",
        "header is .name,split.; expected `split` and one of patient_id",
    ),
    "two kinds of ids": (
        "patient_id,series_uid,split\nA,B,train\n",
        "expected `split` and one of patient_id",
    ),
    "unknown part": ("patient_id,split\nA,val\n", "line 2: split 'val', expected train, valid"),
    "short row": ("patient_id,split\nA\n", "line 2: 1 field, expected 2"),
    "empty id": ("patient_id,split\n,train\n", "line 2: patient_id is empty"),
    "two parts": (
        "patient_id,split\nA,train\nB,test\nA,valid\n",
        "line 4: valid here, but the same patient_id is in train on line 2",
    ),
    "nothing known": (
        "series_uid,split\n1.2,train\n1.3,test\n",
        "none of its 2 values of series_uid belongs to a labelled slice",
    ),
    "an empty part": (
        "series_uid,split\nser.000.0,train\nser.001.0,test\n",
        "valid would hold no labelled slice",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists_are_refused(tmp_path, content, message):
    path = tmp_path / "lists.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        split_from_file(path, slice_table(10))


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("sop_instance_uid", "series"),
        ("series_uid", "patients"),
        ("study_instance_uid", "patients"),
    ],
)
def test_leaking_lists_are_refused_without_naming_a_patient(tmp_path, key, group):
    slices = slice_table(30)
    path = write_lists(
        tmp_path / "lists.csv", slices, key, lambda uids: np.resize(np.array(SPLITS), len(uids))
    )
    with pytest.raises(DataError, match=rf"share \d+ {group}: series ser\.\S+ \(train\)") as caught:
        make_split(path, slices, seed=0)
    assert SECRET not in str(caught.value)


def test_series_in_two_parts_is_refused():
    slices = slice_table(10)
    members = {part: tuple(sorted(set(slices["series_uid"]))) for part in SPLITS}
    with pytest.raises(DataError, match=r"train and valid share \d+ slices"):
        audit(Split("patient", 0, "series_uid", members), slices)


def test_studies_in_two_parts_are_refused():
    slices = slice_table(10)
    split = split_by_patient(slices, seed=0)
    slices["patient_id"] = slices["series_uid"]
    slices["study_instance_uid"] = "stu"
    with pytest.raises(DataError, match="share 1 studies"):
        audit(split, slices)


def test_missing_patient_id_refuses_all_but_deliberate_leaks(tmp_path):
    slices = slice_table(12)
    path = write_lists(tmp_path / "lists.csv", slices, "series_uid", by_patient_number)
    slices.loc[3, "patient_id"] = ""
    for name in ("patient", path):
        with pytest.raises(DataError, match=r"1 of \d+ slices have no PatientID \(0010,0020\)"):
            make_split(name, slices, seed=0)
    for name in LEAKING:
        assert make_split(name, slices, seed=0).warning


def test_too_little_data_is_refused():
    with pytest.raises(DataError, match=r"2 patient.* three splits need at least three"):
        split_by_patient(slice_table(2), seed=0)
    for value, word in ((0, "negative"), (1, "positive")):
        slices = slice_table(9)
        slices[["subdural", "any"]] = np.int8(value)
        if not value:
            slices[list(LABELS)] = np.int8(0)
        for make in (lambda table: split_by_patient(table, 0), thesis_slice_split):
            with pytest.raises(DataError, match=f"slices are {word}"):
                make(slices)
        assert len(split_none(slices).indices(slices, "train")) == len(slices)


def test_no_labels_at_all_are_refused():
    slices = slice_table(9).drop(columns=list(LABELS))
    with pytest.raises(DataError, match="the slices have no labels"):
        make_split("none", slices, seed=0)


def test_wrong_arguments():
    slices = slice_table(9)
    with pytest.raises(UsageError, match="neither a known name nor a file") as caught:
        make_split("pacient", slices, seed=0)
    assert "Did you mean 'patient'?" in caught.value.hint
    with pytest.raises(UsageError, match="unknown split 'val'"):
        split_none(slices).indices(slices, "val")
    for fractions in ((0.7, 0.3), (0.7, 0.2, 0.2), (1, 0, 0), (0.7, 0.15, float("nan"))):
        with pytest.raises(UsageError, match="fractions"):
            split_by_patient(slices, 0, fractions)


@pytest.mark.parametrize(
    "change",
    [
        {"members": None},
        {"members": {"train": 1, "valid": [], "test": []}},
        {"members": {"train": [1], "valid": [], "test": []}},
        {"key": "patient"},
        {"key": 5},
        {"seed": "x"},
        {"name": 3},
    ],
)
def test_an_edited_split_file_is_refused(tmp_path, change):
    import json

    split_none(slice_table(6)).save(tmp_path / "split.json")
    content = json.loads((tmp_path / "split.json").read_text())
    (tmp_path / "split.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(DataError, match=r"split|fields"):
        Split.load(tmp_path / "split.json")


@pytest.mark.parametrize("name", LEAKING)
@pytest.mark.parametrize("warning", ["", "  "])
def test_a_split_file_with_the_name_of_a_leaking_one_needs_a_warning(tmp_path, name, warning):
    """By that name it is not checked for leaks."""
    slices = slice_table(20)
    clean = split_by_patient(slices, seed=2)
    path = tmp_path / "mine.json"
    dataclasses.replace(clean, name=name, warning=warning).save(path)
    with pytest.raises(DataError, match=f"mine.json is called '{name}', which leaks, and has no"):
        make_split(path, slices, seed=0)
    dataclasses.replace(clean, name=name, warning="torn").save(path)
    assert make_split(path, slices, seed=0).warning == "torn"
