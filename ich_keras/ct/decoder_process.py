"""The process that decodes compressed pixels; `ich_keras.ct.decoding` starts it and asks it.

Decoders are C and C++ code that is fed bytes from strangers: they may abort, hang, or write
complaints to standard error. Here none of that touches the process that reads files.

Messages go over standard input and output: `FRAME` (two lengths), JSON, and bytes. A question
holds the options of the decoder and the value of PixelData; an answer an `error`, or the stored
values with `complaints`.
"""

import json
import os
import re
import signal
import struct
import sys
import warnings
from typing import Any

FRAME = struct.Struct("<II")
READY = b"ich_keras decoder is ready\n"
MEMORY_BYTES = 2 << 30  # on top of what the process uses when it starts
MAX_COMPLAINT_BYTES = 1 << 20
# A decoder that hangs ends by itself if its parent, which would have ended it, was killed.
ORPHAN_SECONDS = 600

# A warning of pydicom that says nothing about the pixels.
_HARMLESS = re.compile("The number of bytes of compressed pixel data matches")
# A segment that is one or two bytes too long was padded before coding, against the standard.
_RLE_EXCESS = re.compile(r"contains non-conformant padding - (\d+) vs. (\d+) bytes expected")
_MAX_RLE_EXCESS = 2


def serve() -> None:
    """Say that the process is ready, and answer questions until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a decoder that prints must not write into an answer
    from pydicom.pixels import get_decoder

    _limit_resources()
    answers.write(READY)
    answers.flush()
    while len(lengths := questions.read(FRAME.size)) == FRAME.size:
        text_length, raw_length = FRAME.unpack(lengths)
        options = json.loads(questions.read(text_length))
        raw = questions.read(raw_length)
        _set_alarm(ORPHAN_SECONDS)
        decoder = get_decoder(options.pop("transfer_syntax_uid"))
        content, answer = decode_frame(decoder, raw, options)
        text = json.dumps(answer).encode()
        answers.write(FRAME.pack(len(text), len(content)) + text + content)
        answers.flush()
        _set_alarm(0)


def decode_frame(decoder: Any, raw: bytes, options: dict) -> tuple[bytes, dict]:
    """Decode one frame.

    Args:
        decoder: pydicom's.
        raw: the value of PixelData.
        options: `decoding.decoder_options`, without the transfer syntax.

    Returns:
        Stored values as little-endian bytes, b"" if it failed; and {"shape": ..., "complaints":
        [...]} or {"error": ...}.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            stored, _ = decoder.as_array(
                raw,
                index=0,
                raw=True,
                samples_per_pixel=1,
                number_of_frames=1,
                bits_allocated=16,
                photometric_interpretation="MONOCHROME2",
                pixel_keyword="PixelData",
                **options,
            )
        except MemoryError:
            return b"", {"error": f"it needs over {MEMORY_BYTES >> 30} GiB of memory"}
        except (RuntimeError, ValueError) as error:
            # pydicom wraps whatever a plugin raises in RuntimeError. It raises ValueError itself,
            # for fragments and sizes that do not fit.
            return b"", {"error": str(error)}
    messages = [str(warning.message) for warning in caught]
    kind = "<i2" if options["pixel_representation"] else "<u2"
    return stored.astype(kind, copy=False).tobytes(), {
        "shape": stored.shape,
        "complaints": [message for message in messages if _is_complaint(message)],
    }


def _is_complaint(message: str) -> bool:
    """Return whether a warning means that pixels are damaged."""
    excess = _RLE_EXCESS.search(message)
    if excess:
        found, expected = map(int, excess.groups())
        return found > expected + _MAX_RLE_EXCESS
    return not _HARMLESS.match(message)


def _set_alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):  # not on Windows
        signal.alarm(seconds)


def _limit_resources() -> None:
    """Bound memory and the length of complaints; let no crash write memory to a disk."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: MAX_COMPLAINT_BYTES}
    if sys.platform == "linux":
        with open("/proc/self/statm") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + MEMORY_BYTES
    for kind, limit in limits.items():
        _, most = resource.getrlimit(kind)
        if most == resource.RLIM_INFINITY or limit <= most:
            resource.setrlimit(kind, (limit, most))
