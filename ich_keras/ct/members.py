"""One file inside an archive: where it lies, and reading it without unpacking the archive.

A member is read from its place in the archive. No directory of the archive is needed for that, so a
process that reads a few members of a large archive holds nothing but their bytes.
"""

import abc
import contextlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ich_keras.ct.rejects import RejectedFile

# A member of a zip is unpacked in memory. The largest slice, 4096 x 4096, has 32 MiB.
MAX_MEMBER_BYTES = 64 * 2**20
# A file that holds several slices: 512 x 512 x 2000 of 16 bits.
MAX_VOLUME_BYTES = 2**30
BLOCK = 512  # of a tar
STORED, DEFLATED = 0, 8
ZIP_MAGIC = b"PK\x03\x04"
REPLACED = "If the archive was replaced, index it again. Otherwise copy or download it again."

# APPNOTE.TXT 4.3.7: signature, version, flags, method, time, date, CRC-32, two sizes, two lengths.
_LOCAL_HEADER = struct.Struct("<4sHHHHHLLLHH")
_CHUNK_BYTES = 1 << 16


class Member(NamedTuple):
    """The place of a member in its archive, a zip or an uncompressed tar.

    Args:
        container: path of the archive.
        name: of the member, as the archive has it.
        offset: byte of the archive at which its header begins; in a tar that of the last block of
            its header.
        packed_bytes: its bytes in the archive.
        size: its bytes when unpacked.
        crc32: of these; 0 in a tar, which has none.
    """

    container: str
    name: str
    offset: int
    packed_bytes: int
    size: int
    crc32: int


@contextlib.contextmanager
def opened_member(
    member: Member, is_whole: bool = True, most_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[BinaryIO]:
    """Open a member as a seekable binary file.

    Args:
        member: its place.
        is_whole: check all bytes of a zip's member against their checksum before any is handed out.
            Otherwise it is unpacked as far as it is read, and not checked.
        most_bytes: of a zip's member, unpacked.

    Raises:
        RejectedFile: BAD_MEMBER, there is no such member, or it is damaged; TOO_LARGE.
        OSError: the archive cannot be read.
    """
    with open(member.container, "rb") as archive:
        archive.seek(member.offset)
        head = archive.read(BLOCK)
        if not head.startswith(ZIP_MAGIC):
            _require_tar_header(head, member)
            yield io.BufferedReader(_Window(archive, member))
            return
        unpacked = _Unpacked(archive, member, head, most_bytes)
        if is_whole:
            yield io.BytesIO(unpacked.whole())
            return
        yield io.BufferedReader(unpacked)
        # Its header is that of a CT; its pixels will have to be unpacked as a whole.
        unpacked.require_size(member.size)


def expect_volume(stream: BinaryIO) -> None:
    """Let a file opened by `opened_member` be as large as one that holds several slices."""
    raw = getattr(stream, "raw", None)
    if isinstance(raw, _Unpacked):
        raw.most_bytes = MAX_VOLUME_BYTES


def require_member(member: Member) -> None:
    """Check that an archive still has a header of this member in its place.

    Raises:
        RejectedFile: BAD_MEMBER.
        OSError: the archive cannot be read.
    """
    with opened_member(member, is_whole=False), open(member.container, "rb") as archive:
        if archive.seek(0, io.SEEK_END) < member.offset + member.packed_bytes:
            raise bad_member("the archive ends before its bytes")


def bad_member(detail: str, hint: str = REPLACED) -> RejectedFile:
    """Make the error for a member that cannot be read."""
    return RejectedFile("BAD_MEMBER", detail, hint)


def _require_tar_header(head: bytes, member: Member) -> None:
    try:
        found = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise bad_member(f"there is no member at byte {member.offset} of the archive") from error
    if not found.isreg() or found.size != member.size:
        raise bad_member(
            f"the member at byte {member.offset} of the archive has {found.size} bytes; expected"
            f" {member.size}"
        )


class _Part(io.RawIOBase):
    """A file of known size that is read from a part of another."""

    def __init__(self, archive: BinaryIO, member: Member) -> None:
        self._archive = archive
        self._member = member
        self._position = 0

    @property
    def name(self) -> str:
        """Its name, which pydicom asks for."""
        return self._member.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        stop = min(self._position + len(buffer), self._member.size)
        found = self._bytes_between(self._position, stop) if stop > self._position else b""
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    @abc.abstractmethod
    def _bytes_between(self, start: int, stop: int) -> bytes | bytearray:
        """Return the bytes of the member from `start` to `stop`."""


class _Window(_Part):
    """A member of a tar."""

    def _bytes_between(self, start: int, stop: int) -> bytes:
        self._archive.seek(self._member.offset + BLOCK + start)
        return self._archive.read(stop - start)


class _Unpacked(_Part):
    """A member of a zip, unpacked as far as it is read; what was unpacked stays in memory."""

    def __init__(
        self, archive: BinaryIO, member: Member, head: bytes, most_bytes: int = MAX_MEMBER_BYTES
    ) -> None:
        super().__init__(archive, member)
        self.most_bytes = most_bytes
        if len(head) < _LOCAL_HEADER.size:
            raise bad_member("the archive ends inside its header")
        _, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack_from(head)
        if flags & 1:
            raise bad_member("it is encrypted")
        if method not in (STORED, DEFLATED):
            raise bad_member(
                f"it is packed by method {method}; expected 0 (stored) or 8 (deflated)"
            )
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS) if method == DEFLATED else None
        self._rest = member.packed_bytes
        self._unpacked = bytearray()
        archive.seek(member.offset + _LOCAL_HEADER.size + name_length + extra_length)

    def whole(self) -> bytes:
        """Unpack and check all of it."""
        size = self._member.size
        self.require_size(size)
        self._unpack(size)
        if len(self._unpacked) != size or zlib.crc32(self._unpacked) != self._member.crc32:
            raise bad_member("its bytes do not match the checksum that the archive has of them")
        return bytes(self._unpacked)

    def require_size(self, size: int) -> None:
        if size > self.most_bytes:
            raise RejectedFile(
                "TOO_LARGE",
                f"a member of {self._member.size} bytes; expected at most {self.most_bytes}",
                "Unpack the archive.",
            )

    def _bytes_between(self, start: int, stop: int) -> bytearray:
        self.require_size(stop)
        self._unpack(stop)
        return self._unpacked[start:stop]

    def _unpack(self, stop: int) -> None:
        while len(self._unpacked) < stop:
            packed = b"" if self._inflater is None else self._inflater.unconsumed_tail
            if not packed:
                packed = self._archive.read(min(_CHUNK_BYTES, self._rest))
                self._rest -= len(packed)
            # Without more to read there may still be something inside the inflater.
            found = self._inflated(packed, stop - len(self._unpacked))
            if not found and not packed:
                raise bad_member("it ends too early")
            self._unpacked += found

    def _inflated(self, packed: bytes, limit: int) -> bytes:
        if self._inflater is None:
            return packed
        if self._inflater.eof:
            raise bad_member("it ends too early")
        try:
            return self._inflater.decompress(packed, limit)
        except zlib.error as error:
            raise bad_member(f"it cannot be unpacked ({error})") from error
