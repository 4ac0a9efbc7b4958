"""Which pixels a cache holds: exchanged, foreign and stale parts are refused by name."""

import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from older_files import cache_of_schema_1, sealed_manifest
from tiny_dicom import tiny_file, tiny_values

from ich_keras import files
from ich_keras.cli import main
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.ct.tables import write_table
from ich_keras.data.cache import build as cache_build
from ich_keras.data.cache import fill as cache_fill
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.errors import StaleError
from ich_keras.verification import verify

SIZE = 16
PATIENTS, SLICES = 3, 4
ONE_SERIES = SLICES * SIZE * SIZE * 2  # bytes: each series gets a shard of its own


def write(folder: Path, patient: int, place: int, seed: int) -> Path:
    path = folder / f"p{patient}-{place}.dcm"
    content = tiny_file(
        tiny_values(seed),
        SOPInstanceUID=f"1.2.3.{patient}.{place}",
        PatientID=f"P{patient}",
        StudyInstanceUID=f"1.2.{patient}",
        SeriesInstanceUID=f"1.2.3.{patient}",
        ImagePositionPatient=[-125, -125, 5 * place],
    )
    path.write_bytes(content)
    return path


def write_folder(folder: Path, seed: int = 0) -> SeriesIndex:
    """Three series of four slices; other seeds give other pixels in files of the same sizes."""
    folder.mkdir(exist_ok=True)
    for patient in range(PATIENTS):
        for place in range(SLICES):
            write(folder, patient, place, 1000 * seed + 100 * patient + place)
    return index_folder(folder)


def build(index: SeriesIndex, out: Path, **options) -> CTCache:
    return build_cache(index, out, **{"size": SIZE, "shard_bytes": ONE_SERIES, **options})


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(tmp_path / "dicom")
    return tmp_path / "dicom"


@pytest.fixture
def cache(folder, tmp_path) -> CTCache:
    return build(index_folder(folder), tmp_path / "cache")


@pytest.fixture
def other(tmp_path) -> CTCache:
    """A cache of the same slices by every fact of their headers, with other pixels."""
    return build(write_folder(tmp_path / "other-dicom", seed=1), tmp_path / "other")


def touch(folder: Path, count: int = 10**6) -> list[Path]:
    """Give some files another time, later by a day."""
    paths = sorted(folder.glob("*.dcm"))[:count]
    for path in paths:
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 86_400 * 10**9))
    return paths


# --- Digests --------------------------------------------------------------------------------


def test_the_digest_is_of_the_pixels_alone(cache, other, folder, tmp_path):
    again = build(index_folder(folder), tmp_path / "again", compression="gzip", shard_bytes=1)
    assert cache.pixels_digest == again.pixels_digest
    assert re.fullmatch("[0-9a-f]{64}", cache.pixels_digest)
    # The same slices by all that was compared before; other pixels.
    assert cache.fingerprint == again.fingerprint == other.fingerprint
    assert cache.pixels_digest != other.pixels_digest


def test_one_pixel_by_one_unit_is_another_digest(cache, folder, tmp_path):
    values = tiny_values(0)
    values[0, 0] += 1
    content = (folder / "p0-0.dcm").read_bytes()
    changed = content.replace(
        tiny_values(0).astype("<u2").tobytes(), values.astype("<u2").tobytes()
    )
    assert len(changed) == len(content) and changed != content
    (folder / "p0-0.dcm").write_bytes(changed)
    again = build(index_folder(folder), tmp_path / "again")
    assert again.fingerprint == cache.fingerprint
    assert again.pixels_digest != cache.pixels_digest


# --- Parts of a finished cache --------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_two_exchanged_shards_are_refused(folder, tmp_path, compression):
    path = build(index_folder(folder), tmp_path / "cache", compression=compression).path
    one, two = path / "shard-0000.h5", path / "shard-0001.h5"
    if compression:  # of equal length, as raw shards are
        for shard in (one, two):
            shard.write_bytes(shard.read_bytes().ljust(20_000, b"\0"))
        manifest = json.loads((path / "manifest.json").read_text())
        for entry in manifest["shards"][:2]:
            entry["num_bytes"] = 20_000
        sealed_manifest(path, manifest)
        CTCache.open(path).verify()
    one.rename(path / "aside")
    two.rename(one)
    (path / "aside").rename(two)
    with pytest.raises(StaleError, match=r"shard-0000\.h5: the shard holds other slices than were"):
        CTCache.open(path)
    with pytest.raises(StaleError, match=r"shard-0000\.h5"):
        verify(path)


def test_a_shard_of_another_cache_is_refused_while_it_is_open_too(cache, other):
    cache.slices_hu(range(4))
    shutil.copy(other.path / "shard-0002.h5", cache.path / "shard-0002.h5")
    with pytest.raises(StaleError, match=r"cache/shard-0002\.h5: the shard holds other slices"):
        cache.slices_hu([9])
    with pytest.raises(StaleError, match=r"cache/shard-0002\.h5: the shard holds other slices"):
        CTCache.open(cache.path)


@pytest.mark.parametrize("name", ["slices.csv", "series.csv", "manifest.json"])
def test_tables_and_manifests_of_another_cache_are_refused(cache, other, name, tmp_path):
    if name == "series.csv":  # the same in both: the other one loses a slice
        (tmp_path / "other-dicom" / "p2-3.dcm").unlink()
        other = build(index_folder(tmp_path / "other-dicom"), tmp_path / "fewer")
    assert (other.path / name).read_bytes() != (cache.path / name).read_bytes()
    shutil.copy(other.path / name, cache.path / name)
    with pytest.raises(StaleError, match=r"cache/(slices|series|shard-0000)"):
        CTCache.open(cache.path)


def test_all_but_the_shards_of_another_cache_is_refused(cache, other):
    for name in ("slices.csv", "series.csv", "rejects.csv", "manifest.json"):
        shutil.copy(other.path / name, cache.path / name)
    with pytest.raises(StaleError, match=r"cache/shard-0000\.h5: the shard holds other slices"):
        CTCache.open(cache.path)


def test_rows_that_belong_to_other_pixels_are_found_by_verify(cache):
    """A table that names the wrong slices, with checksums made to fit."""
    slices = cache.slices.copy()
    moved = ["sop_instance_uid", "pixel_hash"]
    slices.loc[[0, 1], moved] = slices.loc[[1, 0], moved].to_numpy()
    manifest = json.loads((cache.path / "manifest.json").read_text())
    manifest["tables"]["slices"] = write_table(cache.path / "slices.csv", slices)
    sealed_manifest(cache.path, manifest)
    with pytest.raises(StaleError, match=r"slice 0 of the cache has other pixels than slices\.csv"):
        CTCache.open(cache.path).verify()


def test_a_cache_of_an_older_version_opens_and_says_what_it_lacks(cache, folder, monkeypatch):
    digest, fingerprint = cache.pixels_digest, cache.fingerprint
    expected = cache.slices_hu(range(12))
    old = cache_of_schema_1(cache.path)
    assert digest is not None and old.pixels_digest is None
    assert old.fingerprint == fingerprint
    np.testing.assert_array_equal(old.slices_hu(range(12)), expected)
    assert "of an older version, without pixel hashes" in repr(old)
    old.verify()
    assert "no checksums (an older version wrote it)" in verify(old.path)[1]
    touch(folder)
    old.require(index=index_folder(folder))
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    write(folder, 1, 2, seed=7)
    with pytest.raises(
        StaleError, match=r"1 of 12 files .* other pixels; the first is .*p1-2\.dcm"
    ):
        old.require(index=index_folder(folder))


# --- The files behind a cache ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_rewritten_pixels_make_a_cache_stale(cache, folder, workers, monkeypatch):
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    write(folder, 0, 3, seed=77)
    write(folder, 2, 1, seed=78)
    again = index_folder(folder)
    calls = []
    with pytest.raises(
        StaleError,
        match=r"2 of 2 files that were written since hold other pixels; the first is .*p0-3\.dcm",
    ):
        cache.require(index=again, workers=workers, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("comparing", 2, 2)


def test_a_touched_a_copied_and_a_moved_data_set_are_the_same(cache, folder, tmp_path):
    touch(folder, 5)
    cache.require(index=index_folder(folder))
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    cache.require(index=index_folder(tmp_path / "copy"))
    folder.rename(tmp_path / "moved")
    cache.require(index=index_folder(tmp_path / "moved"))


def test_files_are_read_again_only_when_their_time_changed_and_once(cache, folder, monkeypatch):
    read = []
    read_indexed = cache_fill.read_indexed

    def counted(source, size):
        read.append(Path(source.container).name)
        return read_indexed(source, size)

    monkeypatch.setattr(cache_fill, "read_indexed", counted)
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 3)
    cache.require(index=index_folder(folder))
    assert read == ["p0-0.dcm", "p1-1.dcm", "p2-3.dcm"]  # the first, the middle, the last
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    read.clear()
    touch(folder, 5)
    index = index_folder(folder)
    cache.require(index=index)
    assert sorted(read) == ["p0-0.dcm", "p0-1.dcm", "p0-2.dcm", "p0-3.dcm", "p1-0.dcm"]
    CTCache.open(cache.path).require(index=index)
    assert len(read) == 5
    touch(folder, 1)
    cache.require(index=index_folder(folder))
    assert len(read) == 10  # which of the five were seen since is not kept
    write(folder, 0, 0, seed=99)
    with pytest.raises(StaleError, match=r"the first is .*p0-0\.dcm"):
        cache.require(index=index_folder(folder))


def test_a_look_at_a_cache_on_a_read_only_disk(cache, folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(30, "Read-only file system")

    touch(folder)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", refuse)
        cache.require(index=index_folder(folder))
    assert not (cache.path / "seen.json").exists()


def keep_times(folder: Path, change) -> None:
    """Change a folder, and give its files their times again."""
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    change()
    for path, time in before.items():
        os.utime(path, ns=(time, time))


def test_another_export_with_the_same_times_is_found(cache, folder, interrupt, tmp_path):
    """Archives may give all their files one time: a few slices are read again in any case."""
    partial = interrupt(index_folder(folder), tmp_path / "half")
    keep_times(folder, lambda: write_folder(folder, seed=3))
    with pytest.raises(StaleError, match=r"12 of 12 slices .*differ; the first is .*p0-0\.dcm"):
        cache.require(index=index_folder(folder))
    with pytest.raises(StaleError, match="slices of finished shards that were read again differ"):
        build(index_folder(folder), tmp_path / "half")
    assert (partial / "shard-0000.h5").is_file()


def test_what_was_seen_of_one_cache_is_not_known_of_another(cache, other, folder, monkeypatch):
    touch(folder)
    index = index_folder(folder)
    cache.require(index=index)
    assert (cache.path / "seen.json").is_file()
    shutil.copy(cache.path / "seen.json", other.path / "seen.json")
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    with pytest.raises(StaleError, match="12 of 12 files"):
        other.require(index=index)


# --- Builds that were interrupted -----------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that builds a cache and dies once two of three shards are finished."""

    def half_built(index: SeriesIndex, out: Path) -> Path:
        fill = cache_build.fill_block

        def fill_or_die(block):
            if block.first_row >= 2 * SLICES:
                raise KeyboardInterrupt
            return fill(block)

        with monkeypatch.context() as patch:
            patch.setattr(cache_build, "fill_block", fill_or_die)
            with pytest.raises(KeyboardInterrupt):
                build(index, out)
        partial = out.with_name(f"{out.name}.partial")
        names = {path.name for path in partial.iterdir()}
        assert {"shard-0000.h5", "shard-0000.json", "plan.json"} <= names
        return partial

    return half_built


def test_a_resumed_build_is_the_same(interrupt, folder, cache, tmp_path):
    index = index_folder(folder)
    partial = interrupt(index, tmp_path / "again")
    with pytest.raises(StaleError, match="is an unfinished cache"):
        verify(partial)
    again = build(index, tmp_path / "again")
    for path in cache.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes()


def test_a_build_does_not_go_on_with_other_pixels(interrupt, folder, tmp_path, monkeypatch):
    """Files written anew between two halves of a build: same headers, same sizes."""
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    partial = interrupt(index_folder(folder), tmp_path / "again")
    before = (partial / "shard-0000.h5").read_bytes()
    write(folder, 0, 1, seed=55)
    with pytest.raises(
        StaleError,
        match=r"1 of 1 slices of finished shards .*the first is .*p0-1\.dcm",
    ):
        build(index_folder(folder), tmp_path / "again")
    assert (partial / "shard-0000.h5").read_bytes() == before
    restarted = build(index_folder(folder), tmp_path / "again", restart=True)
    assert restarted.pixels_digest == build(index_folder(folder), tmp_path / "b").pixels_digest


def test_a_build_goes_on_after_files_were_touched(interrupt, folder, cache, tmp_path):
    interrupt(index_folder(folder), tmp_path / "again")
    touch(folder)
    again = build(index_folder(folder), tmp_path / "again")
    assert again.pixels_digest == cache.pixels_digest


def test_a_foreign_shard_in_an_unfinished_build_is_refused(interrupt, folder, other, tmp_path):
    index = index_folder(folder)
    partial = interrupt(index, tmp_path / "again")
    whole = (partial / "shard-0000.h5").read_bytes()
    shutil.copy(other.path / "shard-0000.h5", partial / "shard-0000.h5")
    with pytest.raises(
        StaleError, match=r"partial/shard-0000\.h5: the shard holds other .*remove it.*--restart"
    ):
        build(index, tmp_path / "again")
    (partial / "shard-0000.h5").write_bytes(whole[:-7])
    with pytest.raises(StaleError, match=r"partial/shard-0000\.h5: the shard has .* bytes"):
        build(index, tmp_path / "again")
    (partial / "shard-0000.h5").unlink()  # as the hint says
    assert len(build(index, tmp_path / "again")) == PATIENTS * SLICES


def test_a_shard_with_its_record_from_another_build_is_refused(interrupt, folder, tmp_path):
    index = index_folder(folder)
    partial = interrupt(index, tmp_path / "again")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for number, patient in enumerate((3, 4, 5)):
        for place in range(SLICES):
            write(foreign, patient, place, 7 * number + place)
    theirs = interrupt(index_folder(foreign), tmp_path / "theirs")
    for name in ("shard-0000.h5", "shard-0000.json"):
        shutil.copy(theirs / name, partial / name)
    with pytest.raises(StaleError, match=r"partial/shard-0000\.json belongs to another build"):
        build(index, tmp_path / "again")
    with h5py.File(partial / "shard-0000.h5") as file:
        assert file["hu"].shape == (SLICES, SIZE, SIZE)  # by its shape it would fit


def test_the_command_restarts_only_when_asked(interrupt, folder, tmp_path):
    index = index_folder(folder)
    index.save(tmp_path / "index")
    partial = interrupt(index, tmp_path / "again")
    arguments = ["cache", "--index", tmp_path / "index", "--out", tmp_path / "again"]
    arguments = [*map(str, arguments), "--size", "32", "--workers", "0"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 6
    said = " ".join(done.output.split())
    assert "finished shard" in said and "size 16, not 32" in said and "--restart" in said
    assert (partial / "shard-0000.h5").is_file()
    done = CliRunner().invoke(main, [*arguments, "--restart"])
    assert done.exit_code == 0, done.output
    assert not partial.exists()
    assert CTCache.open(tmp_path / "again").size == 32
