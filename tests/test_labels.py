import dataclasses
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ich_keras.data.labels import (
    UNLABELLED,
    attach_labels,
    is_labelled,
    join_labels,
    series_labels,
)
from ich_keras.data.rsna_labels import read_rsna_labels
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS, Labelling

SHARED = Path(os.environ.get("ICH_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

NEGATIVE = [("ID_a", label, 0) for label in LABELS]
POSITIVE = [("ID_b", label, int(label in ("epidural", "any"))) for label in LABELS]
BOTH = NEGATIVE + POSITIVE


@dataclasses.dataclass(frozen=True)
class Tables:
    """Stands for SeriesIndex: join_labels needs its two tables only."""

    slices: pd.DataFrame
    series: pd.DataFrame
    labelling: Labelling | None = None


def text_of(rows, header="ID,Label", end="\n"):
    return end.join([header, *(f"{uid}_{label},{value}" for uid, label, value in rows)]) + end


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "labels.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_reads_six_int8_columns_in_label_order(write):
    labels = read_rsna_labels(write(text_of(BOTH)))
    assert labels.table.index.tolist() == ["ID_a", "ID_b"]
    assert labels.table.index.name == "sop_instance_uid"
    assert labels.table.columns.tolist() == list(LABELS)
    assert set(labels.table.dtypes) == {np.dtype("int8")}
    assert labels.table.to_numpy().tolist() == [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]
    assert (len(labels), labels.num_rows, labels.num_duplicates) == (2, 12, 0)
    assert labels.num_positive == dict(zip(LABELS, [1, 0, 0, 0, 0, 1], strict=True))


def test_order_of_rows_and_labels_does_not_matter(write):
    expected = read_rsna_labels(write(text_of(BOTH))).table
    shuffled = BOTH.copy()
    random.Random(3).shuffle(shuffled)
    for rows in (shuffled, BOTH[::-1]):
        table = read_rsna_labels(write(text_of(rows))).table
        pd.testing.assert_frame_equal(table.sort_index(), expected)


@pytest.mark.parametrize(
    "content",
    [
        text_of(BOTH, end="\r\n"),
        text_of(BOTH, end="\r"),
        "\ufeff" + text_of(BOTH),
        text_of(BOTH).rstrip("\n"),
        text_of(BOTH) + "\n\n",
        text_of(BOTH).replace(",0", ',"0"').replace("ID_a_any", '"ID_a_any"'),
        text_of(BOTH).replace(",0", ",0.0").replace(",1", ",1.0"),
    ],
    ids=["crlf", "cr", "bom", "no last newline", "empty lines", "quotes", "floats"],
)
def test_reads_other_spellings_alike(write, content):
    expected = read_rsna_labels(write(text_of(BOTH))).table
    pd.testing.assert_frame_equal(read_rsna_labels(write(content)).table, expected)


def test_identifier_na_stays_text(write):
    rows = [(uid, label, 0) for uid in ("NA", "null", "007") for label in LABELS]
    assert read_rsna_labels(write(text_of(rows))).table.index.tolist() == ["NA", "null", "007"]


def test_identical_rows_are_merged_and_counted(write):
    labels = read_rsna_labels(write(text_of(BOTH + POSITIVE + NEGATIVE[:1])))
    assert (len(labels), labels.num_rows, labels.num_duplicates) == (2, 19, 7)
    assert "19 rows, 7 duplicates merged" in repr(labels)


WITHOUT_ANY = text_of(NEGATIVE[:5])
HOLES = [row for row in BOTH if row[1] not in ("any", "subdural")]
REFUSED = {
    "conflict": (
        text_of([*BOTH, ("ID_b", "any", 0)]),
        r"line 14: 'ID_b_any' is 0 here, but 1 on line 13",
    ),
    "missing subtypes": (
        text_of(HOLES),
        r"ID_a \(line 2\) has no row for subdural, any; ID_b \(line 6\) has no row for subdural",
    ),
    "unknown subtype": (
        text_of([*BOTH, ("ID_c", "chronic", 0)]),
        r"line 14: 'ID_c_chronic' does not end in one of the six labels",
    ),
    "label in capitals": (text_of([("ID_a", "Any", 0)]), "line 2: 'ID_a_Any' does not end"),
    "id without label": (text_of(BOTH) + "ID_c,0\n", "line 14: 'ID_c' does not end"),
    "no image": (text_of([("", "any", 0)]), "line 2: '_any' names no image"),
    "NUL in the id": (text_of([("ID\0x", "any", 0)]), r"line 2: 'ID\\x00x_any' names no image"),
    "newline in the id": ('ID,Label\n"ID\nx_any",0\n', r"line 3: 'ID\\nx_any' names no image"),
    "endless id": (text_of([("x" * 200_000, "any", 0)]), "rows are refused: line 2: "),
    "no header": (text_of(BOTH).split("\n", 1)[1], "the header is 'ID_a_epidural,0'; expected"),
    "other header": (text_of(BOTH, header="Image,Label"), "the header is 'Image,Label'"),
    "semicolons": (
        text_of(BOTH).replace(",", ";"),
        "the columns are separated by semicolons; expected commas",
    ),
    "other order of columns": (text_of(BOTH, header="Label,ID"), "the header is 'Label,ID'"),
    "extra column": (text_of(BOTH, header="ID,Label,x"), "the header is 'ID,Label,x'"),
    "extra field": (text_of(BOTH) + "ID_c_any,0,1\n", "line 14: 3 fields, expected 2"),
    "too few fields": (text_of(BOTH) + "ID_c_any\n", "line 14: 1 field, expected 2"),
    "empty": ("", "is empty"),
    "header only": ("ID,Label\n\n", "has a header but no rows"),
    "any 0, subtype 1": (
        text_of([*NEGATIVE[:4], ("ID_a", "subdural", 1), ("ID_a", "any", 0)]),
        "line 7: any of ID_a is 0, but subdural is 1",
    ),
    "any 1, no subtype": (
        text_of([*NEGATIVE[:5], ("ID_a", "any", 1)]),
        "line 7: any of ID_a is 1, but no subtype is 1",
    ),
    "not UTF-8": (text_of(NEGATIVE).encode() + b"ID_\xe9_any,0\n", "line 8: not UTF-8 text"),
    "UTF-16": (text_of(BOTH).encode("utf-16"), "line 1: not UTF-8 text"),
    "zip": (b"PK\x03\x04\xff\xfe" * 100, "line 1: not UTF-8 text"),
    "open quote": (text_of(NEGATIVE) + '"ID_b_any,0\n', "line 8: not valid CSV"),
}
for value in ("2", "-1", "0.5", "", "yes", "1e400", "nan", " 1", "True", "\u0661"):
    REFUSED[f"value {value!r}"] = (
        WITHOUT_ANY + f"ID_a_any,{value}\n",
        f"line 7: label '{value}' of 'ID_a_any', expected 0 or 1",
    )


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_rsna_labels(write(content))
    assert caught.value.hint
    assert len(str(caught.value)) < 1500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["absent", "folder"])
def test_refuses_what_is_no_file(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "absent.csv"
    with pytest.raises(UsageError, match="cannot be read"):
        read_rsna_labels(path)


def test_names_five_faults_and_counts_the_others(write):
    rows = [(f"ID_{number}", "any", 7) for number in range(1000)]
    with pytest.raises(DataError, match=r"1,000 rows are refused: .*line 6: .*; and 995 more\."):
        read_rsna_labels(write(text_of(rows)))
    rows = [(f"ID_{number}", "any", 0) for number in range(1000)]
    with pytest.raises(DataError, match=r"ID_4 \(line 6\) .*subdural; and 995 more\."):
        read_rsna_labels(write(text_of(rows)))


def test_inconsistent_any_is_kept_and_counted_on_request(write):
    path = write(text_of([*NEGATIVE[:5], ("ID_a", "any", 1), *POSITIVE]))
    labels = read_rsna_labels(path, allow_inconsistent_any=True)
    assert labels.table.loc["ID_a"].tolist() == [0, 0, 0, 0, 0, 1]
    assert labels.num_inconsistent == 1
    assert "1 row whose any is not the OR" in repr(labels)


def slices_of(*rows):
    return pd.DataFrame(rows, columns=["sop_instance_uid", "series_uid"]).assign(
        slice_index=range(len(rows))
    )


def test_join_keeps_every_slice_in_place_and_counts_both_sides(write):
    labels = read_rsna_labels(write(text_of(BOTH + [("ID_z", label, 0) for label in LABELS])))
    slices = slices_of(("ID_b", "S1"), ("ID_new", "S1"), ("ID_a", "S2"), ("ID_late", "S3"))
    series = pd.DataFrame({"series_uid": ["S3", "S1", "S2"], "num_slices": [1, 2, 1]})
    index, join = join_labels(Tables(slices, series), labels)
    assert (join.num_labelled, join.num_unlabelled, join.num_labels_unused) == (2, 2, 1)
    assert index.slices["sop_instance_uid"].tolist() == ["ID_b", "ID_new", "ID_a", "ID_late"]
    assert index.slices[list(LABELS)].to_numpy().tolist() == [
        [1, 0, 0, 0, 0, 1],
        [UNLABELLED] * 6,
        [0] * 6,
        [UNLABELLED] * 6,
    ]
    assert is_labelled(index.slices).tolist() == [True, False, True, False]
    assert set(index.slices[list(LABELS)].dtypes) == {np.dtype("int8")}
    assert index.series["series_uid"].tolist() == ["S3", "S1", "S2"]
    assert index.series["epidural"].tolist() == [UNLABELLED, 1, 0]
    assert set(index.series[list(LABELS)].dtypes) == {np.dtype("int8")}
    assert "epidural" not in slices.columns


def test_labels_that_match_no_image_are_refused_with_examples_of_both(write):
    labels = read_rsna_labels(write(text_of(BOTH)))
    slices = slices_of(("1.2.3", "S"), ("1.2.4", "S"), ("1.2.5", "S"))
    with pytest.raises(DataError, match=r"'ID_a'; 'ID_b'\. .*'1\.2\.3'; '1\.2\.4'; and 1 more"):
        attach_labels(slices, labels)
    with pytest.raises(DataError, match="images: none"):
        attach_labels(slices.iloc[:0], labels)


def test_series_is_positive_when_any_slice_is():
    slices = slices_of(*((f"ID_{n}", uid) for n, uid in enumerate(["B", "B", "A", "B", "NA"])))
    values = np.zeros((5, 6), np.int8)
    values[0, [1, 5]] = 1
    values[3, [4, 5]] = 1
    table = series_labels(slices.assign(**dict(zip(LABELS, values.T, strict=True))))
    assert table.index.tolist() == ["B", "A", "NA"]
    assert table.to_numpy().tolist() == [[0, 1, 0, 0, 1, 1], [0] * 6, [0] * 6]
    assert set(table.dtypes) == {np.dtype("int8")}


def test_a_table_without_labels_is_refused():
    with pytest.raises(DataError, match="the slices have no labels"):
        series_labels(slices_of(("ID_a", "S")))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared RSNA slices")
def test_real_labels_agree_with_the_facts_beside_them():
    tables = {path.name: path for path in (SHARED / "rsna_slices").glob("*.csv")}
    facts = pd.read_csv(tables.pop("facts_and_labels.csv"), index_col="Image")[list(LABELS)]
    (path,) = tables.values()
    table = read_rsna_labels(path).table
    assert table.loc[facts.index].to_numpy().tolist() == facts.to_numpy().tolist()
