"""CTCache: equal pixels by every road, and no way to a wrong or a zero slice."""

import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_keras import files
from ich_keras.ct import window
from ich_keras.ct.dicom import read_slice
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache import build as cache_build
from ich_keras.data.cache import fill as cache_fill
from ich_keras.data.cache import writer as cache_writer
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.cache.plan import inputs_fingerprint, plan_shards
from ich_keras.data.cache.shards import Shard
from ich_keras.data.inputs import resize_hu
from ich_keras.data.intensity import INTENSITIES
from ich_keras.data.labels import LabelTable, join_labels
from ich_keras.errors import (
    DataError,
    EnvironmentProblem,
    StaleError,
    UsageError,
)
from ich_keras.labels import LABELS

SIZE = 16
SLICE_BYTES = SIZE * SIZE * 2
LENGTHS = (5, 3, 7, 1)
# Shards of at most 8 slices: 5+3, 7+1.
SHARD_BYTES = 8 * SLICE_BYTES


def write_slice(path: Path, series: int, position: int, rows: int = 24, columns: int = 24) -> None:
    rng = np.random.default_rng([series, position])
    stored = rng.integers(0, 3000, (rows, columns), dtype=np.int16)
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = pydicom.uid.CTImageStorage
    dataset.SOPInstanceUID = f"1.2.3.{series}.{position}"
    dataset.SeriesInstanceUID = f"1.2.3.{series}"
    dataset.StudyInstanceUID = f"1.2.{series}"
    dataset.PatientID = f"P{series}"
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient = [0, 0, 5 * position]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.5, 0.5]
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = stored.tobytes()
    dataset.save_as(path, enforce_file_format=True)


def write_folder(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> SeriesIndex:
    folder.mkdir()
    for series, length in enumerate(lengths, start=1):
        for position in range(length):
            columns = 20 if series == 2 else 24  # one series that is not square
            write_slice(folder / f"s{series}-{position}.dcm", series, position, columns=columns)
    return index_folder(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> SeriesIndex:
    return write_folder(tmp_path_factory.mktemp("cache") / "dicom")


@pytest.fixture
def own_index(tmp_path) -> SeriesIndex:
    """An index whose files a test may damage."""
    return write_folder(tmp_path / "dicom")


def expected_hu(container: str) -> np.ndarray:
    return resize_hu(read_slice(container).hu, SIZE)


def build(index, out, **options) -> CTCache:
    return build_cache(index, out, **{"size": SIZE, "shard_bytes": SHARD_BYTES, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip_bit(path: Path, offset: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        value = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([value ^ 1]))


def label_table(uids, positive=()) -> LabelTable:
    values = np.array([[uid in positive] * len(LABELS) for uid in uids], np.int8)
    table = pd.DataFrame(values, pd.Index(uids, name="sop_instance_uid"), list(LABELS))
    return LabelTable(table, "labels.csv", len(uids) * len(LABELS))


@pytest.mark.parametrize(
    ("workers", "compression"), [(0, None), (2, None), (0, "gzip"), (2, "gzip"), (0, "blosc2")]
)
def test_a_cache_holds_what_reading_and_resizing_gives(index, tmp_path, workers, compression):
    calls = []
    cache = build(
        index,
        tmp_path / "cache",
        workers=workers,
        compression=compression,
        progress=lambda *call: calls.append(call),
    )
    expected = np.stack([expected_hu(path) for path in index.slices["container"]])
    assert expected.std() > 300
    hu = cache.slices_hu(np.arange(16))
    assert hu.dtype == np.int16 and hu.shape == (16, SIZE, SIZE)
    np.testing.assert_array_equal(hu, expected)
    np.testing.assert_array_equal(cache.slice_hu(11), expected[11])
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(cache.slices_hu(order), expected[order])
    assert cache.slices["sop_instance_uid"].tolist() == index.slices["sop_instance_uid"].tolist()
    for uid in cache.series_uids:
        rows = cache.slices["series_uid"] == uid
        np.testing.assert_array_equal(cache.series_hu(uid), expected[rows])
    cache.verify()
    assert calls[-1] == ("caching", 16, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert sorted(content(cache.path)) == [
        "manifest.json",
        "rejects.csv",
        "series.csv",
        "shard-0000.h5",
        "shard-0001.h5",
        "slices.csv",
    ]


def test_workers_and_a_second_build_give_the_same_bytes(index, tmp_path):
    build(index, tmp_path / "a")
    build(index, tmp_path / "b", workers=2)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_tables_come_back_exactly(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    added = ["repaired", "pixel_hash"]
    pd.testing.assert_frame_equal(cache.slices.drop(columns=added), index.slices)
    assert cache.slices["repaired"].tolist() == [False] * 16
    assert cache.slices["pixel_hash"].tolist() == [
        hashlib.sha256(expected_hu(path).tobytes()).hexdigest()[:32]
        for path in index.slices["container"]
    ]
    pd.testing.assert_frame_equal(cache.series, index.series)
    pd.testing.assert_frame_equal(cache.rejects, index.rejects)
    assert cache.series["num_slices"].tolist() == list(LENGTHS)
    assert list(cache.series_rows(cache.series_uids[2])) == list(range(8, 15))


def test_repr_tells_slices_series_size_and_shards(index, tmp_path):
    text = repr(build(index, tmp_path / "cache"))
    assert text.startswith(
        "CTCache(16 slices of 16x16, 4 series; 0.0 MiB in 2 shards, uncompressed"
    )


def test_hdf5_alone_reads_the_shard(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    expected = cache.slices_hu(range(8, 16))
    with h5py.File(cache.path / "shard-0001.h5") as file:
        hu, crc32 = file["hu"], file["crc32"][:]
        assert hu.shape == (8, SIZE, SIZE) and hu.dtype == np.int16 and hu.chunks is None
        np.testing.assert_array_equal(hu[:], expected)
        assert [zlib.crc32(image.tobytes()) for image in hu[:]] == crc32.tolist()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_shards_hold_whole_series_in_order_and_within_the_limit(lengths, slices_per_shard):
    uids = [f"s{n}" for n, length in enumerate(lengths) for _ in range(length)]
    shards = plan_shards(uids, slice_bytes=10, shard_bytes=10 * slices_per_shard)
    bounds = [(shard.start, shard.stop) for shard in shards]
    assert [row for start, stop in bounds for row in range(start, stop)] == list(range(len(uids)))
    held = [set(uids[start:stop]) for start, stop in bounds]
    assert sum(len(series) for series in held) == len(lengths)
    for (start, stop), series in zip(bounds, held, strict=True):
        assert stop - start <= slices_per_shard or len(series) == 1
    assert len({shard.name for shard in shards}) == len(shards)


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sets(st.integers(0, 15), max_size=4),
    st.sampled_from([None, "gzip"]),
)
def test_any_lengths_shards_and_losses_give_the_slices_that_are_left(
    tmp_path_factory, lengths, slices_per_shard, lost, compression
):
    folder = tmp_path_factory.mktemp("any")
    index = write_folder(folder / "dicom", tuple(lengths))
    lost = {row for row in lost if row < len(index.slices)}
    if len(lost) == len(index.slices):
        lost.pop()
    for row in lost:
        Path(index.slices["container"][row]).write_bytes(b"no DICOM")
    shard_bytes = slices_per_shard * SLICE_BYTES
    cache = build(index, folder / "cache", shard_bytes=shard_bytes, compression=compression)
    left = index.slices.drop(index=list(lost))
    assert cache.slices["sop_instance_uid"].tolist() == left["sop_instance_uid"].tolist()
    for number, container in enumerate(left["container"]):
        np.testing.assert_array_equal(cache.slice_hu(number), expected_hu(container))
    assert len(cache.rejects) == len(lost)
    assert cache.series["num_slices"].tolist() == left.groupby("series_uid").size().tolist()


def test_an_unreadable_slice_is_a_reject_and_its_series_closes_up(own_index, tmp_path):
    # Inside the first series, the start of the second, the end of the third, all of the fourth.
    lost = [2, 5, 14, 15]
    for row in lost:
        path = Path(own_index.slices["container"][row])
        path.write_bytes(path.read_bytes()[:-20])
    cache = build(own_index, tmp_path / "cache", workers=2)
    assert len(cache) == 12 and cache.series["num_slices"].tolist() == [4, 2, 6]
    assert cache.slices["slice_index"].tolist() == [*range(4), *range(2), *range(6)]
    assert cache.slices["position_mm"].tolist()[:4] == [0, 5, 15, 20]
    assert cache.rejects["code"].tolist() == ["TRUNCATED"] * 4
    assert cache.rejects["path"].tolist() == own_index.slices["container"][lost].tolist()
    assert own_index.series["verdict"].tolist()[:3] == ["ok"] * 3
    assert cache.series["verdict"].tolist() == ["incomplete,gap", "incomplete", "incomplete"]
    assert cache.series["num_rejected"].tolist() == [1, 1, 1]
    series = own_index.slices["series_instance_uid"][lost].tolist()
    assert cache.rejects["series_instance_uid"].tolist() == series
    for number, container in enumerate(cache.slices["container"]):
        np.testing.assert_array_equal(cache.slice_hu(number), expected_hu(container))
    assert not (cache.slices_hu(range(12)) == 0).all(axis=(1, 2)).any()
    cache.verify()
    assert "4 rejects" in repr(cache)


def test_a_slice_of_another_shape_than_indexed_is_a_reject(own_index, tmp_path):
    write_slice(Path(own_index.slices["container"][0]), 1, 0, rows=30)
    cache = build(own_index, tmp_path / "cache")
    assert cache.rejects["code"].tolist() == ["CHANGED"]
    assert cache.rejects["detail"][0] == "Rows x Columns is 30 x 24; 24 x 24 when it was indexed"


def test_no_readable_slice_is_an_error_and_leaves_nothing(own_index, tmp_path):
    for container in own_index.slices["container"]:
        Path(container).write_bytes(b"no DICOM")
    with pytest.raises(DataError, match=r"none of the 16 slices could be read.*NOT_DICOM"):
        build(own_index, tmp_path / "cache")
    assert not list(tmp_path.glob("cache*/*"))


def test_a_crash_loses_no_finished_shard_and_the_resumed_cache_is_equal(
    index, tmp_path, monkeypatch
):
    whole = content(build(index, tmp_path / "whole", shard_bytes=SLICE_BYTES).path)
    replace, fill = files.replace, cache_build.fill_block
    # The renames of a build are its fail points: one of the plan, two for each of the four shards,
    # three tables, the manifest, the folder. The crash comes before or after the rename.
    for number, after in itertools.product(range(1, 15), (False, True)):
        out = tmp_path / f"crash-{number}-{after}"
        calls = itertools.count(1)

        def fail(source, target, calls=calls, number=number, after=after):
            crash = next(calls) == number
            if after or not crash:
                replace(source, target)
            if crash:
                raise KeyboardInterrupt

        monkeypatch.setattr(files, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            build(index, out, shard_bytes=SLICE_BYTES)
        monkeypatch.setattr(files, "replace", replace)
        if out.exists():  # crashed after the last rename: the cache is complete
            assert (number, after) == (14, True)
            CTCache.open(out).verify()
            continue
        partial = tmp_path / f"{out.name}.partial"
        records = {path.stem for path in partial.glob("shard-*.json")}
        read = []

        def count(block, read=read):
            read.append(block.shard.stem)
            return fill(block)

        monkeypatch.setattr(cache_build, "fill_block", count)
        with pytest.raises(StaleError, match=r"not a finished cache"):
            CTCache.open(partial if number < 13 else out)
        assert content(build(index, out, shard_bytes=SLICE_BYTES).path) == whole
        monkeypatch.setattr(cache_build, "fill_block", fill)
        assert len(read) == 4 - len(records)
        assert not partial.exists()


def test_a_kill_leaves_nothing_that_opens_and_the_build_goes_on(index, tmp_path):
    index_file = tmp_path / "index.pickle"
    index_file.write_bytes(pickle.dumps(index))
    script = f"""
import os, pickle, signal
from ich_keras.data.cache import build as cache_build
from ich_keras.data.cache.cache import build_cache
fill = cache_build.fill_block
def fill_or_die(block):
    if block.first_row >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return fill(block)
cache_build.fill_block = fill_or_die
index = pickle.load(open({str(index_file)!r}, "rb"))
build_cache(index, {str(tmp_path / "cache")!r}, {SIZE}, shard_bytes={SLICE_BYTES * 8})
"""
    run = subprocess.run([sys.executable, "-c", script], check=False)
    assert run.returncode == -9
    partial = tmp_path / "cache.partial"
    assert (partial / "shard-0000.h5").exists() and not (partial / "shard-0001.h5").exists()
    with pytest.raises(StaleError, match="not a finished cache"):
        CTCache.open(partial)
    first = (partial / "shard-0000.h5").stat()
    cache = build(index, tmp_path / "cache")
    assert (cache.path / "shard-0000.h5").stat().st_ino == first.st_ino
    assert content(cache.path) == content(build(index, tmp_path / "other").path)
    assert not list(tmp_path.glob("cache.*"))


def interrupted(index, out, monkeypatch, **options) -> Path:
    """Build a cache whose shards are finished and whose manifest is not; return its folder."""
    with monkeypatch.context() as patch:
        patch.setattr(cache_build, "_write_manifest", _raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(index, out, **options)
    return out.with_name(f"{out.name}.partial")


def test_shards_of_other_settings_are_deleted_only_when_asked(index, tmp_path, monkeypatch):
    partial = interrupted(index, tmp_path / "cache", monkeypatch)
    before = content(partial)
    differences = {
        "size 16, not 20": {"size": 20},
        "compression None, not gzip": {"compression": "gzip"},
        "the shards have other sizes": {"shard_bytes": 10**6},
    }
    for message, options in differences.items():
        with pytest.raises(
            StaleError, match=f"holds 2 finished shards of another build: {message}"
        ) as caught:
            build(index, tmp_path / "cache", **options)
        assert "ich cache --restart" in caught.value.hint
        assert content(partial) == before
    assert len(build(index, tmp_path / "cache", size=20, restart=True)) == 16
    other = build(index, tmp_path / "other", size=20)
    assert content(tmp_path / "cache") == content(other.path)


@pytest.mark.parametrize("name", ["numpy", "opencv", "pydicom", "reading"])
def test_shards_of_other_versions_are_not_mixed_in(index, tmp_path, monkeypatch, name):
    partial = interrupted(index, tmp_path / "cache", monkeypatch)
    plan = files.read_json(partial / "plan.json")
    plan["versions"][name] = "0.9"
    files.write_json(partial / "plan.json", plan)
    with pytest.raises(StaleError, match=f"another build: {name}'s version 0.9, not "):
        build(index, tmp_path / "cache")


def build_with_rejects(index, out, monkeypatch, code):
    """Build a cache where two slices of the first shard are refused; return what was read."""
    read_indexed = cache_fill.read_indexed
    read = []

    def refuse_some(source, size):
        name = Path(source.container).name
        read.append(name)
        if name in ("s1-0.dcm", "s2-2.dcm"):
            raise RejectedFile(code, "seen in a test", "A hint.")
        return read_indexed(source, size)

    with monkeypatch.context() as patched:
        patched.setattr(cache_fill, "read_indexed", refuse_some)
        interrupted(index, out, monkeypatch)
    return read


@pytest.mark.parametrize("code", ["DECODER_CRASH", "TIMEOUT", "DECODE_ERROR"])
def test_a_reject_of_a_finished_shard_is_remembered(own_index, tmp_path, monkeypatch, code):
    assert len(build_with_rejects(own_index, tmp_path / "cache", monkeypatch, code)) == 16
    # They would be read now; what killed a decoder once is not given to it again.
    read = []
    read_indexed = cache_fill.read_indexed

    def note(source, size):
        read.append(Path(source.container).name)
        return read_indexed(source, size)

    monkeypatch.setattr(cache_fill, "read_indexed", note)
    cache = build(own_index, tmp_path / "cache")
    assert len(read) == 14 and not {"s1-0.dcm", "s2-2.dcm"} & set(read)  # a look at the others
    assert len(cache) == 14
    names = [Path(path).name for path in cache.rejects["path"]]
    assert sorted(names) == ["s1-0.dcm", "s2-2.dcm"]
    assert cache.rejects["code"].tolist() == [code] * 2
    assert cache.rejects["detail"].tolist() == ["seen in a test"] * 2


def test_a_remembered_reject_whose_file_changed_is_tried_again(own_index, tmp_path, monkeypatch):
    build_with_rejects(own_index, tmp_path / "cache", monkeypatch, "DECODER_CRASH")
    path = Path(own_index.slices["container"][0]).with_name("s1-0.dcm")
    path.write_bytes(path.read_bytes())
    again = index_folder(path.parent)
    with pytest.raises(StaleError, match=r"1 of \d+ slices of finished .*s1-0\.dcm"):
        build(again, tmp_path / "cache")


@pytest.mark.parametrize("code", ["NO_DECODER", "UNREADABLE"])
def test_a_reject_of_the_machine_is_tried_again(own_index, tmp_path, monkeypatch, code):
    build_with_rejects(own_index, tmp_path / "cache", monkeypatch, code)
    cache = build(own_index, tmp_path / "cache")
    assert len(cache) == 16 and not len(cache.rejects)
    assert content(cache.path) == content(build(own_index, tmp_path / "other").path)


def test_without_finished_shards_nothing_is_asked(index, tmp_path):
    partial = tmp_path / "cache.partial"
    partial.mkdir()
    files.write_json(partial / "plan.json", {"schema": 1})
    assert len(build(index, tmp_path / "cache")) == 16


def test_a_damaged_plan_has_a_way_out(index, tmp_path, monkeypatch):
    partial = interrupted(index, tmp_path / "cache", monkeypatch)
    (partial / "plan.json").write_text("{")
    with pytest.raises(StaleError, match=r"plan\.json is not valid JSON.*--restart"):
        build(index, tmp_path / "cache")
    assert len(build(index, tmp_path / "cache", restart=True)) == 16


def test_restart_removes_no_folder_that_is_not_its_own(index, tmp_path):
    partial = tmp_path / "cache.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not an unfinished cache"):
        build(index, tmp_path / "cache", restart=True)
    assert (partial / "thesis.txt").read_text() == "mine"


def test_a_partial_build_in_another_order_is_not_reused(tmp_path, monkeypatch):
    index = write_folder(tmp_path / "dicom", (4, 4, 4))
    interrupted(index, tmp_path / "cache", monkeypatch)
    # The first patient's ID is corrected and comes last: the same slices of the same sizes.
    for path in (tmp_path / "dicom").glob("s1-*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PatientID = "Q1"
        dataset.save_as(path)
    moved = index_folder(tmp_path / "dicom")
    assert inputs_fingerprint(moved) == inputs_fingerprint(index)
    assert moved.slices["patient_id"].iloc[0] == "P2"
    with pytest.raises(StaleError, match="another build: the slices are in another order"):
        build(moved, tmp_path / "cache")
    cache = build(moved, tmp_path / "cache", restart=True)
    assert content(cache.path) == content(build(moved, tmp_path / "other").path)


def _raise_interrupt(*_):
    raise KeyboardInterrupt


def test_a_folder_that_is_no_partial_cache_is_left_alone(index, tmp_path):
    partial = tmp_path / "cache.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not an unfinished cache"):
        build(index, tmp_path / "cache")
    assert (partial / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_refused_before_anything_is_written(index, tmp_path, monkeypatch):
    needed = []

    def full(folder, num_bytes, what):
        needed.append(num_bytes)
        raise EnvironmentProblem("disk full")

    monkeypatch.setattr(cache_build, "require_free", full)
    with pytest.raises(EnvironmentProblem, match="disk full"):
        build(index, tmp_path / "cache")
    assert not list(tmp_path.glob("cache*/*"))
    # Two shards of eight slices and their headers, and room to write one of them twice.
    header = 3 * 4096
    assert needed == [3 * (8 * SLICE_BYTES + header)]


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_file_size_limit_stops_the_build_and_keeps_earlier_shards(index, tmp_path, compression):
    index_file = tmp_path / "index.pickle"
    index_file.write_bytes(pickle.dumps(index))
    # One series a shard. At 32 pixels the third, of 7 slices, is the first beyond 16 KiB.
    script = f"""
import pickle, resource
from ich_keras.data.cache.cache import build_cache
from ich_keras.errors import EnvironmentProblem
index = pickle.load(open({str(index_file)!r}, "rb"))
resource.setrlimit(resource.RLIMIT_FSIZE, ({2**14}, {2**14}))
try:
    build_cache(index, {str(tmp_path / "cache")!r}, 32, workers=1, shard_bytes=1,
                compression={compression!r})
except EnvironmentProblem as error:
    print("REFUSED", error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("REFUSED"), run.stdout + run.stderr
    assert run.stderr == ""
    assert "could not be written" in run.stdout
    assert not (tmp_path / "cache").exists()
    left = [path.name for path in (tmp_path / "cache.partial").glob("*.h5")]
    assert left == ["shard-0000.h5"]
    with pytest.raises(StaleError, match="not a finished cache"):
        CTCache.open(tmp_path / "cache.partial")


def test_no_space_while_writing_pixels_keeps_earlier_shards(index, tmp_path, monkeypatch):
    fill = cache_build.fill_block

    def fail(block):
        if block.first_row >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fill(block)

    monkeypatch.setattr(cache_build, "fill_block", fail)
    with pytest.raises(EnvironmentProblem, match=r"No space left.*Finished shards are kept"):
        build(index, tmp_path / "cache")
    monkeypatch.undo()
    partial = tmp_path / "cache.partial"
    assert sorted(path.name for path in partial.iterdir()) == [
        "plan.json",
        "shard-0000.h5",
        "shard-0000.json",
    ]
    assert len(build(index, tmp_path / "cache")) == 16


def die(block):
    """Stand in for `fill_block` in a worker process that is killed."""
    os._exit(9)


def test_a_worker_that_dies_is_an_error(index, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "fill_block", die)
    with pytest.raises(EnvironmentProblem, match="a worker process died while reading slices"):
        build(index, tmp_path / "cache", workers=1)
    assert not (tmp_path / "cache").exists()


def die_comparing(size, sources):
    os._exit(9)


def test_a_worker_that_dies_while_comparing_is_the_same_error(monkeypatch):
    monkeypatch.setattr(cache_fill, "_hash_block", die_comparing)
    with pytest.raises(EnvironmentProblem, match="a worker process died while reading slices"):
        cache_fill.hashes_now(list(range(65)), 16, workers=1)


def test_the_second_of_two_builders_is_refused(index, tmp_path):
    with (
        files.lock(tmp_path / "cache.partial.lock"),
        pytest.raises(StaleError, match=r"cache\.partial\.lock is locked by another process"),
    ):
        build(index, tmp_path / "cache")
    assert not (tmp_path / "cache.partial").exists()
    assert len(build(index, tmp_path / "cache")) == 16


@pytest.mark.parametrize("compression", ["gzip", "blosc2"])
def test_slices_are_compressed_as_hdf5_does_and_noise_stays_as_it_is(tmp_path, compression):
    """Read with h5py alone: filters are applied, or skipped where they make a slice longer."""
    rng = np.random.default_rng(0)
    hu = np.zeros((4, 64, 64), np.int16)
    hu[1] = rng.integers(-20, 80, (64, 64))
    hu[2] = rng.integers(-(2**15), 2**15, (64, 64))
    hu[3] = np.arange(64)
    found = list(cache_writer.compressed(hu, compression))
    lengths = [chunk.num_bytes for chunk, _ in found]
    assert max(lengths) <= 2 * 64 * 64 and lengths[0] < 300 and lengths[1] < 2 * 64 * 64 * 0.7
    raw = bytearray(2 * 64 * 64 * 4)
    for row, (_, content) in enumerate(found):
        raw[row * 8192 : row * 8192 + len(content)] = content
    (tmp_path / "raw").write_bytes(raw)
    kept = [(row, found[row][0]) for row in (0, 2, 3, 1)]
    cache_writer.write_compressed(
        tmp_path / "raw", 0, tmp_path / "a.h5", kept, np.zeros(4, np.uint32), 64, compression
    )
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["hu"][:], hu[[0, 2, 3, 1]])
        plist = file["hu"].id.get_create_plist()
        filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
        with h5py.File(tmp_path / "b.h5", "w", driver="core", backing_store=False) as direct:
            space = h5py.h5s.create_simple(hu.shape)
            created = h5py.h5d.create(direct.id, b"hu", file["hu"].id.get_type(), space, plist)
            dataset = h5py.Dataset(created)
            dataset[...] = hu[[0, 2, 3, 1]]
            for row in (0, 2, 3):  # noise apart
                assert dataset.id.read_direct_chunk((row, 0, 0)) == (
                    file["hu"].id.read_direct_chunk((row, 0, 0))
                )
    assert filters == {"gzip": [2, 1], "blosc2": [32026]}[compression]  # HDF5's numbers


@pytest.mark.parametrize(("workers", "compression"), [(0, None), (2, None), (0, "gzip")])
def test_a_shard_that_is_not_what_was_read_does_not_get_its_name(
    index, tmp_path, monkeypatch, workers, compression
):
    """As where the disk changed a byte between writing and verifying."""
    require = Shard.require_checksums

    def then_damage(shard, crc32):
        require(shard, crc32)
        with h5py.File(shard.path, locking=False) as file:
            hu = file["hu"].id
            if compression is None:
                offset = hu.get_offset() + 2 * SLICE_BYTES + 7
            else:
                offset = hu.get_chunk_info(2).byte_offset + 40
        flip_bit(shard.path, offset)

    monkeypatch.setattr(Shard, "require_checksums", then_damage)
    with pytest.raises(StaleError, match=r"slice 2 of the shard .*slice 2 of the cache"):
        build(index, tmp_path / "cache", workers=workers, compression=compression)
    assert not list(tmp_path.glob("cache*/shard-*.h5"))


@pytest.mark.parametrize("compression", [None, "gzip", "blosc2"])
def test_a_flipped_bit_in_a_slice_names_shard_and_slice(index, tmp_path, compression):
    cache = build(index, tmp_path / "cache", compression=compression)
    shard = cache.path / "shard-0001.h5"
    with h5py.File(shard) as file:
        if compression is None:
            offset = file["hu"].id.get_offset() + 3 * SLICE_BYTES + 100
        else:
            chunk = file["hu"].id.get_chunk_info(3)
            offset = chunk.byte_offset + chunk.size // 2
    flip_bit(shard, offset)
    cache = CTCache.open(cache.path)
    cache.slices_hu([8, 9, 10, 12])
    with pytest.raises(StaleError, match=r"shard-0001\.h5: slice 3 of the shard \(slice 11 of the"):
        cache.slices_hu([8, 11])
    with pytest.raises(StaleError, match=r"shard-0001\.h5: slice 3 "):
        cache.verify()


WITHOUT_HDF5PLUGIN = """
import sys
sys.modules["hdf5plugin"] = None  # importing it fails, as if it were not installed
import numpy as np
from ich_keras.ct.series import index_folder
from ich_keras.data.batches import slice_batches
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.errors import EnvironmentProblem

dicom, out, blosc2 = sys.argv[1:]
index = index_folder(dicom)
for compression in (None, "gzip"):
    cache = build_cache(index, f"{out}-{compression}", 16, compression=compression)
    cache.verify()
    print(int(cache.slices_hu(range(16)).astype(int).sum()))
build = lambda: build_cache(index, out, 16, compression="blosc2")
for job in (build, lambda: CTCache.open(blosc2)):
    try:
        job()
    except EnvironmentProblem as error:
        print(error.exit_code, error)
print(sorted(name for name in sys.modules if name.startswith("hdf5plugin.")))
"""


def test_only_blosc2_needs_hdf5plugin(index, tmp_path):
    compressed = build(index, tmp_path / "blosc2", compression="blosc2")
    done = subprocess.run(
        [
            *(sys.executable, "-c", WITHOUT_HDF5PLUGIN),
            *(str(Path(index.slices["container"].iloc[0]).parent), str(tmp_path / "out")),
            str(compressed.path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    message = (
        "4 a cache compressed with blosc2 needs hdf5plugin, which is not installed."
        " pip install 'ich_keras[compression]'"
    )
    total = str(int(build(index, tmp_path / "b").slices_hu(range(16)).astype(int).sum()))
    assert done.stdout.splitlines() == [total, total, message, message, "[]"], done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_every_flipped_byte_of_the_header_is_refused_or_harmless(index, tmp_path, compression):
    """With compression, the header has an index of the chunks."""
    cache = build(index, tmp_path / "cache", compression=compression)
    expected = cache.slices_hu(range(16))
    shard = cache.path / "shard-0000.h5"
    whole = shard.read_bytes()
    is_pixel = np.zeros(len(whole), bool)
    (tmp_path / "copy.h5").write_bytes(whole)
    with h5py.File(tmp_path / "copy.h5") as file:
        hu = file["hu"].id
        if compression is None:
            is_pixel[hu.get_offset() :] = True
        else:
            for chunk in map(hu.get_chunk_info, range(hu.get_num_chunks())):
                is_pixel[chunk.byte_offset : chunk.byte_offset + chunk.size] = True
    refused = 0
    for offset in np.flatnonzero(~is_pixel).tolist():
        if whole[offset] == 0 and offset % 64:
            continue
        shard.unlink()  # HDF5 would share what it knows of a file that it has open
        shard.write_bytes(whole)
        flip_bit(shard, offset)
        try:
            np.testing.assert_array_equal(CTCache.open(cache.path).slices_hu(range(16)), expected)
        except StaleError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("name", ["slices.csv", "series.csv", "rejects.csv", "labels.csv"])
def test_a_flipped_bit_in_a_table_is_refused(index, tmp_path, name):
    labels = label_table(index.slices["sop_instance_uid"])
    cache = build(index, tmp_path / "cache", labels=labels)
    flip_bit(cache.path / name, 9)
    with pytest.raises(StaleError, match=rf"{name} .*Build the cache again"):
        CTCache.open(cache.path)


def edit_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= changes
    manifest.pop("checksum")
    manifest["checksum"] = files.fingerprint(manifest)
    files.write_json(path / "manifest.json", manifest)


def test_an_edited_manifest_is_refused(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    manifest = cache.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"size": 16', '"size": 17'))
    with pytest.raises(StaleError, match="does not match its checksum"):
        CTCache.open(cache.path)
    manifest.write_text(text[:-30])
    with pytest.raises(StaleError, match="is not valid JSON"):
        CTCache.open(cache.path)
    manifest.unlink()
    with pytest.raises(StaleError, match=r"not a finished cache: it has no manifest\.json"):
        CTCache.open(cache.path)
    with pytest.raises(StaleError, match="not a finished cache"):
        CTCache.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "told", "hint"),
    [
        ("index.json", "is an index, not a cache", "ich cache --index {path} --out"),
        ("recipe.json", "is a run, not a cache", "Give the cache"),
        ("notice.txt", "is a prediction, not a cache", "Give the cache"),
    ],
)
def test_a_folder_of_another_kind_is_named(index, tmp_path, name, told, hint):
    folder = tmp_path / "a{b}"
    folder.mkdir()
    (folder / name).write_text("{}")
    if name == "index.json":
        index.save(folder := tmp_path / "index")
    with pytest.raises(StaleError, match=told) as caught:
        CTCache.open(folder)
    assert hint.format(path=folder) in caught.value.hint


def test_another_schema_is_refused(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    edit_manifest(cache.path, schema=99)
    with pytest.raises(StaleError, match="schema is 99 in the cache, 2 wanted"):
        CTCache.open(cache.path)


def test_a_shape_bomb_is_refused_without_reading_it(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    bomb = [dict(entry) for entry in cache.manifest["shards"]]
    bomb[1]["num_slices"] = 2**33
    edit_manifest(cache.path, shards=bomb)
    with pytest.raises(StaleError, match=r"holds crc32 as uint32 \(8,\); expected uint32 \(85899"):
        CTCache.open(cache.path)
    edit_manifest(cache.path, shards=cache.manifest["shards"], size=2**20)
    with pytest.raises(StaleError, match="size 1048576; expected 8 to 4096"):
        CTCache.open(cache.path)
    edit_manifest(cache.path, size=17)
    with pytest.raises(StaleError, match="holds hu as int16"):
        CTCache.open(cache.path)


def test_shards_that_read_other_files_are_refused(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    whole = (cache.path / "shard-0000.h5").read_bytes()
    secret = tmp_path / "secret.h5"
    secret.write_bytes(whole)
    shape = (8, SIZE, SIZE)

    def external_link(file):
        file["hu"] = h5py.ExternalLink(str(secret), "hu")

    def soft_link(file):
        file["other"] = np.zeros(shape, "<i2")
        file["hu"] = h5py.SoftLink("/other")

    def virtual(file):
        virtual_layout = h5py.VirtualLayout(shape, "<i2")
        virtual_layout[:] = h5py.VirtualSource(str(secret), "hu", shape)
        file.create_virtual_dataset("hu", virtual_layout)

    def external_storage(file):
        file.create_dataset("hu", shape, "<i2", external=[(str(secret), 0, 8 * SLICE_BYTES)])

    def group(file):
        file.create_group("hu")

    for write in (external_link, soft_link, virtual, external_storage, group):
        path = cache.path / "shard-0000.h5"
        path.unlink()
        with h5py.File(path, "w") as file:
            file["crc32"] = np.zeros(8, "<u4")
            write(file)
        entries = [dict(entry) for entry in cache.manifest["shards"]]
        entries[0]["num_bytes"] = path.stat().st_size
        edit_manifest(cache.path, shards=entries)
        with pytest.raises(
            StaleError, match=r"shard-0000\.h5: the shard holds no (plain )?dataset"
        ):
            CTCache.open(cache.path)


def test_a_missing_or_shortened_shard_is_refused(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    shard = cache.path / "shard-0001.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(StaleError, match=rf"has {len(whole) - 1} bytes, {len(whole)} expected"):
        CTCache.open(cache.path)
    shard.unlink()
    with pytest.raises(StaleError, match=r"shard-0001\.h5: the shard cannot be read"):
        CTCache.open(cache.path)


def test_stale_names_each_differing_field(index, tmp_path, monkeypatch):
    cache = build(index, tmp_path / "cache")
    cache.require(size=SIZE, index=index)
    cache.require()
    with pytest.raises(StaleError, match="size is 16 in the cache, 32 wanted") as error:
        cache.require(size=32, index=index)
    assert "inputs" not in error.value.message and "Build the cache again" in error.value.hint
    fewer = dataclasses.replace(index, slices=index.slices.iloc[:-1], series=index.series.iloc[:-1])
    with pytest.raises(StaleError, match=r"size is 16 .*; inputs is .* in the cache, .* wanted"):
        cache.require(size=32, index=fewer)
    merged = index.slices.assign(patient_id=index.slices["patient_id"].iloc[0])
    count = (merged["patient_id"] != index.slices["patient_id"]).sum()
    with pytest.raises(StaleError, match=f"{count} slices have another PatientID in the cache"):
        cache.require(index=dataclasses.replace(index, slices=merged))
    monkeypatch.setattr("ich_keras.data.cache.staleness.RESAMPLING", "nearest/2")
    with pytest.raises(StaleError, match=r"resampling is pad.* in the cache, nearest/2 wanted"):
        cache.require()


def test_a_moved_data_set_other_labels_and_windows_are_not_stale(own_index, tmp_path, monkeypatch):
    cache = build(own_index, tmp_path / "cache")
    (tmp_path / "dicom").rename(tmp_path / "moved")
    moved = index_folder(tmp_path / "moved")
    cache.require(size=SIZE, index=moved)
    uids = own_index.slices["sop_instance_uid"].tolist()
    labelled = CTCache.open(cache.path, labels=label_table(uids, uids[:1]))
    labelled.require(size=SIZE, index=moved)
    # Nor are other windows: a cache holds Hounsfield units.
    brain = window.Window(400, 800)
    monkeypatch.setattr(window, "BRAIN", brain)
    windows = (brain, *window.WINDOWS[1:])
    monkeypatch.setattr(window, "WINDOWS", windows)
    other = dataclasses.replace(INTENSITIES["windows"], windows=windows)
    monkeypatch.setitem(INTENSITIES, "windows", other)
    CTCache.open(cache.path).require(size=SIZE, index=moved)
    assert labelled.fingerprint == cache.fingerprint


def test_an_index_with_other_labels_makes_no_cache_stale(own_index, tmp_path):
    uids = own_index.slices["sop_instance_uid"].tolist()
    one, other = (
        join_labels(own_index, label_table(uids, positive))[0] for positive in (uids[:1], uids[1:3])
    )
    cache = build(one, tmp_path / "cache")
    assert cache.slices["any"].tolist() == [1] + [0] * (len(uids) - 1)
    for index in (one, other, own_index):
        cache.require(size=SIZE, index=index)


def test_positions_computed_on_another_processor_are_not_stale(own_index, tmp_path):
    cache = build(own_index, tmp_path / "cache")
    positions = own_index.slices["position_mm"]

    def with_positions(values):
        return dataclasses.replace(own_index, slices=own_index.slices.assign(position_mm=values))

    for towards in (-np.inf, np.inf):
        cache.require(index=with_positions(np.nextafter(positions, towards)))
    with pytest.raises(StaleError, match="inputs is .* in the cache, .* wanted"):
        cache.require(index=with_positions(positions + 0.1))


def test_other_library_versions_are_accepted_when_the_pixels_are_equal(own_index, tmp_path):
    cache = build(own_index, tmp_path / "cache")
    edit_manifest(cache.path, versions={**cache.manifest["versions"], "pydicom": "0.9"})
    cache = CTCache.open(cache.path)
    cache.require(index=own_index)
    write_slice(Path(own_index.slices["container"][0]), 9, 9)
    with pytest.raises(
        StaleError, match=r"pydicom is 0\.9 in the cache.*1 of 16 slices read again"
    ):
        cache.require(index=own_index)


def test_slices_that_can_be_read_now_make_a_cache_stale(own_index, tmp_path, monkeypatch):
    read_indexed = cache_fill.read_indexed

    def read_without_decoder(source, size):
        if Path(source.container).name in ("s1-0.dcm", "s3-2.dcm"):
            raise RejectedFile("NO_DECODER", "no decoder")
        return read_indexed(source, size)

    with monkeypatch.context() as patched:
        patched.setattr(cache_fill, "read_indexed", read_without_decoder)
        cache = build(own_index, tmp_path / "cache")
        assert len(cache) == len(own_index.slices) - 2
        cache.require(index=own_index)
    with pytest.raises(
        StaleError, match="2 of 2 slices tried again, of 2 that could not be read, can be read now"
    ):
        cache.require(index=own_index)


def test_labels_of_the_index_are_stored_and_others_may_replace_them(own_index, tmp_path):
    uids = own_index.slices["sop_instance_uid"].tolist()
    Path(own_index.slices["container"][1]).write_bytes(b"no DICOM")
    plain = build(own_index, tmp_path / "plain")
    assert not set(LABELS) & set(plain.slices.columns)
    cache = build(own_index, tmp_path / "cache", labels=label_table(uids, uids[6:7]))
    assert cache.slices["any"].dtype == np.int8
    assert np.flatnonzero(cache.slices["any"]).tolist() == [5]  # one slice before it was rejected
    assert cache.series["subdural"].tolist() == [0, 1, 0, 0]
    other = CTCache.open(cache.path, labels=label_table(uids[:4], uids[:1]))
    assert other.slices["any"].tolist() == [1, 0, 0] + [-1] * 12
    assert other.series["any"].tolist() == [1, -1, -1, -1]
    with pytest.raises(DataError, match="match no image"):
        CTCache.open(cache.path, labels=label_table(["elsewhere"]))
    with pytest.raises(DataError, match="match no image"):
        build(own_index, tmp_path / "wrong", labels=label_table(["elsewhere"]))
    assert not list(tmp_path.glob("wrong*"))


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_pickling_drops_handles(index, tmp_path, compression):
    cache = build(index, tmp_path / "cache", compression=compression)
    expected = cache.slices_hu(range(16))
    assert all(shard._opened is not None for shard in cache.pixels.shards)
    assert len(pickle.dumps(cache.pixels)) < 4000
    again = pickle.loads(pickle.dumps(cache))
    assert all(shard._opened is None for shard in again.pixels.shards)
    np.testing.assert_array_equal(again.slices_hu(range(16)), expected)


def test_a_forked_process_opens_its_own_handles(index, tmp_path, monkeypatch):
    cache = build(index, tmp_path / "cache", compression="gzip")
    cache.slice_hu(0)
    handle = cache.pixels.shards[0]._opened
    cache.slice_hu(1)
    assert cache.pixels.shards[0]._opened is handle
    monkeypatch.setattr("os.getpid", lambda: handle.process + 1)
    cache.slice_hu(0)
    assert cache.pixels.shards[0]._opened is not handle


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such permission")
def test_a_cache_is_read_from_a_read_only_folder(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    for path in cache.path.iterdir():
        path.chmod(0o444)
    cache.path.chmod(0o555)
    before = content(cache.path)
    try:
        CTCache.open(cache.path).verify()
        assert content(cache.path) == before
    finally:
        cache.path.chmod(0o755)


def test_numbers_and_names_that_are_not_there_are_refused(index, tmp_path):
    cache = build(index, tmp_path / "cache")
    with pytest.raises(IndexError, match="from 0 to 15"):
        cache.slices_hu([3, 16])
    with pytest.raises(IndexError, match="from 0 to 15"):
        cache.slice_hu(-1)
    with pytest.raises(UsageError, match=r"holds no series '1\.9'"):
        cache.series_hu("1.9")
    assert cache.slices_hu([]).shape == (0, SIZE, SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "size 4 pixels; expected 8 to 4096"),
        ({"size": 5000}, "size 5000 pixels"),
        ({"workers": -1}, "-1 workers"),
        ({"compression": "lzma"}, "compression 'lzma' is unknown"),
    ],
)
def test_bad_arguments_write_nothing(index, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        build(index, tmp_path / "cache", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(index, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        build(index, tmp_path / "cache")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert len(build(index, empty)) == 16


def test_an_empty_index_is_refused(index, tmp_path):
    empty = dataclasses.replace(index, slices=index.slices[:0], series=index.series[:0])
    with pytest.raises(DataError, match="no axial CT slice"):
        build(empty, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_importing_the_cache_imports_no_framework():
    script = (
        "import sys, ich_keras.data.cache; "
        "print({'keras', 'torch', 'tensorflow', 'jax', 'albumentations'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_link_to_an_empty_folder_is_filled_and_no_file_beside_it_is_touched(index, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("real.lock", "link.lock"):
        (tmp_path / name).write_text("mine")
    assert len(build(index, tmp_path / "link")) == 16
    assert len(CTCache.open(tmp_path / "real")) == 16
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "link.lock", "real", "real.lock"]
    assert (tmp_path / "real.lock").read_text() == "mine"
