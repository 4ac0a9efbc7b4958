"""What headers say of scanner, patient and contrast medium: groups, and nothing of a person."""

import dataclasses
import io
import math
import string

import numpy as np
import pytest
from enhanced_ct import enhanced, frame_item, sequence, written
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import head_volume
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ImplicitVRLittleEndian
from test_data_set import ELEMENTS, encoded, file_of
from tiny_dicom import tiny_dataset, tiny_file, tiny_head, to_bytes

from ich_keras.ct.dicom import read_header, read_headers
from ich_keras.ct.elements import TAGS
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import SERIES_COLUMNS
from ich_keras.ct.traits import (
    AGE_GROUPS,
    MAX_SCANNER_CHARACTERS,
    OTHER_MAKER,
    SEXES,
    Traits,
    age_group_of,
    described_contrast,
    scanner_of,
    sex_of,
    thickness_mm,
)
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.cache.plan import inputs_fingerprint

COLUMNS = ["scanner", "slice_thickness_mm", "age_group", "sex", "contrast"]
WORDS = {"", "yes", "no"}


def traits(**tags) -> Traits:
    return read_header(io.BytesIO(tiny_file(**tags))).traits


def series_of(folder, *slices, **common):
    """Index a series with a slice for each set of tags."""
    folder.mkdir(exist_ok=True)
    for number, tags in enumerate(slices):
        content = tiny_file(
            tiny_head(number),
            SOPInstanceUID=f"1.2.3.4.{number}",
            ImagePositionPatient=[-16, -16, 5 * number],
            **common,
            **tags,
        )
        (folder / f"{number}.dcm").write_bytes(content)
    return index_folder(folder)


# --- One slice ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("maker", "model", "expected"),
    [
        ("SIEMENS", "SOMATOM Definition AS+", "SIEMENS SOMATOM DEFINITION AS+"),
        ("Siemens Healthineers", " somatom  definition as+ ", "SIEMENS SOMATOM DEFINITION AS+"),
        ("GE MEDICAL SYSTEMS", "LightSpeed VCT", "GE LIGHTSPEED VCT"),
        ("Philips Medical Systems", "Brilliance 64", "PHILIPS BRILLIANCE 64"),
        ("TOSHIBA_MEC_CT3", "Aquilion", "TOSHIBA AQUILION"),
        ("UIH", "uCT 760", "UNITED IMAGING UCT 760"),
        ("SIEMENS", "", "SIEMENS"),
        ("", "LightSpeed VCT", ""),
        ("Dr. John Doe", "of Doe Street", OTHER_MAKER),
        ("Ärzte & Söhne", "x", OTHER_MAKER),
        ("\xff\xfe", "x", OTHER_MAKER),
        ("GE^Doe", "x", OTHER_MAKER),
        ("GE", "Doe^John", "GE"),
        ("GE", "19610203", "GE"),
        ("GE", "serial 1234567", "GE"),
        ("GE", "=cmd|' /C calc'!A0", "GE"),
        ("GE", "<script>alert(1)</script>", "GE"),
        ("GE", "`x` | y", "GE X Y"),
        ("GE", "x" * 64, ("GE " + "X" * 64)[:MAX_SCANNER_CHARACTERS]),
    ],
)
def test_scanners_are_makers_that_are_known_and_plain_models(maker, model, expected):
    assert scanner_of(maker, model) == expected
    if maker.isascii() and model.isascii():
        assert traits(Manufacturer=maker, ManufacturerModelName=model).scanner == expected


@settings(max_examples=300)
@given(st.text(max_size=80), st.text(max_size=80))
def test_no_text_is_a_scanner_that_breaks_a_table(maker, model):
    for found in (scanner_of(maker, model), scanner_of("GE", model)):
        assert len(found) <= MAX_SCANNER_CHARACTERS
        assert set(found) <= set(string.ascii_uppercase + string.digits + "+./- ")
        assert not found or found[0].isalpha()


def test_ages_become_bands_by_their_unit():
    expected = {
        **{f"{years:03d}Y": "under 18" for years in (1, 17)},
        **{f"{years:03d}Y": "18 to 39" for years in (18, 39)},
        **{f"{years:03d}Y": "40 to 59" for years in (40, 59)},
        **{f"{years:03d}Y": "60 to 79" for years in (60, 79)},
        **{f"{years:03d}Y": "80 and over" for years in (80, 89, 90, 101, 130)},
        **dict.fromkeys(("003D", "099W", "018M", "002M"), "under 18"),
        "240M": "18 to 39",
        "45Y": "40 to 59",
        **dict.fromkeys(("", "045", "Y", "000Y", "131Y", "999Y", "-5Y", "45 years", "4.5Y"), ""),
        "9" * 64: "",
    }
    assert {age: age_group_of(age) for age in expected} == expected
    assert set(expected.values()) == {"", *AGE_GROUPS}
    assert traits(PatientAge="067Y").age_group == "60 to 79"
    assert "67" not in repr(read_header(io.BytesIO(tiny_file(PatientAge="067Y"))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 5.0), ("0.625", 0.625), (" 2.5 ", 2.5), ("0", None), ("-5", None), ("1e9", None)]
    + [(text, None) for text in ("", "nan", "5,0", "5\\5", "five")],
)
def test_thicknesses_are_mm_or_unknown(text, expected):
    found = thickness_mm(text)
    assert found == expected if expected is not None else math.isnan(found)


CONTRAST = {
    "yes": (
        {"ContrastBolusAgent": "Ultravist 370"},
        {"ContrastBolusAgent": "NONIONIC"},
        {"ContrastBolusAgent": "non-ionic 100 ml"},
        {"ContrastBolusAgent": "CONTRAST"},
        {"ContrastBolusRoute": "IV"},
        {"ContrastBolusIngredient": "IODINE"},
        {"ContrastBolusVolume": "80"},
        {"ContrastBolusTotalDose": "50.5"},
        {"ContrastFlowRate": ["0", "3.5"]},
        {"ContrastBolusAgentSequence": Sequence([Dataset()])},
        {"ContrastBolusAgent": "NONE", "ContrastBolusVolume": "80"},
        {"SeriesDescription": "Head post contrast 5.0"},
        {"SeriesDescription": "CTA Head & Neck"},
        {"SeriesDescription": "Kopf mit KM"},
        {"SeriesDescription": "HEAD +C"},
    ),
    "no": (
        *({"ContrastBolusAgent": text} for text in ("NONE", "no", "Without", "W/O", "0", "N")),
        {"ContrastBolusAgent": "No contrast", "ContrastBolusVolume": "0"},
        {"ContrastBolusRoute": "NONE"},
        {"SeriesDescription": "HEAD W/O CONTRAST"},
        {"SeriesDescription": "Kopf nativ 5.0"},
        {"SeriesDescription": "precontrast"},
    ),
    "": (
        {},
        {"ContrastBolusAgent": ""},
        {"ContrastBolusAgent": "UNKNOWN"},
        {"ContrastBolusAgent": "n/a"},
        {"ContrastBolusRoute": "Oral"},
        {"ContrastBolusVolume": "0"},
        {"ContrastBolusAgentSequence": Sequence([])},
        *(
            {"SeriesDescription": text}
            for text in (
                *("HEAD W/WO CONTRAST", "W/O AND W CONTRAST", "pre/post contrast", "3 phases"),
                *("Brain 5.0 H30s", "Contrast", "HEAD W C-SPINE", "edge enhanced"),
            )
        ),
    ),
}


@pytest.mark.parametrize("word", CONTRAST)
def test_contrast_medium_is_yes_no_or_not_said(word):
    for tags in CONTRAST[word]:
        assert traits(**tags).contrast == word, tags


@pytest.mark.parametrize("is_undefined", [False, True])
@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
@pytest.mark.parametrize("items", [0, 1])
def test_a_sequence_of_agents_counts_where_it_holds_one(items, syntax, is_undefined):
    dataset = tiny_dataset(ContrastBolusAgentSequence=Sequence([Dataset()] * items))
    dataset["ContrastBolusAgentSequence"].is_undefined_length = is_undefined
    content = to_bytes(dataset, syntax) if syntax else to_bytes(dataset)
    assert read_header(io.BytesIO(content)).traits.contrast == ("yes" if items else "")


def test_a_frame_says_itself_whether_it_was_made_with_contrast(tmp_path):
    """Enhanced CT lists the agents of a scan, and for each frame whether they were in."""

    def usage(word):
        return sequence(ContrastBolusAgentNumber=1, ContrastBolusAgentAdministered=word)

    frames = [
        frame_item(n + 1, (-126, -126, 5 * n), ContrastBolusUsageSequence=usage(word))
        for n, word in enumerate(("NO", "YES"))
    ]
    agents = {"ContrastBolusAgentSequence": Sequence([Dataset()])}
    (tmp_path / "a.dcm").write_bytes(written(enhanced(head_volume(2), frames, **agents)))
    headers = read_headers(str(tmp_path / "a.dcm"))
    assert [headers[number].traits.contrast for number in (1, 2)] == ["", "yes"]
    # Without that, the list counts.
    plain = [frame_item(n + 1, (-126, -126, 5 * n)) for n in range(2)]
    (tmp_path / "b.dcm").write_bytes(written(enhanced(head_volume(2), plain, **agents)))
    assert read_headers(str(tmp_path / "b.dcm"))[1].traits.contrast == "yes"


@settings(max_examples=300)
@given(st.text(max_size=64))
def test_any_description_is_answered_in_one_word(description):
    assert described_contrast(description) in WORDS


HOSTILE = [
    *(b"", b"\0", b"\xff" * 70, b"\\" * 9),
    *(b"CANARY\n\x1b[31m", b"CANARY" * 20_000, b"=CANARY|'"),
]
TEXTS = """
Manufacturer ManufacturerModelName PatientAge PatientSex SeriesDescription ContrastBolusAgent
ContrastBolusRoute ContrastBolusVolume SliceThickness
""".split()  # noqa: SIM905


@pytest.mark.parametrize("keyword", TEXTS)
def test_hostile_values_are_unknown_and_refuse_no_slice(keyword):
    for value in HOSTILE:
        elements = {**ELEMENTS, TAGS[keyword]: encoded(TAGS[keyword], b"UN", value)}
        found = read_header(io.BytesIO(file_of(elements))).traits
        assert "CANARY" not in repr(found)
        assert found.scanner in ("", OTHER_MAKER)
        assert found.age_group == found.sex == ""
        assert found.contrast in WORDS


# --- A series -------------------------------------------------------------------------------


def test_most_slices_decide_and_those_that_say_nothing_do_not_count(tmp_path):
    said = {"Manufacturer": "GE", "PatientAge": "045Y", "PatientSex": "F", "SliceThickness": "5"}
    other = {"Manufacturer": "Siemens", "PatientAge": "065Y", "PatientSex": "M"}
    index = series_of(
        tmp_path / "data", said, {**other, "SliceThickness": "2.5"}, said, {}, {}, {}, {}
    )
    assert index.series[COLUMNS].values.tolist() == [["GE", 5.0, "40 to 59", "F", ""]]


def test_of_equally_many_the_first_in_order_whatever_the_files_are_called(tmp_path):
    ones, others = {"PatientSex": "M", "SliceThickness": "5"}, {"PatientSex": "F"}
    others["SliceThickness"] = "2.5"
    for name, slices in (("a", [ones, others]), ("b", [others, ones])):
        row = series_of(tmp_path / name, *slices).series.iloc[0]
        assert (row["sex"], row["slice_thickness_mm"]) == ("F", 2.5)


@pytest.mark.parametrize(
    ("agents", "expected"),
    [(("", "", "iodine"), "yes"), (("NONE", "", "iodine"), "yes"), (("NONE", "", ""), "no")],
)
def test_one_slice_with_contrast_medium_is_enough(tmp_path, agents, expected):
    slices = [{"ContrastBolusAgent": agent} for agent in agents]
    index = series_of(tmp_path / "data", *slices)
    assert index.series["contrast"].tolist() == [expected]


def test_tables_hold_bands_and_names_of_scanners_and_come_back(tmp_path):
    tags = {
        "Manufacturer": "GE MEDICAL SYSTEMS",
        "ManufacturerModelName": "LightSpeed VCT",
        "PatientAge": "093Y",
        "PatientSex": "M",
        "SliceThickness": "5.0",
        "ContrastBolusAgent": "CANARY 300",
        "SeriesDescription": "CANARY of Mr KINGFISHER",
        "PatientBirthDate": "19010203",
    }
    index = series_of(tmp_path / "data", *[{}] * 4, **tags)
    expected = ["GE LIGHTSPEED VCT", 5.0, "80 and over", "M", "yes"]
    index.save(tmp_path / "index")
    cache = build_cache(index, tmp_path / "cache", 16)
    for tables in (index, SeriesIndex.load(tmp_path / "index"), CTCache.open(cache.path)):
        assert tables.series[COLUMNS].values.tolist() == [expected]
    for name in ("index", "cache"):
        for path in (tmp_path / name).glob("*.csv"):
            text = path.read_text()
            assert not any(word in text for word in ("CANARY", "KINGFISHER", "093Y", "1901", ",93"))


def test_files_without_these_tags_are_unknown(tmp_path):
    row = series_of(tmp_path / "data", {}, {}).series.iloc[0]
    assert row[["scanner", "age_group", "sex", "contrast"]].tolist() == [""] * 4
    assert np.isnan(row["slice_thickness_mm"])


def test_an_index_without_these_columns_is_read(tmp_path):
    index = series_of(tmp_path / "data", {"PatientSex": "F"}, {})
    older = dataclasses.replace(index, series=index.series.drop(columns=COLUMNS))
    older.save(tmp_path / "older")
    loaded = SeriesIndex.load(tmp_path / "older")
    assert list(loaded.series.columns) == list(SERIES_COLUMNS)
    assert loaded.series["sex"].tolist() == [""]
    assert loaded.series["slice_thickness_mm"].isna().all()


def test_they_are_no_part_of_what_the_pixels_depend_on(tmp_path):
    plain = series_of(tmp_path / "plain", {}, {}, {})
    told = series_of(tmp_path / "told", *[{"PatientSex": "F", "PatientAge": "045Y"}] * 3)
    # The size of a file is, so both get one.
    told = dataclasses.replace(
        told, slices=told.slices.assign(file_size=plain.slices["file_size"].to_numpy())
    )
    assert inputs_fingerprint(told) == inputs_fingerprint(plain)
    assert told.series["sex"].tolist() == ["F"]


def test_sexes_are_those_of_dicom():
    for text in SEXES:
        assert traits(PatientSex=text).sex == text
    for text in ("f", " m"):
        assert sex_of(text) == text.strip().upper()
    for text in ("", "Male", "W", "1", "FF"):
        assert sex_of(text) == ""
    assert SEXES == ("F", "M", "O")


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_the_real_head_says_what_it_says(real_ge_series):
    row = index_folder(real_ge_series).series.iloc[0]
    assert row["scanner"].startswith("GE ") or row["scanner"] == ""
    assert row["contrast"] in WORDS and row["age_group"] in {"", *AGE_GROUPS}
