"""Archives read as they come: the same slices as from a folder, and no member is read wrongly."""

import dataclasses
import io
import os
import random
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dicom import tiny_file, tiny_head

from ich_keras.cli import main
from ich_keras.ct import archives, members, walk
from ich_keras.ct.dicom import read_header, read_slice
from ich_keras.ct.rejects import NothingUsable, RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache import fill as cache_fill
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.reading import indexed_slices, read_indexed
from ich_keras.verification import verify

SIZE = 16
FORMS = ("zip", "stored zip", "tar")


def contents(series: int = 2, count: int = 4) -> dict[str, bytes]:
    """Return name -> DICOM file."""
    return {
        f"s{s}/{number:02d}.dcm": tiny_file(
            tiny_head(10 * s + number, 24),
            SOPInstanceUID=f"1.2.{s}.{number}",
            SeriesInstanceUID=f"1.2.{s}",
            StudyInstanceUID=f"1.{s}",
            PatientID=f"P{s}",
            ImagePositionPatient=[-125, -125, 5 * number],
        )
        for s in range(1, series + 1)
        for number in range(count)
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_archive(path: Path, files: dict[str, bytes], form: str = "zip") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(files)
    random.Random(0).shuffle(names)  # the order of the series is not that of the archive
    if form == "tar":
        with tarfile.open(path, "w") as tar:
            for name in names:
                add_to_tar(tar, name, files[name])
        return path
    method = zipfile.ZIP_STORED if form == "stored zip" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, files[name])
    return path


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes = b"", **settings) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in settings.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def suffix(form: str) -> str:
    return f".{form.split()[-1]}"


def rejects_of(index: SeriesIndex) -> dict[str, str]:
    """Return the part of each reject's path behind the archive -> code."""
    paths = [path.rpartition("!/")[2] for path in index.rejects["path"]]
    return dict(zip(paths, index.rejects["code"], strict=True))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*.h5"))}


# --- The same as from a folder --------------------------------------------------------------


@pytest.fixture(scope="module")
def from_folder(tmp_path_factory) -> tuple[SeriesIndex, CTCache]:
    folder = tmp_path_factory.mktemp("folder")
    index = index_folder(write_folder(folder / "dicom", contents()))
    return index, build_cache(index, folder / "cache", SIZE, shard_bytes=4 * SIZE * SIZE * 2)


@pytest.mark.parametrize(
    ("form", "workers"), [*((form, 0) for form in FORMS), ("zip", 2), ("tar", 2)]
)
def test_the_cache_is_that_of_the_folder(from_folder, tmp_path, form, workers):
    index, cache = from_folder
    archive = write_archive(tmp_path / f"all{suffix(form)}", contents(), form)
    # One archive by its name, and a folder with one.
    for number, root in enumerate([archive, tmp_path] if workers == 0 else [archive]):
        own = index_folder(root, workers=workers)
        same = ["sop_instance_uid", "series_uid", "slice_index", "position_mm", "file_size"]
        assert own.slices[same].equals(index.slices[same])
        assert own.series.equals(index.series)
        assert set(own.slices["container"]) == {str(archive)}
        assert sorted(own.slices["member"]) == sorted(contents())
        assert own.rejects.empty
        out = tmp_path / "out" / str(number)
        built = build_cache(own, out, SIZE, workers, shard_bytes=4 * SIZE * SIZE * 2)
        assert shards(out) == shards(cache.path)
        assert len(shards(out)) == 2
        assert built.fingerprint == cache.fingerprint
        assert built.pixels_digest == cache.pixels_digest
        # The data set may be unpacked, or packed, after it was cached.
        built.require(index=index)
        cache.require(index=own)
        shutil.rmtree(tmp_path / "out")


def test_many_archives_and_plain_files_in_one_folder(from_folder, tmp_path):
    index, cache = from_folder
    files = list(contents().items())
    write_folder(tmp_path / "data", dict(files[:2]))
    write_archive(tmp_path / "data" / "b" / "1.ZIP", dict(files[2:4]))
    write_archive(tmp_path / "data" / "b" / "2.zip", dict(files[4:5]))
    write_archive(tmp_path / "data" / "3.tar", dict(files[5:]), "tar")
    own = index_folder(tmp_path / "data")
    assert own.series.equals(index.series) and own.rejects.empty
    build_cache(own, tmp_path / "cache", SIZE, shard_bytes=4 * SIZE * SIZE * 2)
    assert shards(tmp_path / "cache") == shards(cache.path)


def test_the_index_comes_back_and_verifies(tmp_path):
    archive = write_archive(tmp_path / "all.zip", contents())
    index = index_folder(archive)
    index.save(tmp_path / "index")
    assert SeriesIndex.load(tmp_path / "index").equals(index)
    assert "8 files are in their places" in " ".join(verify(tmp_path / "index"))
    content = archive.read_bytes()
    archive.write_bytes(b"x" + content)
    with pytest.raises(Exception, match="8 of 8 files are gone or have another size.*all.zip!/s1/"):
        verify(tmp_path / "index")


@pytest.mark.parametrize("form", FORMS)
def test_headers_are_read_in_stored_order(tmp_path, monkeypatch, form):
    archive = write_archive(tmp_path / f"all{suffix(form)}", contents(), form)
    read, offsets = walk.read_headers, []

    def note(source, **settings):
        offsets.append(source.offset)
        return read(source, **settings)

    monkeypatch.setattr(walk, "read_headers", note)
    index_folder(archive)
    assert len(offsets) == 8 and offsets == sorted(offsets)


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_is_filled_in_stored_order(tmp_path, monkeypatch, form):
    archive = write_archive(tmp_path / f"all{suffix(form)}", contents(), form)
    read, offsets = cache_fill.read_indexed, []

    def note(indexed, size):
        offsets.append(indexed.member_offset)
        return read(indexed, size)

    monkeypatch.setattr(cache_fill, "read_indexed", note)
    build_cache(index_folder(archive), tmp_path / "cache", SIZE)
    assert len(offsets) == 8 and offsets == sorted(offsets)


def test_an_interrupted_indexing_resumes(tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "all.zip", contents())
    journal = tmp_path / "journal"
    index = index_folder(archive, journal=journal)
    read, seen = walk.read_headers, []

    def note(source, **settings):
        seen.append(source.name)
        return read(source, **settings)

    monkeypatch.setattr(walk, "read_headers", note)
    assert index_folder(archive, journal=journal).equals(index)
    assert seen == []
    # Another archive with the same time, name and sizes: only the checksums tell.
    status = archive.stat()
    files = contents()
    name = "s1/02.dcm"
    files[name] = files[name].replace(b"P1", b"P9")
    write_archive(archive, files)
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "P9" in set(index_folder(archive, journal=journal).slices["patient_id"])
    assert name in seen


def test_an_interrupted_build_resumes(from_folder, tmp_path, monkeypatch):
    index = index_folder(write_archive(tmp_path / "all.tar", contents(), "tar"))
    options = {"size": SIZE, "shard_bytes": 4 * SIZE * SIZE * 2}
    read, seen = cache_fill.read_indexed, []

    def fail_late(indexed, size):
        seen.append(indexed.member)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return read(indexed, size)

    with monkeypatch.context() as patched:
        patched.setattr(cache_fill, "read_indexed", fail_late)
        with pytest.raises(KeyboardInterrupt):
            build_cache(index, tmp_path / "cache", **options)
    build_cache(index, tmp_path / "cache", **options)
    assert shards(tmp_path / "cache") == shards(from_folder[1].path)


def test_an_index_of_an_older_version_still_opens(tmp_path):
    index = index_folder(write_folder(tmp_path / "dicom", contents()))
    places = ["member_offset", "member_bytes", "member_crc32"]
    dataclasses.replace(index, slices=index.slices.drop(columns=places)).save(tmp_path / "old")
    assert SeriesIndex.load(tmp_path / "old").equals(index)


def test_messages_name_members(tmp_path):
    archive = write_archive(tmp_path / "data" / "all.zip", {**contents(), "a.txt": b"no DICOM"})
    index = index_folder(archive)
    assert index.rejects["path"].tolist() == [f"{archive}!/a.txt"]
    assert indexed_slices(index)[0].path == f"{archive}!/s1/00.dcm"


# --- Zips that are damaged or hostile -------------------------------------------------------


def good(count: int = 1) -> dict[str, bytes]:
    return contents(1, count)


def zip_with(path: Path, change=None, **extra: bytes) -> Path:
    """A zip of one good slice and other members; `change(archive)` may add to it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**good(), **extra}.items():
            archive.writestr(name, content)
        if change is not None:
            change(archive)
    return path


def patched(path: Path, find: bytes, replace: bytes, which: int = 0) -> None:
    content = path.read_bytes()
    place = -1
    for _ in range(which + 1):
        place = content.index(find, place + 1)
    path.write_bytes(content[:place] + replace + content[place + len(find) :])


def second_slice() -> bytes:
    return tiny_file(tiny_head(7, 24), SOPInstanceUID="1.2.1.9", SeriesInstanceUID="1.2.1")


def test_an_encrypted_member(tmp_path):
    path = zip_with(tmp_path / "a.zip", **{"b.dcm": second_slice()})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo("b.dcm").header_offset
    central = content.rindex(b"PK\x01\x02")
    content[local + 6] |= 1
    content[central + 8] |= 1
    path.write_bytes(content)
    index = index_folder(path)
    assert rejects_of(index) == {"b.dcm": "BAD_MEMBER"}
    assert "encrypted" in index.rejects["detail"][0]
    assert len(index.slices) == 1
    # Only its own header says so.
    content[central + 8] &= 0xFE
    path.write_bytes(content)
    assert rejects_of(index_folder(path)) == {"b.dcm": "BAD_MEMBER"}


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused_by_name(tmp_path, method):
    path = zip_with(tmp_path / "a.zip", lambda a: a.writestr("b.dcm", second_slice(), method))
    index = index_folder(path)
    assert rejects_of(index) == {"b.dcm": "BAD_MEMBER"}
    assert f"method {method}" in index.rejects["detail"][0]


def test_a_flipped_bit_in_the_pixels_reaches_no_cache(tmp_path):
    path = write_archive(tmp_path / "a.zip", contents(1, 4), "stored zip")
    clean = index_folder(path)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("s1/02.dcm")
    content = bytearray(path.read_bytes())
    content[info.header_offset + info.compress_size - 100] ^= 4
    path.write_bytes(content)
    for index in (clean, index_folder(path)):
        cache = build_cache(index, tmp_path / f"cache-{id(index)}", SIZE)
        assert rejects_of(cache) == {"s1/02.dcm": "BAD_MEMBER"}
        assert cache.slices["sop_instance_uid"].tolist() == ["1.2.1.0", "1.2.1.1", "1.2.1.3"]


def test_a_member_replaced_by_another_of_the_same_place_and_size(tmp_path):
    files = contents(1, 4)
    path = write_archive(tmp_path / "a.tar", files, "tar")
    index = index_folder(path)
    files["s1/02.dcm"] = files["s1/02.dcm"].replace(b"1.2.1.2", b"1.2.1.7")
    write_archive(path, files, "tar")
    cache = build_cache(index, tmp_path / "cache", SIZE)
    assert rejects_of(cache) == {"s1/02.dcm": "CHANGED"}
    write_archive(path, contents(1, 3), "tar")
    detail = []
    for indexed in indexed_slices(index):
        with pytest.raises(RejectedFile) as caught:
            read_indexed(indexed, SIZE)
            raise RejectedFile("NOT_CT", "")
        detail.append(caught.value.code)
    assert "BAD_MEMBER" in detail
    # At the same place lies a longer file that begins alike.
    files = contents(1, 4)
    index = index_folder(write_archive(path, files, "tar"))
    first = min(indexed_slices(index), key=lambda indexed: indexed.member_offset)
    files[first.member] += bytes(700)
    write_archive(path, files, "tar")
    with pytest.raises(RejectedFile, match=f"has {first.file_size + 700} bytes; expected"):
        read_indexed(first, SIZE)


@pytest.mark.parametrize("claimed", [2**31, 2**32 - 2])
def test_a_claimed_size_is_not_believed(tmp_path, claimed):
    path = zip_with(tmp_path / "a.zip", **{"b.dcm": second_slice()})
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    struct.pack_into("<L", content, central + 24, claimed)
    path.write_bytes(content)
    index = index_folder(path)
    assert rejects_of(index) == {"b.dcm": "BAD_MEMBER"}
    assert "ends too early" in index.rejects["detail"][0]
    # What is stored as it is cannot be longer than the archive.
    write_archive(path, {"b.dcm": second_slice()}, "stored zip")
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    struct.pack_into("<LL", content, central + 20, claimed, claimed)
    path.write_bytes(content)
    with pytest.raises(NothingUsable, match="overlaps with another part"):
        index_folder(path)


def test_a_bomb_is_not_unpacked(tmp_path):
    import tracemalloc

    head = second_slice()
    bomb = head + bytes(300 * 2**20)
    path = zip_with(tmp_path / "a.zip", **{"b.dcm": bomb})
    # Sequences without end would have to be looked for, all through the zeros.
    tracemalloc.start()
    index = index_folder(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rejects_of(index) == {"b.dcm": "TOO_LARGE"}
    assert peak < 80 * 2**20
    assert len(index.slices) == 1


def test_a_large_text_is_no_slice_and_no_loss(tmp_path):
    path = zip_with(tmp_path / "a.zip", **{"labels.csv": b"ID,Label\n" * 9_000_000})
    assert rejects_of(index_folder(path)) == {"labels.csv": "NOT_DICOM"}


def test_overlapping_members_are_refused(tmp_path):
    path = zip_with(tmp_path / "a.zip", **{"b.dcm": second_slice(), "c.dcm": second_slice()})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("b.dcm").header_offset
    central = content.rindex(b"PK\x01\x02")
    struct.pack_into("<L", content, central + 42, place)  # c lies where b does
    path.write_bytes(content)
    index = index_folder(path)
    assert rejects_of(index) == {"b.dcm": "BAD_MEMBER", "c.dcm": "BAD_MEMBER"}
    assert "overlaps" in index.rejects["detail"][0]


@pytest.mark.parametrize("name", ["../../b.dcm", "/b.dcm", "x/../../b.dcm", "..\\b.dcm"])
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_names_that_lead_out(tmp_path, name, form):
    path = write_archive(tmp_path / f"a{suffix(form)}", {**good(), name: second_slice()}, form)
    index = index_folder(path)
    assert list(rejects_of(index).values()) == ["BAD_MEMBER"]
    assert "leads out" in index.rejects["detail"][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_a_member_without_a_name(tmp_path):
    path = zip_with(tmp_path / "a.zip", **{"b.dcm": second_slice()})
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    struct.pack_into("<3H", content, central + 28, 0, 0, len("b.dcm"))  # its name as a comment
    path.write_bytes(content)
    index = index_folder(path)
    assert index.rejects["code"].tolist() == ["BAD_MEMBER"]
    assert len(index.slices) == 1


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ["zip", "tar"])
def test_two_members_of_one_name_are_both_refused(tmp_path, form):
    path = write_archive(tmp_path / f"a{suffix(form)}", good(), form)
    if form == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("b.dcm", second_slice())
            archive.writestr("b.dcm", second_slice())
    else:
        with tarfile.open(path, "a") as tar:
            add_to_tar(tar, "b.dcm", second_slice())
            add_to_tar(tar, "./b.dcm", second_slice())
    index = index_folder(path)
    assert index.rejects["path"].tolist() == [f"{path}!/b.dcm"] * 2
    assert set(index.rejects["code"]) == {"BAD_MEMBER"}
    assert "2 members of this name" in index.rejects["detail"][0]


def test_hidden_nested_links_and_folders(tmp_path):
    def add(archive):
        archive.mkdir("empty")
        link = zipfile.ZipInfo("link.dcm")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "s1/00.dcm")

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b.dcm", second_slice())
    extra = {
        "__MACOSX/._a.dcm": b"x",
        ".git/b.dcm": second_slice(),
        "in/ner.zip": inner.getvalue(),
        "in.tar.gz": b"x",
    }
    index = index_folder(zip_with(tmp_path / "a.zip", add, **extra))
    assert rejects_of(index) == {
        "__MACOSX/._a.dcm": "HIDDEN",
        ".git/b.dcm": "HIDDEN",
        "in/ner.zip": "NESTED_ARCHIVE",
        "in.tar.gz": "NESTED_ARCHIVE",
        "link.dcm": "BAD_MEMBER",
    }
    assert len(index.slices) == 1


def test_archives_of_other_kinds_say_the_way_out(tmp_path):
    write_folder(tmp_path, good())
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        add_to_tar(tar, "b.dcm", second_slice())
    (tmp_path / "b.7z").write_bytes(b"7z")
    (tmp_path / "c.zip").write_bytes(b"no zip")
    (tmp_path / "d.tar").write_bytes(b"")
    (tmp_path / "e.zip").write_bytes(second_slice())  # a slice, whatever its name
    index = index_folder(tmp_path)
    found = {Path(path).name: code for path, code in rejects_of(index).items()}
    assert found == dict.fromkeys(["a.tar.gz", "b.7z", "c.zip", "d.tar"], "BAD_ARCHIVE")
    assert "gunzip" in index.rejects["hint"][0]
    assert len(index.slices) == 2
    with pytest.raises(NothingUsable, match="packed as a whole"):
        index_folder(tmp_path / "a.tar.gz")
    assert len(index_folder(tmp_path / "e.zip").slices) == 1


# --- Tars -----------------------------------------------------------------------------------


def test_links_devices_and_long_names_in_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    long = "/".join(["d" * 90] * 3) + "/long.dcm"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add_to_tar(tar, "folder", type=tarfile.DIRTYPE)
        add_to_tar(tar, long, second_slice())
        add_to_tar(tar, "hard.dcm", type=tarfile.LNKTYPE, linkname=long)
        add_to_tar(tar, "soft.dcm", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_to_tar(tar, "pipe", type=tarfile.FIFOTYPE)
        add_to_tar(tar, "disk", type=tarfile.BLKTYPE)
        add_to_tar(tar, "holes.dcm", type=tarfile.GNUTYPE_SPARSE)
    index = index_folder(path)
    assert set(index.rejects["detail"]) == {
        "a link, a device or a sparse file; expected a plain file"
    }
    assert index.slices["member"].tolist() == [long]
    assert rejects_of(index) == dict.fromkeys(
        ["hard.dcm", "soft.dcm", "pipe", "disk", "holes.dcm"], "BAD_MEMBER"
    )
    pax = tmp_path / "pax.tar"
    with tarfile.open(pax, "w", format=tarfile.PAX_FORMAT) as tar:
        add_to_tar(tar, "é" * 120 + ".dcm", second_slice(), mtime=1.5)
    assert index_folder(pax).slices["member"].tolist() == ["é" * 120 + ".dcm"]


@pytest.mark.parametrize("keep", ["inside a member", "inside a header", "between two members"])
def test_a_tar_that_was_cut(tmp_path, keep):
    path = write_archive(tmp_path / "a.tar", contents(1, 4), "tar")
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    cut = {
        "inside a member": infos[3].offset_data + 300,
        "inside a header": infos[3].offset + 100,
        "between two members": infos[3].offset,
    }[keep]
    with open(path, "r+b") as stream:
        stream.truncate(cut)
    index = index_folder(path)
    assert len(index.slices) == 3
    found = dict(zip(index.rejects["path"], index.rejects["code"], strict=True))
    assert found[str(path)] == "BAD_ARCHIVE"
    if keep == "inside a member":
        assert found[f"{path}!/{infos[3].name}"] == "BAD_MEMBER"
    assert len(found) == (2 if keep == "inside a member" else 1)


def test_what_lies_behind_damage_or_the_end_of_a_tar_is_not_lost_silently(tmp_path):
    path = write_archive(tmp_path / "a.tar", contents(1, 4), "tar")
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[2].offset
    content[middle + 5] ^= 255
    path.write_bytes(content)
    index = index_folder(path)
    assert len(index.slices) == 2
    assert index.rejects["code"].tolist() == ["BAD_ARCHIVE"]
    assert f"damaged at byte {middle}" in index.rejects["detail"][0]
    write_archive(path, contents(1, 4), "tar")
    path.write_bytes(path.read_bytes() * 2)
    index = index_folder(path)
    assert len(index.slices) == 4
    assert "holds more behind its end" in index.rejects["detail"][0]


def test_a_header_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add_to_tar(tar, "a.dcm", second_slice())
    with open(path, "r+b") as stream:
        stream.seek(-tarfile.RECORDSIZE, 2)
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
        stream.seek(512 + -(-len(second_slice()) // 512) * 512)
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(2**34)  # sparse
    index = index_folder(path)
    assert len(index.slices) == 1
    assert f"a header of {2**33} bytes" in index.rejects["detail"][0]


# --- Anything -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_no_damage_gives_a_wrong_image_or_a_traceback(tmp_path_factory, form):
    folder = tmp_path_factory.mktemp("fuzz")
    files = contents(1, 3)
    whole = write_archive(folder / f"a{suffix(form)}", files, form).read_bytes()
    expected = {
        f"1.2.1.{number}": read_slice(io.BytesIO(content)).hu
        for number, content in enumerate(files.values())
    }

    @settings(max_examples=60)
    @given(
        cut=st.one_of(st.none(), st.integers(0, len(whole))),
        changes=st.lists(
            st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)), max_size=4
        ),
    )
    def damage(cut, changes):
        content = bytearray(whole)
        for place, bits in changes:
            content[place] ^= bits
        path = folder / f"b{suffix(form)}"
        path.write_bytes(content[:cut])
        try:
            index = index_folder(path)
        except NothingUsable as error:
            assert not error.rejects.empty
            return
        # A zip has checksums: what is read of it is right. A tar is as good as its files.
        for indexed in indexed_slices(index):
            try:
                hu = read_slice(indexed.source, any_image_type=True).hu
            except RejectedFile:
                continue
            if form != "tar":
                np.testing.assert_array_equal(hu, expected[indexed.sop_instance_uid])

    damage()


@given(st.binary(max_size=2000), st.sampled_from([1, 7, 100, 5000]))
@settings(max_examples=60)
def test_reading_in_any_steps_gives_the_bytes(tmp_path_factory, content, step):
    content = content * 20
    folder = tmp_path_factory.mktemp("steps")
    for form in FORMS:
        path = write_archive(folder / f"a{suffix(form)}", {"x": content}, form)
        kind = archives.kind_of(str(path))
        (entry,) = archives.list_members(walk._look_at(str(path)), kind)
        for is_whole in (False, True):
            with members.opened_member(entry.source, is_whole) as stream:
                assert stream.seek(0, 2) == len(content)
                stream.seek(0)
                parts = iter(lambda: stream.read(step), b"")
                assert b"".join(parts) == content
                stream.seek(len(content) // 2)
                assert stream.read(10) == content[len(content) // 2 :][:10]


def test_what_is_left_inside_the_inflater_is_read(tmp_path):
    # Of much the same, all packed bytes may be taken in before all bytes are given out.
    for size in range(1000, 1300):
        path = write_archive(tmp_path / "a.zip", {"x": bytes(size)})
        (entry,) = archives.list_members(walk._look_at(str(path)), archives.ZIP)
        with open(path, "rb") as archive:
            unpacked = members._Unpacked(archive, entry.source, archive.read(512))
            assert [len(unpacked._bytes_between(at, at + 1)) for at in range(size)] == [1] * size


def test_a_header_is_read_without_the_pixels(tmp_path, monkeypatch):
    large = tiny_file(np.random.default_rng(0).integers(0, 2000, (512, 512)))
    path = write_archive(tmp_path / "a.zip", {"a.dcm": large})
    index = index_folder(path, any_body_part=True)
    unpacked = []
    inflate = members._Unpacked._inflated

    def note(self, packed, limit):
        found = inflate(self, packed, limit)
        unpacked.append(len(found))
        return found

    monkeypatch.setattr(members._Unpacked, "_inflated", note)
    read_header(indexed_slices(index)[0].source)
    assert 0 < sum(unpacked) < 20_000


def test_the_command_line_takes_an_archive(tmp_path):
    path = write_archive(tmp_path / "all.zip", contents())
    arguments = ["index", "--dicom", path, "--out", tmp_path / "index", "--workers", 0]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert "8 slices, 2 series" in " ".join(done.output.split())
    assert not (tmp_path / "index.journal").exists()
