"""Walking over the elements of a data set: like pydicom on good files, bounded on hostile ones."""

import contextlib
import io
import struct
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import pandas as pd
import pydicom
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydicom.filereader import data_element_generator
from tiny_dicom import tiny_dataset, tiny_file, to_bytes

from ich_keras.ct import data_set
from ich_keras.ct.data_set import CONTRAST_AGENTS, has_explicit_vr, read_elements, read_meta
from ich_keras.ct.dicom import read_header, read_hu
from ich_keras.ct.elements import TAGS, Element, text_of
from ich_keras.ct.rejects import REJECT_CODES, RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder

BIG_ENDIAN = "1.2.840.10008.1.2.2"
FIRST_PIXELS, LAST_PIXELS = TAGS["FloatPixelData"], TAGS["PixelData"]
ITEM = b"\xfe\xff\x00\xe0"
ITEM_END = b"\xfe\xff\x0d\xe0\0\0\0\0"
SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"
ENDLESS = b"\xff\xff\xff\xff"


# Of the sequence it matters whether it holds something.
LOOKED_AT = TAGS | {"ContrastBolusAgentSequence": CONTRAST_AGENTS}


def is_pixels(tag):
    return FIRST_PIXELS <= tag <= LAST_PIXELS


def sequence(content):
    """A private sequence of undefined length, explicit VR."""
    return b"\x09\x00\x10\x10SQ\0\0" + ENDLESS + content + SEQUENCE_END


def with_elements(content, raw):
    """A file with more elements, at their place among the others: before (0010,0020)."""
    start = content.index(b"\x10\x00\x20\x00LO")
    return content[:start] + raw + content[start:]


def files_of_pydicom():
    folders = [Path(pydicom.__path__[0]) / "data"]
    with contextlib.suppress(ImportError):
        import data_store  # pydicom-data

        folders += map(Path, data_store.__path__)
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def values_by_pydicom(stream, is_implicit, is_little_endian):
    """The values of TAGS, and where that of the pixels begins."""
    places = []

    def stop_when(tag, vr, length):
        if is_pixels(int(tag)):
            places.append(stream.tell())
        return is_pixels(int(tag))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elements = list(
            data_element_generator(
                stream,
                is_implicit,
                is_little_endian,
                stop_when=stop_when,
                specific_tags=list(TAGS.values()),
            )
        )
    values = {
        int(element.tag): element.value or b""
        for element in elements
        if isinstance(element.value, bytes | None)
    }
    return values, places[0] if places else None


def test_the_values_and_the_place_of_the_pixels_are_those_of_pydicom():
    compared = 0
    for path in files_of_pydicom():
        with open(path, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            found: dict[int, Element] = {}
            try:
                meta = read_meta(stream, size, False)
                syntax = text_of(meta, "TransferSyntaxUID")
                if syntax.endswith(".99"):  # deflated
                    continue
                start, is_implicit = stream.tell(), not has_explicit_vr(stream)
                encoding = (is_implicit, syntax != BIG_ENDIAN)
                stop = read_elements(stream, size, *encoding, is_pixels, found, "header")
            except RejectedFile as error:
                # No DICOM file, or one that was cut off, of which pydicom says nothing.
                assert error.code in ("NOT_DICOM", "TRUNCATED")
                continue
            stream.seek(start)
            values, place = values_by_pydicom(stream, *encoding)
        assert {tag: element.value for tag, element in found.items()} == values, path
        assert place == (None if stop is None else stop.value_offset), path
        compared += 1
    assert compared >= 100


@pytest.mark.parametrize(
    "items",
    [
        b"",
        ITEM + b"\0\0\0\0",
        ITEM + b"\x08\0\0\0" + b"\x08\x00\x05\x00CS\0\0",
        ITEM + ENDLESS + b"\x08\x00\x05\x00CS\0\0" + ITEM_END,
        ITEM + ENDLESS + b"\x08\x00\x05\x00\0\0\0\0" + ITEM_END,  # implicit within explicit
        ITEM + ENDLESS + sequence(ITEM + ENDLESS + ITEM_END) + ITEM_END,
    ],
)
def test_sequences_of_undefined_length_are_stepped_over(items):
    content = with_elements(tiny_file(), sequence(items))
    assert read_header(io.BytesIO(content)).patient_id == "patient-1"


def test_a_value_within_a_sequence_is_not_taken_for_that_of_the_slice():
    item = tiny_dataset(PatientID="another")
    dataset = tiny_dataset()
    dataset.ReferencedImageSequence = [item]
    for undefined in (False, True):
        dataset["ReferencedImageSequence"].is_undefined_length = undefined
        item.is_undefined_length_sequence_item = undefined
        assert read_header(io.BytesIO(to_bytes(dataset))).patient_id == "patient-1"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (sequence(b"\x08\x00\x05\x00CS\0\0"), "something other than items"),
        (sequence(ITEM + ENDLESS)[:-8] * 100, "nested too deeply"),
        (b"\x09\x00\x10\x10SQ\0\0" + ENDLESS + ITEM + ENDLESS, "the file ends inside the header"),
    ],
)
def test_broken_sequences_are_refused(raw, message):
    with pytest.raises(RejectedFile, match=message) as caught:
        read_header(io.BytesIO(with_elements(tiny_file(), raw)))
    assert caught.value.code in ("BAD_VALUE", "TRUNCATED")


@pytest.mark.parametrize(
    "raw",
    [
        sequence((ITEM + b"\0\0\0\0") * 2_000_000),
        sequence((ITEM + ENDLESS + ITEM_END) * 1_000_000),
        sequence(ITEM + ENDLESS + b"\x09\x00\x11\x10LO\0\0" * 2_000_000 + ITEM_END),
        b"\x09\x00\x11\x10LO\0\0" * 2_000_000,
    ],
    ids=["items", "open items", "elements in an item", "elements"],
)
def test_millions_of_empty_items_cost_neither_time_nor_memory(tmp_path, raw, monkeypatch):
    path = tmp_path / "bomb.dcm"
    path.write_bytes(with_elements(tiny_file(), raw))
    began = time.perf_counter()
    with pytest.raises(RejectedFile, match="holds over 200000 elements and items"):
        read_header(path)
    assert time.perf_counter() - began < 5  # 0.2 s on an idle core
    monkeypatch.setattr(data_set, "MAX_ELEMENTS", 5000)  # tracing memory takes its time
    tracemalloc.start()
    with pytest.raises(RejectedFile, match="over 5000"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # 20 bytes for each would be as much


def test_many_items_of_known_length_are_jumped_over(tmp_path):
    items = (ITEM + b"\0\0\0\0") * 2_000_000
    raw = b"\x09\x00\x10\x10SQ\0\0" + struct.pack("<I", len(items)) + items
    path = tmp_path / "long.dcm"
    path.write_bytes(with_elements(tiny_file(), raw))
    assert read_header(path).patient_id == "patient-1"


# --- Every tag under the same guard -----------------------------------------------------------

VRS = (b"AE", b"AS", b"CS", b"DS", b"IS", b"LO", b"PN", b"SH", b"TM", b"UI", b"US", b"UN", b"SQ")
LONG_VRS = (b"UN", b"SQ")


def encoded(tag, vr, value, length=None):
    """One element, explicit VR, little endian."""
    length = len(value) if length is None else length
    if vr in LONG_VRS:
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr, 0, length) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, length & 0xFFFF) + value


def parts_of(content):
    """Return the elements of a file of `tiny_file`, by tag."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    elements = {
        0x00020002: encoded(0x00020002, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0"),
        0x00020010: encoded(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0"),
    }
    for raw in map(dataset.get_item, dataset.keys()):
        tag, vr = int(raw.tag), raw.VR.encode()
        if vr == b"OW":
            head = struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr, 0, raw.length)
            elements[tag] = head + raw.value
        else:
            elements[tag] = encoded(tag, vr, raw.value or b"")
    return elements


def file_of(elements):
    return bytes(128) + b"DICM" + b"".join(elements[tag] for tag in sorted(elements))


ELEMENTS = parts_of(tiny_file())


def read_or_refused(content):
    """Read a file both ways; what is raised must be a reject with a known code."""
    for read in (read_header, read_hu):
        try:
            read(io.BytesIO(content))
        except RejectedFile as error:
            assert error.code in REJECT_CODES
            assert error.hint
            assert "\n" not in str(error)
            assert "SECRET" not in str(error)


bad_values = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=20).map(lambda text: text.encode("utf-8")),
    st.sampled_from(
        (
            *(
                b"",
                b"\\",
                b"\\\\\\",
                b"nan",
                b"-inf",
                b"1e999",
                b"1\\1e400",
                b"\xff" * 70,
                b"\0" * 9,
            ),
            *(
                b"ISO_IR 999",
                b"ISO 2022 IR 87\\\x1b$B",
                b"zlib",
                b"undefined",
                b"idna",
                b"UTF8\\\xff",
            ),
            *(b"1.2.3.4#2", b"=1+1|cmd", b'"\r\n;'),
            *(b"9" * 5000, b"\x1b$)C\xff\xff", "مريض".encode(), b"1.2.840.10008.1.2.4.90"),
        )
    ),
)


@settings(max_examples=500)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(sorted(LOOKED_AT)), st.sampled_from(VRS), bad_values),
        min_size=1,
        max_size=3,
    ),
    odd_length=st.none() | st.integers(0, 2**32 - 1),
    patient=st.sampled_from(
        [b"SECRET", b"SECRET\xfc", "SECRET مريض".encode(), b"SECRET\x1b$B\xff"]
    ),
)
def test_whatever_a_tag_holds_the_file_is_read_or_refused(changes, odd_length, patient):
    elements = dict(ELEMENTS)
    elements[TAGS["PatientID"]] = encoded(TAGS["PatientID"], b"LO", patient)
    for number, (keyword, vr, value) in enumerate(changes):
        tag = LOOKED_AT[keyword]
        if not is_pixels(tag):
            length = odd_length if number == 0 else None
            elements[tag] = encoded(tag, vr, value, length)
    read_or_refused(file_of(elements))


META_TAGS = {
    "FileMetaInformationGroupLength": 0x00020000,
    "FileMetaInformationVersion": 0x00020001,
    "MediaStorageSOPClassUID": 0x00020002,
    "MediaStorageSOPInstanceUID": 0x00020003,
    "TransferSyntaxUID": 0x00020010,
    "ImplementationClassUID": 0x00020012,
}
ALL_TAGS = LOOKED_AT | META_TAGS


@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
    phases=[Phase.generate],  # making a failing folder smaller would take minutes
)
@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(sorted(ALL_TAGS)),
            st.sampled_from(VRS),
            bad_values,
            st.none() | st.integers(0, 2**32 - 1),
        ),
        min_size=40,
        max_size=40,
    )
)
def test_an_index_holds_the_good_files_whatever_the_bad_ones_hold(changes):
    """A folder of forty files with a bad value each, among the slices of a good series."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for number in range(4):
            position = {"ImagePositionPatient": [-125, -125, 5 * number]}
            content = tiny_file(SOPInstanceUID=f"1.2.3.{number}", PatientID="SECRET", **position)
            (images / f"good-{number}.dcm").write_bytes(content)
        for number, (keyword, vr, value, length) in enumerate(changes):
            elements = dict(ELEMENTS)
            uid = TAGS["SOPInstanceUID"]
            elements[uid] = encoded(uid, b"UI", b"1.2.9.%04d\0" % number)
            patient = (b"SECRET", b"SECRET\xfc")[number % 2]
            elements[TAGS["PatientID"]] = encoded(TAGS["PatientID"], b"LO", patient)
            if not is_pixels(tag := ALL_TAGS[keyword]):
                elements[tag] = encoded(tag, vr, value, length)
            (images / f"bad-{number}.dcm").write_bytes(file_of(elements))
        index = index_folder(images)
        index.save(Path(folder, "index"))
        again = SeriesIndex.load(Path(folder, "index"))
    assert {f"1.2.3.{number}" for number in range(4)} <= set(index.slices["sop_instance_uid"])
    assert len(index.slices) + len(index.rejects) == 44
    assert set(index.rejects["code"]) <= set(REJECT_CODES)
    for name in ("slices", "series", "rejects"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(index, name))
    assert "SECRET" not in index.rejects.to_csv() + index.series.drop(columns="patient_id").to_csv()


@pytest.mark.parametrize(
    "character_set",
    ["ISO_IR 999", "zlib", "undefined", "idna", "unicode_escape", "\0\0x", "ISO_IR 100\\?", "\x7f"],
)
def test_a_damaged_character_set_beside_a_name_that_is_not_ascii(tmp_path, character_set):
    elements = dict(ELEMENTS)
    elements[TAGS["PatientID"]] = encoded(TAGS["PatientID"], b"LO", b"M\xfcller")
    tag = TAGS["SpecificCharacterSet"]
    elements[tag] = encoded(tag, b"CS", character_set.encode("latin-1"))
    content = file_of(elements)
    with pytest.raises(RejectedFile, match="SpecificCharacterSet is .* PatientID") as caught:
        read_header(io.BytesIO(content))
    assert caught.value.code == "BAD_VALUE"
    assert "ller" not in str(caught.value)
    # The others are indexed.
    (tmp_path / "bad.dcm").write_bytes(content)
    (tmp_path / "good.dcm").write_bytes(tiny_file(SOPInstanceUID="1.2.3.77"))
    index = index_folder(tmp_path)
    assert index.slices["sop_instance_uid"].tolist() == ["1.2.3.77"]
    assert index.rejects["code"].tolist() == ["BAD_VALUE"]


@pytest.mark.parametrize(
    ("character_set", "raw", "expected"),
    [
        ("ISO_IR 192", "Müller مريض".encode(), "Müller مريض"),
        ("ISO_IR 100", "Müller".encode("latin-1"), "Müller"),
        ("ISO-IR 100", "Müller".encode("latin-1"), "Müller"),  # misspelt
        ("iso_ir 192", "Müller".encode(), "Müller"),
        ("UTF-8", "Müller".encode(), "Müller"),
        ("", "Müller".encode("latin-1"), "Müller"),
        # Announced as UTF-8, written as Latin-1: never two patients as one.
        ("ISO_IR 192", "Müller".encode("latin-1"), "Müller"),
        ("ISO_IR 144", "Яков".encode("iso8859_5"), "Яков"),
        ("\\ISO 2022 IR 87", b"\x1b$B;3ED\x1b(B", "山田"),
        ("ISO_IR 13", "ﾔﾏﾀﾞ".encode("shift_jis"), "ﾔﾏﾀﾞ"),
        ("zlib", b"ASCII-1", "ASCII-1"),  # nothing to decode, nothing to refuse
    ],
)
def test_patient_ids_in_many_alphabets(character_set, raw, expected):
    elements = dict(ELEMENTS)
    for keyword, vr, value in (
        ("SpecificCharacterSet", b"CS", character_set.encode()),
        ("PatientID", b"LO", raw),
    ):
        elements[TAGS[keyword]] = encoded(TAGS[keyword], vr, value)
    content = file_of(elements)
    assert read_header(io.BytesIO(content)).patient_id == expected


@pytest.mark.parametrize("keyword", ["ConvolutionKernel", "KVP", "BodyPartExamined", "ContentTime"])
@pytest.mark.parametrize("value", [b"x" * 70_000, b"\xff\0\n\x1b[31m", b"", b"\0"])
def test_a_tag_that_only_tells_slices_apart_never_refuses_one(keyword, value):
    elements = {**ELEMENTS, TAGS[keyword]: encoded(TAGS[keyword], b"UN", value)}
    header = read_header(io.BytesIO(file_of(elements)))
    texts = (*header.facts, *header.times, header.body_part)
    assert all(text.isprintable() or "\xff" in text for text in texts)
    assert max(map(len, texts)) <= 64


def test_the_agent_that_made_contrast_stays_in_the_file():
    header = read_header(io.BytesIO(tiny_file(ContrastBolusAgent="for Mr CANARY")))
    assert header.facts[-1] == "contrast"
    assert "CANARY" not in repr(header)
