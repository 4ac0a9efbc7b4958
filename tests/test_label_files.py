"""Label files of each format, made as the data sets have them, and what is wrong with others."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from ich_keras.data.label_columns import parse_label_map
from ich_keras.data.label_files import read_labels
from ich_keras.data.labels import attach_labels
from ich_keras.data.views import View, make_samples
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS, SIX, LabelSet

CQ500_READS = ("ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "BleedLocation-Left", "ChronicBleed")
CQ500 = ",".join(["name", "Category", *(f"R{n}:{what}" for n in (1, 2, 3) for what in CQ500_READS)])
PHYSIONET = (
    "PatientNumber,SliceNumber,Intraventricular,Intraparenchymal,Subarachnoid,Epidural,Subdural,"
    "No_Hemorrhage,Fracture_Yes_No"
)


@pytest.fixture
def write(tmp_path):
    def write(text, name="labels.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def slices_of(**columns):
    table = {
        "sop_instance_uid": ["1.1", "1.2", "2.1", "2.2"],
        "series_instance_uid": ["1", "1", "2", "2"],
        "study_instance_uid": ["s1", "s1", "s1", "s1"],
        "patient_id": ["CQ500-CT-1", "CQ500-CT-1", "049", "049"],
        "instance_number": ["1", "2", "1", "2"],
        "container": ["/d/a/1.dcm", "/d/a/2.dcm", "/d/b/049.nii", "/d/b/049.nii"],
        "member": ["", "", "", ""],
        "frame": [0, 0, 1, 2],
        "series_uid": ["1", "1", "2", "2"],
    }
    return pd.DataFrame(table | columns)


def joined(labels, **columns):
    slices, join = attach_labels(slices_of(**columns), labels)
    return slices[list(labels.labels.names)].to_numpy().tolist(), join


def test_a_wide_table_of_series_in_any_order_with_holes(write):
    path = write("any,SDH,Series Instance UID,note\n1,,2,x\n0,0,1,\n")
    labels = read_labels(path)
    assert labels.labels == LabelSet(("subdural", "any"), "any")
    assert labels.labelling.level == "series" and labels.kind == "a table of labels"
    values, join = joined(labels)
    assert values == [[0, 0], [0, 0], [-1, 1], [-1, 1]]
    assert join.labelling.level == "series"
    assert "4 slices with labels (each those of its series)" in str(join)
    assert str(labels).startswith("2 series; positive: subdural 0, any 1; 2 rows, 0 duplicates")
    assert "1 label missing" in str(labels)


@pytest.mark.parametrize(
    ("column", "key", "level"),
    [
        ("SOPInstanceUID", "1.2", "slice"),
        ("sop_instance_uid", "1.2", "slice"),
        ("series_uid", "1", "series"),
        ("StudyInstanceUID", "s1", "study"),
        ("PatientID", "049", "patient"),
        ("path", "a/2.dcm", "slice"),
        ("File", "b\\049.nii", "series"),
        ("file", "b", "series"),
    ],
)
def test_every_kind_of_identifier(write, column, key, level):
    labels = read_labels(write(f"{column},ICH\n{key},1\n"))
    assert labels.labels == LabelSet(("any",))
    slices, join = attach_labels(slices_of(), labels)
    table = slices_of()
    expected = {
        "slice": table["sop_instance_uid"] == "1.2",
        "series": table["series_uid"] == key[-1],
        "study": [True] * 4,
        "patient": table["patient_id"] == "049",
    }[level]
    if column.lower() in ("file",):
        expected = table["series_uid"] == "2"
    assert (slices["any"] == 1).tolist() == list(expected)
    assert join.labelling.level == level
    assert join.num_labels_unused == 0


def test_five_subtypes_give_any(write):
    header = "patient_id,epidural,intraparenchymal,intraventricular,subarachnoid,subdural"
    labels = read_labels(write(f"{header}\na,0,0,0,0,0\nb,0,1,,0,0\nc,0,,0,0,0\n"))
    assert labels.labels == SIX
    assert labels.table["any"].tolist() == [0, 1, -1]


def test_names_are_mapped(write, tmp_path):
    path = write("PatientID,Blutung,Normal,Alter\na,1,0,70\nb,0,1,71\n")
    for label_map in ("Blutung=ICH2", {"Blutung": "ICH2"}):
        labels = read_labels(path, label_map)
        assert labels.labels.names == ("ICH2",) and labels.table["ICH2"].tolist() == [1, 0]
    (tmp_path / "map.json").write_text(json.dumps({"Normal": "!any"}))
    labels = read_labels(path, tmp_path / "map.json")
    assert labels.labels.names == ("any",) and labels.table["any"].tolist() == [1, 0]
    exclusive = read_labels(path, "Normal=normal,Blutung=bleed", exclusive=True)
    assert exclusive.labels == LabelSet(("normal", "bleed"), exclusive=True)


def test_cq500_reads_are_the_majority(write):
    def reader(ich, iph="0", sdh="0"):
        return f"{ich},{iph},0,{sdh},0,0,0,0"

    rows = [
        f"CQ500-CT-1,B1,{reader(1, 1)},{reader(1, 1)},{reader(0)}",
        f"CQ500-CT-49,B2,{reader(1, sdh=1)},{reader(1, 1)},{reader(1, 1, 1)}",
        f"CQ500-CT-3,B2,{reader(1)},{reader(0)},{reader('')}",
    ]
    labels = read_labels(write("\n".join([CQ500, *rows])))
    assert labels.labels == SIX and labels.labelling.level == "patient"
    table = labels.table
    assert table.loc["CQ500-CT-1"].tolist() == [0, 1, 0, 0, 0, 1]
    assert table.loc["CQ500-CT-49"].tolist() == [0, 1, 0, 0, 1, 1]
    assert table.loc["CQ500-CT-3", "any"] == -1  # one said yes, one no
    assert labels.num_readers.tolist() == [3, 3, 3]
    assert "CQ500's reads (majority of the readers)" in str(labels)
    values, join = joined(labels, patient_id=["CQ500CT1"] * 2 + ["CQ500CT049"] * 2)
    assert [row[5] for row in values] == [1, 1, 1, 1] and [row[4] for row in values] == [0, 0, 1, 1]
    assert join.num_labels_unused == 1


def test_physionet_diagnoses_are_of_slices_by_number(write):
    rows = ["49,1,0,1,0,0,0,0,0", "49,2,0,0,0,0,0,1,1", "50,1,0,0,0,0,0,1,0"]
    labels = read_labels(write("\n".join([PHYSIONET, *rows])))
    assert labels.labels == SIX and labels.kind == "PhysioNet's diagnoses"
    values, join = joined(labels)
    assert values[2] == [0, 1, 0, 0, 0, 1] and values[3] == [0] * 6 and values[0] == [-1] * 6
    assert join.labelling.level == "slice" and join.num_labels_unused == 1


def test_labels_of_series_train_series_and_not_slices(write):
    labels = read_labels(write("series_uid,any,subdural\n1,0,0\n2,1,\n"))
    slices, join = attach_labels(slices_of(position_mm=[0.0, 5.0, 0.0, 5.0]), labels)
    series = pd.DataFrame({"series_uid": ["1", "2"], "num_slices": [2, 2], "verdict": ["ok", "ok"]})
    samples = make_samples(slices, series, View("series", 2), join.labelling)
    np.testing.assert_array_equal(samples.labels, [[0, 0], [-1, 1]])
    for view in (View(), View("slab", 3)):
        with pytest.raises(DataError, match=r"labels are of a series as a whole.*") as error:
            make_samples(slices, series, view, join.labelling)
        assert "Train on whole series" in error.value.hint


def test_readers_who_differ_on_the_kind_are_taken(write):
    """Two of three see a bleed, each another one."""
    reads = ["1,0,0,1,0,0,0,0", "1,0,0,0,0,1,0,0", "0,0,0,0,0,0,0,0"]
    labels = read_labels(write("\n".join([CQ500, ",".join(["CQ500-CT-7", "B1", *reads])])))
    assert labels.table.iloc[0].tolist() == [0, 0, 0, 0, 0, 1]
    assert labels.num_inconsistent == 1


def test_a_column_and_its_opposite_fill_and_check_each_other(write):
    labels = read_labels(write("patient_id,ICH,No_Hemorrhage\na,1,0\nb,,0\nc,,1\nd,0,\n"))
    assert labels.table["any"].tolist() == [1, 1, 0, 0]
    for header in ("patient_id,ICH,No_Hemorrhage", "patient_id,No_Hemorrhage,ICH"):
        with pytest.raises(DataError, match="'No_Hemorrhage' is '1', and so is that of any"):
            read_labels(write(f"{header}\na,1,1\n"))


def test_a_named_bleed_makes_a_missing_any_known(write):
    labels = read_labels(write("patient_id,subdural,any\na,1,\nb,0,\nc,,1\n"))
    assert labels.table["any"].tolist() == [1, -1, 1]


def test_identifiers_of_frames_and_of_patients(write):
    uid = "1." + "2" * 60
    labels = read_labels(write(f"SOPInstanceUID,any\n{uid}/frames/4096,1\n"))
    assert labels.table.index.tolist() == [f"{uid}/frames/4096"]
    with pytest.raises(DataError, match="'PatientID' is no usable identifier") as error:
        read_labels(write(f"PatientID,any\n{'Doe John ' * 9},1\n"))
    assert "Doe" not in str(error.value)


@pytest.mark.parametrize("name", ["verdict", "num_slices", "fold", "kernel", "position_mm"])
def test_labels_are_not_called_as_columns_of_results(write, name):
    labels = read_labels(write("patient_id,x\n049,1\n"), f"x={name}")
    with pytest.raises(DataError, match=f"a label is called '{name}', as a column"):
        attach_labels(slices_of(), labels)


BAD = {
    "text": ("PatientID,any\na,yes\n", "line 2: 'any' is 'yes', expected 0, 1 or nothing"),
    "percent": ("PatientID,any\na,0\nb,95%\n", "line 3: 'any' is '95%'"),
    "half": ("PatientID,any\na,0.5\n", "'0.5'"),
    "uncertain": ("PatientID,any\na,-1\n", "'-1'"),
    "huge": ("PatientID,any\na,1e400\n", "'1e400'"),
    "short row": ("PatientID,any\na\n", "line 2: 1 field, expected 2"),
    "no identifier": ("any,subdural\n1,1\n", "no column identifies the rows"),
    "empty identifier": ("PatientID,any\n,1\n", "line 2: 'PatientID' is ''"),
    "mixed levels": (
        "SOPInstanceUID,SeriesInstanceUID,any\n1.1,1,1\n,2,1\n",
        "line 3: 'SOPInstanceUID' is ''",
    ),
    "two of one": ("path,file,any\na,b,1\n", "both 'path' and 'file' seem to identify"),
    "unknown column": ("PatientID,any,fracture\na,1,0\n", r"unknown column\(s\) 'fracture'"),
    "no label": ("PatientID,split\na,train\n", "no column holds a label that is known"),
    "twice the same": ("PatientID,any,any\na,1,0\n", "the header has 'any' twice"),
    "two names": ("PatientID,ICH,any\na,1,0\n", "'ICH' and 'any' both mean any"),
    "contradiction": (
        "series_uid,any\n1,1\n2,0\n1,0\n",
        "line 4: '1' has another any on line 2",
    ),
    "secret contradiction": (
        "PatientID,any\nDoe,1\nDoe,0\n",
        "line 3: the same patient has another any on line 2",
    ),
    "any without": ("series_uid,any,subdural\n1,0,1\n", "line 2: any is 0, but subdural is 1"),
    "two owners": (
        "SOPInstanceUID,StudyInstanceUID,SeriesInstanceUID,any\n"
        "1.1,5,1,1\n1.2,5,1,1\n1.1,5,,1\n1.1,6,1,1\n",
        "line 5: '1.1' has another StudyInstanceUID on line 2",
    ),
    "empty": ("PatientID,any\n", "has a header but no rows"),
    "slice number": (f"{PHYSIONET}\n49,x,0,0,0,0,0,1,0\n", "slice number 'x'"),
    "one reader lacks": (
        CQ500.replace("IVH", "XXX") + "\n",
        "no reader has a column for intravent",
    ),
    "reads": (
        CQ500 + "\nCQ500-CT-0,B1" + ",2" * 24 + "\n",
        "line 2: epidural is '2', expected 0, 1 or nothing",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_tables_are_refused_by_line(write, text, message):
    with pytest.raises(DataError, match=message) as error:
        read_labels(write(text))
    assert "Doe" not in str(error.value)


OWNERS = "SOPInstanceUID,SeriesInstanceUID,StudyInstanceUID,PatientID,any\n"


def test_rows_must_name_the_series_and_study_of_the_files(write):
    series = ["8.1", "8.1", "8.2", "8.2"]
    fits = "1.1,8.1,s1,x,1\n1.2,,,x,0\n2.1,8.2,,y,0\n2.2,8.2,s1,z,0\n9.9,5,5,,1\n"
    labels = read_labels(write(OWNERS + fits))
    assert labels.labelling.level == "slice"
    assert "columns not used: 'PatientID'" in str(labels)
    values, _ = joined(labels, series_instance_uid=series)
    assert values == [[1], [0], [0], [0]]
    rows = fits.replace("2.1,8.2", "2.1,8.1").replace("2.2,8.2", "2.2,7")
    labels = read_labels(write(OWNERS + rows))
    message = (
        "the SeriesInstanceUID of a row is not that of the image: line 4: '8.1', in the files"
        " '8.2'; line 5: '7', in the files '8.2'."
    )
    with pytest.raises(DataError, match=re.escape(message)) as error:
        joined(labels, series_instance_uid=series)
    assert "Correct the file, or remove the column" in error.value.hint
    labels = read_labels(write("StudyInstanceUID,series_uid,any\ns2,8.2,1\n"))
    assert labels.labelling.level == "series"
    with pytest.raises(DataError, match="the StudyInstanceUID of a row .* line 2: 's2', in"):
        joined(labels, series_instance_uid=series)


def test_columns_that_are_not_used_are_told(write):
    labels = read_labels(write("PatientID,a,b,c,fold,site,e,f\nx,1,0,1,0,1,1,1\n"), "a=any")
    told = "columns not used: 'b'; 'c'; 'fold'; 'site'; 'e'; and 1 more;"
    assert told in str(labels)
    labels = read_labels(write(f"{PHYSIONET}\n49,1,0,0,0,0,0,1,0\n"))
    assert "columns not used: 'Fracture_Yes_No';" in str(labels)
    assert "not used" not in str(read_labels(write("PatientID,any\nx,1\n")))


BAD_MAPS = {
    "no equals": ("ICH", "neither COLUMN=LABEL,... nor a file"),
    "empty label": ("ICH=", "'ICH=' is not COLUMN=LABEL"),
    "twice": ("a=any,a=subdural", "names the column 'a' twice"),
    "one label": ("a=any,b=!any", "gives the label 'any' to two columns"),
}


@pytest.mark.parametrize(("text", "message"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_bad_maps_are_refused(write, text, message):
    path = write("PatientID,a,b\nx,1,0\n")
    with pytest.raises(UsageError, match=message):
        read_labels(path, text)


def test_maps_that_do_not_fit_are_refused(write, tmp_path):
    path = write("PatientID,a,b\nx,1,0\n")
    with pytest.raises(DataError, match="has no column 'c', which --label-map names"):
        read_labels(path, "c=any")
    with pytest.raises(UsageError, match="label 'x,y' is no usable name|is not COLUMN=LABEL"):
        read_labels(path, {"a": "x,y"})
    with pytest.raises(DataError, match="line 2: exclusive labels: expected exactly one 1"):
        read_labels(write("PatientID,a,b\nx,1,1\n", "two.csv"), "a=a,b=b", exclusive=True)
    rsna = write("ID,Label\n" + "".join(f"ID_1_{name},0\n" for name in LABELS), "rsna.csv")
    with pytest.raises(UsageError, match="--label-map does not apply"):
        read_labels(rsna, "a=any")
    with pytest.raises(UsageError, match="are not exclusive"):
        read_labels(rsna, exclusive=True)
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UsageError, match="expected an object"):
        read_labels(path, tmp_path / "bad.json")
    assert parse_label_map(" a = any ") == {"a": "any"}


def test_labels_that_fit_no_image_say_how_they_differ(write):
    labels = read_labels(write("sop_instance_uid,any\n1.1,1\n"))
    with pytest.raises(DataError, match="match no image") as error:
        attach_labels(slices_of(sop_instance_uid=["ID_1.1", "ID_1.2", "ID_3", "ID_4"]), labels)
    assert "The images have 'ID_' before the identifiers" in error.value.hint
    labels = read_labels(write("sop_instance_uid,any\nID_1.1,1\n"))
    with pytest.raises(DataError, match="match no image") as error:
        attach_labels(slices_of(), labels)
    assert "The labels have 'ID_' before the identifiers" in error.value.hint
    labels = read_labels(write("patient_id,any\nDoe,1\n"))
    with pytest.raises(DataError, match="no PatientID is the same") as error:
        attach_labels(slices_of(), labels)
    assert "Doe" not in str(error.value) and "CQ500" not in str(error.value)


def test_paths_must_say_which_file(write):
    labels = read_labels(write("path,any\n1.dcm,1\n"))
    there = ["/d/a/1.dcm", "/d/c/1.dcm", "/d/b/x", "/d/b/y"]
    with pytest.raises(DataError, match=r"fits files in several folders: '1\.dcm'"):
        attach_labels(slices_of(container=there), labels)
    labels = read_labels(write("path,any\na/1.dcm,1\n1.dcm,1\n"))
    with pytest.raises(DataError, match=r"two rows fit the file 'd/a/1\.dcm'"):
        attach_labels(slices_of(container=there), labels)


def test_paths_name_a_volume_or_its_slices(write):
    labels = read_labels(write("path,any\n049.nii#2,1\nb/049.nii#1,0\n"))
    values, join = joined(labels)
    assert values == [[-1], [-1], [0], [1]]
    assert join.labelling.level == "slice"
    labels = read_labels(write("path,any\n049.nii,1\na/2.dcm,0\n"))
    values, join = joined(labels)
    assert values == [[-1], [0], [1], [1]]
    assert join.labelling.level == "series"
    labels = read_labels(write("path,any\n049.nii,1\n049.nii#2,1\n"))
    with pytest.raises(DataError, match=r"two rows fit the file 'd/b/049\.nii#2'") as error:
        joined(labels)
    assert "as a whole or each of its slices" in error.value.hint


def test_a_label_is_not_called_as_a_column(write):
    labels = read_labels(write("patient_id,x\n049,1\n"), "x=series_uid")
    with pytest.raises(DataError, match="a label is called 'series_uid', as a column of tables"):
        attach_labels(slices_of(), labels)


# What a newcomer met.

TWO_SERIES = {"patient_id": ["49"] * 4, "instance_number": ["1", "2", "1", "2"]}


def physionet_of(write, *rows):
    return read_labels(write("\n".join([PHYSIONET, *rows])))


def test_a_slice_number_of_two_series_is_refused_and_the_patient_not_named(write):
    labels = physionet_of(write, "49,1,0,1,0,0,0,0,0", "49,2,0,0,0,0,0,1,0", "50,1,0,0,0,0,0,1,0")
    message = r"patient and slice number fit several series \(2 rows of 3\)"
    with pytest.raises(DataError, match=message) as error:
        attach_labels(slices_of(**TWO_SERIES), labels)
    assert "Index only the series" in error.value.hint and "49" not in error.value.message
    one = slices_of(**TWO_SERIES, series_uid=["1"] * 4)
    with pytest.raises(DataError, match=r"fit several images of a series \(2 rows of 3\)"):
        attach_labels(one, labels)
    alone, join = attach_labels(slices_of(**TWO_SERIES)[2:], labels)
    assert alone["any"].tolist() == [1, 0] and join.num_labels_unused == 1


def test_patients_that_differ_by_signs_do_not_share_a_row(write):
    reads = ",".join(["CQ500-CT-7", "B1", *["1,0,0,1,0,0,0,0"] * 3])
    labels = read_labels(write(f"{CQ500}\n{reads}\n"))
    two = ["CQ500-CT-7", "CQ500-CT-7", "cq500ct007", "x"]
    with pytest.raises(DataError, match="a row fits several values of patient_id: 1 of") as error:
        attach_labels(slices_of(patient_id=two), labels)
    assert "500" not in str(error.value).removeprefix(labels.source)
    _, join = attach_labels(slices_of(patient_id=["cq500ct007"] * 2 + ["a", "A"]), labels)
    assert join.num_labelled == 2


def test_slice_numbers_that_fit_nothing_say_what_is_compared(write):
    labels = physionet_of(write, "49,1,0,1,0,0,0,0,0")
    with pytest.raises(DataError, match="a patient and slice number; the images have no Instance"):
        attach_labels(slices_of(patient_id=["49"] * 4, instance_number=[""] * 4), labels)
    message = "a patient and slice number; no image has the PatientID and the InstanceNumber"
    with pytest.raises(DataError, match=message) as error:
        attach_labels(slices_of(patient_id=["49"] * 4, instance_number=["7"] * 4), labels)
    assert "49" not in str(error.value).removeprefix(labels.source)


@pytest.mark.parametrize("key", ["SOPInstanceUID", "series_uid", "StudyInstanceUID", "PatientID"])
def test_an_empty_any_follows_from_all_five_subtypes(write, key):
    header = f"{key},epidural,intraparenchymal,intraventricular,subarachnoid,subdural,any"
    rows = ["a,0,0,0,0,0,", "b,0,0,0,0,1,", "c,0,0,0,,0,", "d,0,0,0,,1,", "e,,,,,,1", "f,,,,,,"]
    labels = read_labels(write("\n".join([header, *rows])))
    assert labels.table["any"].tolist() == [0, 1, -1, 1, 1, -1]


def test_an_empty_opposite_follows_from_all_five_subtypes(write):
    labels = physionet_of(write, "49,1,0,0,0,0,0,,0", "49,2,0,0,1,0,0,,0", "49,3,0,0,,0,0,,0")
    assert labels.table["any"].tolist() == [0, 1, -1]


def test_rows_complete_each_other(write):
    header = "series_uid,epidural,intraparenchymal,intraventricular,subarachnoid,subdural,any"
    rows = ["1,0,,0,0,0,", "2,1,0,0,0,0,", "1,,0,,,,", "2,,,,,,1"]
    labels = read_labels(write("\n".join([header, *rows])))
    assert labels.table.to_numpy().tolist() == [[0] * 6, [1, 0, 0, 0, 0, 1]]
    assert (labels.num_rows, labels.num_duplicates) == (4, 2)
    other = write("series_uid,epidural,any\n1,,1\n1,1,\n1,0,1\n", "other.csv")
    with pytest.raises(DataError, match="line 4: '1' has another epidural on line 3"):
        read_labels(other)


def test_readers_that_tie_are_no_gap(write):
    """Two rows of a patient: one yes, one no; then two yes."""
    rows = [["1,0,0,0,0,0,0,0", "0,0,0,0,0,0,0,0", ",,,,,,,"], ["1,0,0,0,0,0,0,0"] * 3]
    text = "\n".join([CQ500, *(",".join(["CQ500-CT-1", "B1", *row]) for row in rows)])
    with pytest.raises(DataError, match="line 3: the same patient has another any on line 2"):
        read_labels(write(text))


def test_a_map_may_name_columns_with_commas_and_equals_signs(write, tmp_path):
    path = write('PatientID,"Bleed, any",a=b\nx,1,0\n')
    label_map = {"Bleed, any": "any", " a=b ": "subdural"}
    (tmp_path / "map.json").write_text(json.dumps(label_map))
    for given in (label_map, tmp_path / "map.json", str(tmp_path / "map.json")):
        labels = read_labels(path, given)
        assert labels.labels.names == ("subdural", "any")
        assert labels.table.to_numpy().tolist() == [[0, 1]]


BAD_JSON = {
    "nothing": ("{}", r"--label-map .*map\.json names no column"),
    "twice": ('{"a": "any", "a": "subdural"}', "names the column 'a' twice"),
    "one label": ('{"a": "any", "b": "!any"}', "gives the label 'any' to two columns"),
    "no label": ('{"a": " ! "}', r"map\.json: 'a=!' is not COLUMN=LABEL"),
    "nested": ('{"a": {"b": "any"}}', r"map\.json: expected an object"),
}


@pytest.mark.parametrize(("text", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_maps_in_files_are_refused(write, tmp_path, text, message):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_labels(write("PatientID,a,b\nx,1,0\n"), str(tmp_path / "map.json"))


@pytest.mark.parametrize("label_map", ["", "  "])
def test_an_empty_map_is_refused(write, label_map):
    with pytest.raises(UsageError, match="--label-map is empty; expected COLUMN=LABEL"):
        read_labels(write("PatientID,a\nx,1\n"), label_map)
    with pytest.raises(UsageError, match="names no column"):
        read_labels(write("PatientID,a\nx,1\n"), {})


NO_TABLES = {
    "semicolons": ("PatientID;any\n1;0\n", "separated by semicolons; expected commas", "sep=';'"),
    "tabs": ("PatientID\tany\n1\t0\n", "separated by tabs; expected commas", r"sep='\t'"),
    "empty": ("", "is empty; expected a CSV file", "one for each label"),
    "zeros": ("\0\0\1\0\n", "is no text", "one for each label"),
    "one column": ("any\n1\n", "the header is 'any'", "one for each label"),
}


@pytest.mark.parametrize(("text", "message", "hint"), NO_TABLES.values(), ids=NO_TABLES)
def test_what_is_no_table_is_not_taken_for_rsnas(write, text, message, hint):
    with pytest.raises(DataError, match=message) as error:
        read_labels(write(text))
    assert hint in error.value.hint


def test_the_way_to_commas_that_the_hint_names_keeps_every_label(write, tmp_path):
    path = write("PatientID;any;subdural\n049;1;\n50;0;0\n")
    table = pd.read_csv(path, sep=";", dtype=str, keep_default_na=False)
    table.to_csv(tmp_path / "new.csv", index=False)
    found = read_labels(tmp_path / "new.csv").table
    assert found.index.tolist() == ["049", "50"] and found["subdural"].tolist() == [-1, 0]


def test_exclusive_labels_that_are_none_are_refused_as_a_whole(write):
    one = write("PatientID,any\nx,1\n", "one.csv")
    with pytest.raises(UsageError, match="--exclusive: .* gives one label, any;") as error:
        read_labels(one, exclusive=True)
    assert "Leave --exclusive out" in error.value.hint and "any_label" not in str(error.value)
    six = write(f"PatientID,{','.join(LABELS)}\nx,0,0,0,0,1,1\n", "six.csv")
    rsna = write("ID,Label\n" + "".join(f"ID_1_{name},0\n" for name in LABELS), "rsna.csv")
    for path in (six, rsna):
        with pytest.raises(UsageError, match="are not exclusive: any is 1 wherever a") as error:
            read_labels(path, exclusive=True)
        assert error.value.hint == "Leave --exclusive out."
    with pytest.raises(UsageError, match="got any") as error:
        LabelSet(("any",), exclusive=True)
    assert "any_label" not in error.value.hint


def test_one_is_one(write):
    labels = read_labels(write("StudyInstanceUID,any,subdural\ns1,1,\n"))
    assert str(labels).startswith(
        "1 study; positive: subdural 0, any 1; 1 row, 0 duplicates merged, 1 label missing;"
    )
    labels = read_labels(write("patient_id,any\n049,1\nz,0\n"))
    _, join = attach_labels(slices_of(), labels)
    assert str(join).endswith("; 1 label without an image")
