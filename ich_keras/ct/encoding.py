"""How a file stores its pixels: transfer syntaxes, their decoders, and errors of pixel data."""

from dataclasses import dataclass
from typing import Any

from pydicom.pixels import get_decoder

from ich_keras.ct.elements import name, show
from ich_keras.ct.rejects import CODECS, COPY_AGAIN, EXPORT_AGAIN, RejectedFile

IMPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_LITTLE_ENDIAN = "1.2.840.10008.1.2.1"
EXPLICIT_BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
NATIVE = (IMPLICIT_LITTLE_ENDIAN, EXPLICIT_LITTLE_ENDIAN, EXPLICIT_BIG_ENDIAN)

_CONVERT = "Convert it to Explicit VR Little Endian first, for instance with dcmtk's dcmconv."
_INSTALL = f"Install the decoders: {CODECS}"


@dataclass(frozen=True)
class StoredPixels:
    """How and where a file stores its pixels.

    Args:
        rows, columns: size of the matrix.
        is_signed: PixelRepresentation.
        bits_stored: how many of the 16 bits count.
        transfer_syntax_uid: the encoding.
        offset, num_bytes: position and length of the value of PixelData in the file.
    """

    rows: int
    columns: int
    is_signed: bool
    bits_stored: int
    transfer_syntax_uid: str
    offset: int
    num_bytes: int

    @property
    def is_native(self) -> bool:
        """Whether the pixels are stored without compression."""
        return self.transfer_syntax_uid in NATIVE


def require_decoder(transfer_syntax_uid: str) -> Any:
    """Return pydicom's decoder for a compressed transfer syntax.

    Raises:
        RejectedFile: NO_DECODER; its hint says what to install or do.
    """
    if transfer_syntax_uid == DEFLATED:
        # 300 KB may inflate to 300 MB, and pydicom inflates all of it to read the header.
        detail = "(deflated), which is not supported: its size is known only after inflating"
        raise _no_decoder(transfer_syntax_uid, detail, _CONVERT)
    try:
        decoder = get_decoder(transfer_syntax_uid)
    except NotImplementedError:
        detail = "; expected an uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000 syntax"
        raise _no_decoder(transfer_syntax_uid, detail, _CONVERT) from None
    if not decoder.is_available:
        detail = f"({decoder.UID.name}), whose decoder is not installed"
        raise _no_decoder(transfer_syntax_uid, detail, _INSTALL)
    return decoder


def truncated(present: int, expected: int) -> RejectedFile:
    """Make the error for incomplete pixel data."""
    detail = f"{name('PixelData')} has {max(present, 0)} bytes; expected {expected}"
    return RejectedFile("TRUNCATED", detail, COPY_AGAIN)


def undecodable(detail: str, hint: str = COPY_AGAIN) -> RejectedFile:
    """Make the error for compressed pixel data that is damaged or not what the header says."""
    return RejectedFile("DECODE_ERROR", f"{name('PixelData')} {detail}", hint)


def other_size(pixels: StoredPixels, rows: int, columns: int, components: int = 1) -> RejectedFile:
    """Make the error for a compressed image of another size than the header's."""
    return undecodable(
        f"holds a compressed image of {rows} x {columns} x {components}; expected "
        f"{pixels.rows} x {pixels.columns} x 1",
        EXPORT_AGAIN,
    )


def unsupported(transfer_syntax_uid: str, reasons: str) -> RejectedFile:
    """Make the error for pixels that no decoder here supports, though their syntax has some."""
    return _no_decoder(transfer_syntax_uid, f"; {reasons}", _CONVERT)


def _no_decoder(transfer_syntax_uid: str, detail: str, hint: str) -> RejectedFile:
    found = f"{name('TransferSyntaxUID')} is {show(transfer_syntax_uid)}"
    return RejectedFile("NO_DECODER", f"{found} {detail}".replace(" ;", ";"), hint)
