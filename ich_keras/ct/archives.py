"""Listing the members of an archive, a zip or an uncompressed tar, in the order they are stored.

Nothing is unpacked here, and nothing ever to disk. What an archive claims is checked against its
length; a member that cannot be read for sure becomes a reject.
"""

import io
import itertools
import os
import stat
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ich_keras.ct.journal import Entry
from ich_keras.ct.members import BLOCK, ZIP_MAGIC
from ich_keras.ct.tables import shown_path

ZIP, TAR, OTHER = "zip", "tar", "other"
_SUFFIXES = {".zip": ZIP, ".tar": TAR}
# To reach one member of these, all before it must be unpacked.
_PACKED_AS_A_WHOLE = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    *(".7z", ".rar"),
)
_HEAD_BYTES = 512
# zipfile raises NotImplementedError for what it cannot unpack.
_ZIP_FLAWS = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError)
_TAR_FLAWS = (tarfile.TarError, ValueError, struct.error, EOFError, RecursionError, KeyError)
_LOCAL_HEADER_BYTES = 30
# Headers that speak of the next member: long names, and pax records. They are read into memory.
_EXTENSIONS = b"xgXLKN"
_MAX_EXTENSION_BYTES = 2**20
_MAX_EXTENSIONS = 16
_REGULAR = (0, stat.S_IFREG)  # 0: a zip that was not written on Unix


def kind_of(path: str, is_asked_for: bool = False) -> str | None:
    """Return what kind of archive a file is: ZIP, TAR, OTHER (one that is not read), or None.

    Args:
        path: of the file. In a folder its name decides, so that not every file need be opened.
        is_asked_for: whether a person named this file; then its first bytes decide, too.
    """
    kind = kind_of_name(path)
    if kind == OTHER or (kind is None and not is_asked_for):
        return kind
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError:
        return kind  # listing it says why
    if head[128:132] == b"DICM":  # whatever its name
        return None
    if head.startswith((ZIP_MAGIC, b"PK\x05\x06")):
        return ZIP
    return TAR if head[257:262] == b"ustar" else kind


class _Found(NamedTuple):
    """A member as its archive lists it; `fault` says why it cannot be read."""

    name: str
    offset: int
    packed_bytes: int
    size: int
    crc32: int
    fault: str = ""


def list_members(archive: Entry, kind: str) -> Iterator[Entry]:
    """Yield the members of an archive in stored order; what is not read comes as a reject.

    Folders are left out. Members with one name are all rejects, and so are links, hidden files and
    archives. An archive that is damaged at its end gives those before it, and a reject for itself.

    Args:
        archive: the archive's own entry.
        kind: from `kind_of`.
    """
    if kind == OTHER:
        detail = "it is packed as a whole, or of another kind than zip and tar"
        hint = "Unpack it. For a .tar.gz, gunzip will do: it leaves a .tar, which is read."
        yield archive._replace(code="BAD_ARCHIVE", detail=detail, hint=hint)
        return
    try:
        with open(archive.path, "rb") as stream:
            found, fault = (_zip if kind == ZIP else _tar)(stream, archive.file_size)
    except OSError as error:
        yield archive._replace(code="UNREADABLE", detail=error.strerror or type(error).__name__)
        return
    counts = Counter(member.name for member in found)
    for member in sorted(found, key=lambda member: member.offset):
        yield _entry(archive, member, counts[member.name])
    if fault:
        yield archive._replace(code="BAD_ARCHIVE", detail=fault)


def _entry(archive: Entry, member: _Found, count: int) -> Entry:
    name = os.fsencode(member.name).decode("utf-8", "replace")
    entry = Entry(
        shown_path(archive.path, name),
        member.size,
        archive.file_mtime_ns,
        member=name,
        member_offset=member.offset,
        member_bytes=member.packed_bytes,
        member_crc32=member.crc32,
    )
    parts = name.replace("\\", "/").split("/")
    end = member.offset + member.packed_bytes
    if member.fault:
        fault = member.fault
    elif name != member.name or "\0" in name:
        fault = "its name is not UTF-8"
    elif count > 1:
        fault = f"the archive holds {count} members of this name"
    elif ".." in parts or name.startswith(("/", "\\")) or not name:
        fault = "its name leads out of the archive"
    elif member.offset < 0 or end > archive.file_size:
        fault = f"it ends at byte {end} of an archive of {archive.file_size} bytes"
    elif any(part.startswith(".") and part != "." for part in parts):
        return entry._replace(code="HIDDEN", detail="a hidden file, not read")
    elif kind_of_name(name) is not None:
        return entry._replace(code="NESTED_ARCHIVE", detail="an archive within an archive")
    else:
        return entry
    return entry._replace(code="BAD_MEMBER", detail=fault)


def kind_of_name(name: str) -> str | None:
    """Return what kind of archive a file's name says that it is, or None."""
    name = name.lower()
    if name.endswith(_PACKED_AS_A_WHOLE):
        return OTHER
    return next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)


# --- Zip ------------------------------------------------------------------------------------


def _zip(stream: BinaryIO, file_size: int) -> tuple[list[_Found], str]:
    """Return the members of a zip, and what is wrong with it as a whole."""
    try:
        with zipfile.ZipFile(stream) as archive:
            # Not `is_dir`, which fails on an empty name.
            infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
            start_of_directory = archive.start_dir
    except _ZIP_FLAWS as error:
        return [], f"it cannot be read as a zip ({_said(error)})"
    infos.sort(key=lambda info: info.header_offset)
    begins = [info.header_offset for info in infos]
    ends = [
        info.header_offset + _LOCAL_HEADER_BYTES + len(info.orig_filename) + info.compress_size
        for info in infos
    ]
    before = [0, *itertools.accumulate(ends, max)]
    found = []
    for info, begin, end, earlier, later in zip(
        infos, begins, ends, before, [*begins[1:], start_of_directory], strict=False
    ):
        fault = _zip_fault(info)
        if begin < earlier or end > later:
            fault = "it overlaps with another part of the archive"
        found.append(
            _Found(info.filename, begin, info.compress_size, info.file_size, info.CRC, fault)
        )
    return found, ""


def _zip_fault(info: zipfile.ZipInfo) -> str:
    # Encryption and method are looked at where a member is opened, in its own header.
    if "\0" in info.orig_filename:
        return "its name holds a zero byte"
    if stat.S_IFMT(info.external_attr >> 16) not in _REGULAR:
        return "a link or device; expected a file"
    return ""


# --- Tar ------------------------------------------------------------------------------------


def _tar(stream: BinaryIO, file_size: int) -> tuple[list[_Found], str]:
    """Return the members of a tar, and what is wrong with it as a whole."""
    found: list[_Found] = []
    offset = 0
    try:
        _require_short_extensions(stream, offset)
        archive = tarfile.open(  # noqa: SIM115 (the stream is the caller's)
            fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape"
        )
        # `next` reads the first member when the archive is opened.
        info, archive.firstmember = archive.firstmember, None  # type: ignore[attr-defined]
        while info is not None:
            archive.members.clear()  # type: ignore[attr-defined] # it would keep them all
            offset = archive.offset
            if not info.isdir():
                found.append(_of_tar(info))
            _require_short_extensions(stream, offset)
            info = archive.next()
            if info is not None and archive.offset <= offset:
                raise tarfile.ReadError("a member of negative size")
        return found, _end_fault(stream, offset)
    except _TAR_FLAWS as error:
        return found, f"it cannot be read as a tar at byte {offset} ({_said(error)})"


def _of_tar(info: tarfile.TarInfo) -> _Found:
    fault = ""
    if not info.isreg() or info.issparse():
        fault = "a link, a device or a sparse file; expected a plain file"
    name = info.name.removeprefix("./")
    return _Found(name, info.offset_data - BLOCK, BLOCK + info.size, info.size, 0, fault)


def _require_short_extensions(stream: BinaryIO, offset: int) -> None:
    """Refuse headers that would be read into memory and are too large for it, or too many."""
    place = offset
    for _ in range(_MAX_EXTENSIONS):
        stream.seek(place)
        head = stream.read(BLOCK)
        if len(head) < BLOCK or head[156:157] not in {bytes([byte]) for byte in _EXTENSIONS}:
            break
        size = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape").size
        if not 0 <= size <= _MAX_EXTENSION_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        place += BLOCK + -(-size // BLOCK) * BLOCK
    else:
        raise tarfile.ReadError("too many headers for one member")
    stream.seek(offset)


def _end_fault(stream: BinaryIO, offset: int) -> str:
    """Say what is wrong with the end of a tar: two blocks of zeros, and nothing but zeros."""
    stream.seek(offset)
    rest = stream.read(io.DEFAULT_BUFFER_SIZE * 8)
    if len(rest) < BLOCK:
        return "it has no end mark: it may have been cut"
    if any(rest[:BLOCK]):
        return f"it is damaged at byte {offset}; what follows is not read"
    if any(rest):
        return f"it holds more behind its end at byte {offset}, which is not read"
    return ""


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
