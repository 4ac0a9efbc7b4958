"""Compressed pixels: damage seen in their bytes, and decoders that fail."""

import dataclasses
import io
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_decoder, get_encoder
from pydicom.uid import (
    HTJ2K,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from tiny_dicom import encapsulated_file, head_hu, tiny_dataset, tiny_file, to_bytes

from ich_keras.ct import decoding
from ich_keras.ct.codestream import check_codestream
from ich_keras.ct.dicom import read_hu
from ich_keras.ct.encoding import StoredPixels
from ich_keras.ct.rejects import REJECT_CODES, RejectedFile
from ich_keras.errors import EnvironmentProblem

ROOT = Path(__file__).parents[1]


def refused(content):
    with pytest.raises(RejectedFile) as caught:
        read_hu(io.BytesIO(content))
    assert "\n" not in str(caught.value)
    return caught.value


# --- A decoder that fails -------------------------------------------------------------------

# A stored value in the first pixel makes pydicom's own RLE decoder misbehave, in the decoder
# process only: Python imports this file when it starts.
FAULTS = """
import ctypes, os, signal, sys, time, warnings
import pydicom.pixels.decoders.rle as rle

decode, count = rle._rle_decode_frame, 0

def faulty(*args):
    global count
    count += 1
    frame = decode(*args)
    fault = frame[0] + 256 * frame[1]
    if fault == 2001: os.abort()
    if fault == 2002: ctypes.string_at(0)
    if fault == 2003: os._exit(3)
    if fault == 2004: time.sleep(3600)
    if fault == 2005: os.write(2, b"Corrupt JPEG data: \\x1b[31mpremature\\nend\\n" + b"x" * 5000)
    if fault == 2006: os.write(1, b"a decoder prints\\n")
    if fault == 2007: bytearray(8 << 30)
    if fault == 2008 and count > 1: os.abort()
    if fault == 2009: warnings.warn("the image is incomplete")
    if fault == 2010: os.write(2, b"y" * (3 << 20))
    return frame

rle._rle_decode_frame = faulty
"""


def rle_file(first=1064, **tags):
    stored = np.full((16, 16), 1064)
    stored[0, 0] = first
    return tiny_file(stored, compress=RLELossless, PixelRepresentation=0, **tags)


@pytest.fixture
def fresh_decoder():
    """The test has a decoder process of its own."""
    decoding.end_decoder()
    yield
    decoding.end_decoder()


@pytest.fixture
def faulty_decoder(fresh_decoder, tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))


def pid_of_decoder():
    (process,) = decoding._running
    return process._process.pid


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (2001, "DECODER_CRASH", "the decoder died of signal SIGABRT"),
        (2002, "DECODER_CRASH", "the decoder died of signal SIGSEGV"),
        (2003, "DECODER_CRASH", "the decoder ended with exit code 3"),
        (2005, "DECODE_ERROR", r"says: Corrupt JPEG data: \x1b[31mpremature end xxx"),
        (2007, "DECODE_ERROR", "cannot be decoded"),
        (2009, "DECODE_ERROR", "the decoder says: the image is incomplete"),
        (2010, "DECODE_ERROR", "the decoder says: yyy"),
    ],
)
def test_a_faulty_decoder_takes_down_one_file(faulty_decoder, fault, code, message):
    expected = np.full((16, 16), 40)
    np.testing.assert_array_equal(read_hu(io.BytesIO(rle_file())), expected)
    error = refused(rle_file(fault))
    assert error.code == code
    assert message in error.detail
    assert len(error.detail) < 400
    assert error.detail.isascii() and error.detail.isprintable()
    np.testing.assert_array_equal(read_hu(io.BytesIO(rle_file())), expected)


def test_a_decoder_that_hangs_is_ended(faulty_decoder, monkeypatch):
    read_hu(io.BytesIO(rle_file()))
    before = pid_of_decoder()
    monkeypatch.setattr(decoding, "DECODE_SECONDS", 0.5)
    start = time.monotonic()
    error = refused(rle_file(2004))
    assert time.monotonic() - start < 5
    assert error.code == "TIMEOUT"
    assert "the decoder took over 0.5 seconds" in error.detail
    monkeypatch.undo()
    assert read_hu(io.BytesIO(rle_file())).shape == (16, 16)
    assert pid_of_decoder() != before


def test_what_a_decoder_prints_is_not_an_answer(faulty_decoder):
    # It counts as a complaint: good decoders print nothing.
    assert "the decoder says: a decoder prints" in refused(rle_file(2006)).detail


def test_a_crash_that_an_earlier_file_may_have_caused_is_tried_again(faulty_decoder):
    read_hu(io.BytesIO(rle_file()))
    before = pid_of_decoder()
    assert read_hu(io.BytesIO(rle_file(2008)))[0, 0] == 2008 - 1024
    assert pid_of_decoder() != before


def test_one_process_decodes_all_and_only_compressed_files(fresh_decoder):
    read_hu(io.BytesIO(tiny_file()))
    assert decoding._running == []
    read_hu(io.BytesIO(rle_file()))
    first = pid_of_decoder()
    read_hu(io.BytesIO(rle_file()))
    assert pid_of_decoder() == first != os.getpid()
    decoding.end_decoder()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_after_ctrl_c_the_next_answer_is_not_the_last_one(monkeypatch):
    read_hu(io.BytesIO(rle_file()))

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding._DecoderProcess, "_read_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_hu(io.BytesIO(rle_file(1000)))
    monkeypatch.undo()
    assert read_hu(io.BytesIO(rle_file(1100)))[0, 0] == 76


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/false"])
def test_no_process_to_decode_in(fresh_decoder, monkeypatch, program):
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(EnvironmentProblem, match="decodes compressed pixels could not be started"):
        read_hu(io.BytesIO(rle_file()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 and later
def test_a_forked_process_starts_its_own(fresh_decoder):
    read_hu(io.BytesIO(rle_file()))
    ours = pid_of_decoder()
    child = os.fork()
    if child == 0:  # no pytest in here
        theirs = int(read_hu(io.BytesIO(rle_file()))[0, 0]) == 40 and pid_of_decoder()
        os._exit(0 if theirs and theirs != ours else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_hu(io.BytesIO(rle_file()))[0, 0] == 40
    assert pid_of_decoder() == ours


SCRIPT = """
import os, signal, sys
from ich_keras.ct import decoding
from ich_keras.ct.codestream import check_codestream
from ich_keras.ct.dicom import read_hu
from ich_keras.ct.encoding import StoredPixels
print(read_hu(sys.argv[1])[0, 0], decoding._running[0]._process.pid, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "at its end"])
def test_it_ends_with_a_script_that_has_no_main_guard(tmp_path, end):
    (tmp_path / "a.dcm").write_bytes(rle_file())
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", "a.dcm", end],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    assert done.stderr == ""
    value, pid = map(int, done.stdout.split())
    assert value == 40
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


CACHE = """
import sys
from ich_keras import prediction_reading
from ich_keras.ct import decoding
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.reading import indexed_slices
decoding.DECODE_SECONDS = 3.0  # in worker processes as well, which import this file
if __name__ == "__main__":
    workers = int(sys.argv[1])
    index = index_folder("files", workers=workers)
    build_cache(index, f"cache{workers}", 16, workers=workers)
    cache = CTCache.open(f"cache{workers}")
    names = [(path[-5:], code) for path, code in cache.rejects[["path", "code"]].to_numpy()]
    print(sorted(names), sorted(path[-5:] for path in cache.slices["container"]))
    sources = indexed_slices(index)
    with prediction_reading.series_reading(16, 2, len(sources), workers) as read:
        for hu, hashes, rejects, _ in read([sources, sources]):
            names = [(reject.path[-5:], reject.code) for reject in rejects]
            print(sorted(names), [s.container[-5:] for s, one in zip(sources, hashes) if one])
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_and_prediction_go_around_files_that_a_decoder_does_not_survive(
    faulty_decoder, tmp_path, workers
):
    (tmp_path / "files").mkdir()
    faults = {"a": 1064, "b": 2001, "c": 1064, "d": 2002, "e": 2005, "f": 1064, "g": 2004}
    for place, (name, first) in enumerate(faults.items()):
        content = rle_file(first, SOPInstanceUID=f"1.2.{place}", ImagePositionPatient=[0, 0, place])
        (tmp_path / "files" / f"{name}.dcm").write_bytes(content)
    (tmp_path / "script.py").write_text(CACHE)
    done = subprocess.run(
        [sys.executable, "script.py", str(workers)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rejects = [
        *(("b.dcm", "DECODER_CRASH"), ("d.dcm", "DECODER_CRASH")),
        *(("e.dcm", "DECODE_ERROR"), ("g.dcm", "TIMEOUT")),
    ]
    expected = f"{rejects} {['a.dcm', 'c.dcm', 'f.dcm']}"
    # The cache, and two series as they are predicted.
    assert done.stdout.splitlines() == [expected] * 3
    assert done.stderr == ""  # what decoders say is in the reject, not on the terminal


# --- Damage -----------------------------------------------------------------------------------

SYNTAXES = {
    "RLE": RLELossless,
    "JPEG lossless": JPEGLosslessSV1,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
    "HTJ2K": HTJ2KLossless,
    "HTJ2K lossy": HTJ2K,
}
SIDE = 256
# A head of 128 x 128 and its codestreams, written once by imagecodecs 2026.3.6 (OpenJPH and
# libjpeg-turbo): no package of the test extra writes them.
GOLDEN = Path(__file__).parent / "golden" / "codestreams.npz"
WITH_END_MARKER = [name for name in SYNTAXES if name != "RLE"]
GOLDEN_NAMES = {"HTJ2K": "htj2k_lossless", "HTJ2K lossy": "htj2k_lossy"}


def compressed(name):
    """Return the codestream of a noisy head, and its stored values."""
    if name in GOLDEN_NAMES:
        if not get_decoder(SYNTAXES[name]).is_available:
            pytest.skip("the codecs extra is not installed; CI runs this file with it, too")
        return golden(GOLDEN_NAMES[name])
    syntax = SYNTAXES[name]
    # highdicom and Matplotlib, of the test extra, bring decoders without encoders.
    writes = {"JPEG lossless": jpeg_lossless, "JPEG 2000": jpeg_2000}.get(name)
    needed = get_encoder(syntax) if writes is None else get_decoder(syntax)
    if not needed.is_available:
        pytest.skip("the codecs extra is not installed; CI runs this file with it, too")
    stored = head_hu(SIDE) + 1024
    if writes is not None:
        return writes(stored), stored
    dataset = tiny_dataset(stored, PixelRepresentation=0, BitsStored=12)
    to_bytes(dataset, compress=syntax)
    return next(generate_frames(dataset.PixelData, number_of_frames=1)), stored


def golden(key):
    with np.load(GOLDEN) as arrays:
        return arrays[key].tobytes(), arrays["stored"].astype(int)


def jpeg_lossless(stored):
    """Code an image by the left neighbour (10918-1 annex H), with five bits for each category."""
    before = np.zeros_like(stored)
    before[:, 1:] = stored[:, :-1]
    before[1:, 0] = stored[:-1, 0]
    before[0, 0] = 1 << 15
    bits = []
    for difference in (stored - before).ravel().tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:05b}")
        if category:
            value = difference if difference > 0 else difference + (1 << category) - 1
            bits.append(f"{value:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    rows, columns = stored.shape
    frame = struct.pack(">BBHBHHBBBB", 0xFF, 0xC3, 11, 16, rows, columns, 1, 1, 0x11, 0)
    lengths = bytes([0, 0, 0, 0, 17, *[0] * 11])
    table = struct.pack(">BBHB", 0xFF, 0xC4, 2 + 1 + 16 + 17, 0) + lengths + bytes(range(17))
    scan = struct.pack(">BBHBBBBBB", 0xFF, 0xDA, 8, 1, 1, 0, 1, 0, 0)
    return b"\xff\xd8" + frame + table + scan + coded + b"\xff\xd9"


def jpeg_2000(stored, boxed=False):
    """Code an image without loss, by OpenJPEG inside of Pillow; boxed as in a .jp2 file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(stored.astype(np.uint16)).save(buffer, "JPEG2000", no_jp2=not boxed)
    return buffer.getvalue()


def file_of(name, stream, fragments=1):
    tags = {"PixelRepresentation": 0, "BitsStored": 12}
    side = SIDE // 2 if name in GOLDEN_NAMES else SIDE
    return encapsulated_file(stream, SYNTAXES[name], side, fragments, **tags)


def assert_decoded(hu, stored, name):
    np.testing.assert_allclose(hu, stored - 1024, atol=name == "HTJ2K lossy")


@pytest.mark.parametrize("name", SYNTAXES)
def test_good_streams_are_read_in_one_fragment_and_in_several(name):
    stream, stored = compressed(name)
    for fragments in (1, 3):
        hu = read_hu(io.BytesIO(file_of(name, stream, fragments)))
        assert_decoded(hu, stored, name)


@pytest.mark.parametrize("name", ["JPEG lossless", "JPEG 2000", *GOLDEN_NAMES])
def test_good_streams_pass_the_checks_that_need_no_decoder(name):
    if name in GOLDEN_NAMES:
        stream, stored = golden(GOLDEN_NAMES[name])
    else:
        stored = head_hu(SIDE) + 1024
        stream = {"JPEG lossless": jpeg_lossless, "JPEG 2000": jpeg_2000}[name](stored)
    rows, columns = stored.shape
    for fragments in (1, 3):
        raw = encapsulate([stream], fragments_per_frame=fragments)
        pixels = StoredPixels(rows, columns, False, 12, SYNTAXES[name], 0, len(raw))
        check_codestream(raw, pixels)
        larger = dataclasses.replace(pixels, rows=rows + 1)
        with pytest.raises(RejectedFile, match=f"{rows} x {columns} x 1; expected {rows + 1} x"):
            check_codestream(raw, larger)


@pytest.mark.parametrize("name", WITH_END_MARKER)
def test_padding_behind_the_end_marker_is_no_damage(name):
    stream, stored = compressed(name)
    stream = stream.rstrip(b"\0")
    for padding in (b"\0", bytes(10), b"\xff\xff", b"\x20"):
        hu = read_hu(io.BytesIO(file_of(name, stream + padding)))
        assert_decoded(hu, stored, name)


@pytest.mark.parametrize("name", [*WITH_END_MARKER, "JPEG 2000 in a box"])
def test_the_end_marker_alone_is_missed(name):
    """Two bytes: the decoders give a whole image without them."""
    name, is_boxed = name.removesuffix(" in a box"), name.endswith("in a box")
    stream, stored = compressed(name)
    stream = jpeg_2000(stored, boxed=True) if is_boxed else stream.rstrip(b"\0")
    assert stream.endswith(b"\xff\xd9")
    hu = read_hu(io.BytesIO(file_of(name, stream)))
    assert_decoded(hu, stored, name)
    ends = (b"\0\0", b"\xff\0", b"\0\xd9", b"\xff\xff", bytes(100))
    short = [stream[:-count] for count in (1, 2, 3, 100)]
    for damaged in [*short, *(stream[:-2] + end for end in ends)]:
        error = refused(file_of(name, damaged))
        assert error.code == "DECODE_ERROR"
        assert "end marker (ff d9)" in error.detail, damaged[-4:]


@pytest.mark.parametrize("name", SYNTAXES)
@pytest.mark.parametrize("damage", ["zero tail", "cut", "zero block", "lost block", "noise block"])
def test_a_lost_tail_or_block_is_refused_wherever_it_is(name, damage):
    stream, _ = compressed(name)
    stream = stream.rstrip(b"\0") if name != "RLE" else stream
    noise = random.Random(3).randbytes(4096)
    block = min(4096, len(stream) // 8)
    for place in range(1000, len(stream) - block - 2, block):
        rest = stream[place + block :]
        damaged = {
            "zero tail": stream[:place] + bytes(len(stream) - place),
            "cut": stream[:place],
            "zero block": stream[:place] + bytes(block) + rest,
            "lost block": stream[:place] + rest,
            "noise block": stream[:place] + noise[:block] + rest,
        }[damage]
        assert refused(file_of(name, damaged)).code == "DECODE_ERROR", place


# Headers of an image of 64 x 64 in JPEG Lossless and JPEG-LS, up to their coded data.
HEADERS = {
    name: b"\xff\xd8"
    + struct.pack(">BBHBHHBBBB", 0xFF, frame, 11, 16, 64, 64, 1, 1, 0x11, 0)
    + struct.pack(">BBHBBBBBB", 0xFF, 0xDA, 8, 1, 1, 0, 0, 0, 0)
    for name, frame in (("JPEG lossless", 0xC3), ("JPEG-LS", 0xF7))
}


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("JPEG lossless", b"\xff\x00", b"\xff\x01", "the coder never writes ff 01"),
        ("JPEG lossless", b"\xff\xd7", b"\xff\xd8", "the coder never writes ff d8"),
        ("JPEG-LS", b"\xff\x7f", b"\xff\x80", "the coder never writes ff 80"),
        ("JPEG-LS", bytes(255), bytes(256), "over 256 zeros from compressed byte 125 of"),
    ],
)
def test_what_no_coder_writes_is_seen_before_a_decoder_is_asked(name, good, bad, message):
    pixels = StoredPixels(64, 64, False, 12, SYNTAXES[name], 0, 0)
    before, after = b"\x11" * 100, b"\x22" * 100

    def check(coded):
        stream = HEADERS[name] + before + coded + after + b"\xff\xd9"
        check_codestream(encapsulate([stream]), pixels)

    check(good)
    with pytest.raises(RejectedFile, match=message) as caught:
        check(bad)
    assert caught.value.code == "DECODE_ERROR"


@pytest.mark.parametrize("name", HEADERS)
def test_the_end_marker_is_missed_before_a_decoder_is_asked(name):
    pixels = StoredPixels(64, 64, False, 12, SYNTAXES[name], 0, 0)
    whole = HEADERS[name] + b"\x11" * 100 + b"\xff\xd9"
    check_codestream(encapsulate([whole]), pixels)
    for count in (1, 2, 50):
        with pytest.raises(RejectedFile, match=r"without an end marker \(ff d9\)"):
            check_codestream(encapsulate([whole[:-count]]), pixels)


@pytest.mark.parametrize("name", SYNTAXES)
def test_broken_bytes_of_a_stream_are_read_or_refused(name):
    stream, stored = compressed(name)
    rng = random.Random(4)
    refusals = 0
    for _ in range(100):
        broken = bytearray(stream)
        for _ in range(rng.randint(1, 8)):
            # The headers, too, which are the first few hundred bytes.
            place = rng.randrange(len(broken) if rng.random() < 0.5 else 300)
            broken[place] = rng.choice((0, 255, rng.randrange(256)))
        try:
            hu = read_hu(io.BytesIO(file_of(name, bytes(broken))))
        except RejectedFile as error:
            assert error.code in REJECT_CODES
            refusals += 1
        else:
            assert hu.dtype == np.int16 and hu.shape == stored.shape
    assert refusals > 20


def test_lossy_jpeg_of_12_bits_is_refused_whole_and_damaged():
    # No decoder with a permissive licence reads it; one that a user adds is asked.
    stream, _ = golden("jpeg_12")
    tags = {"PixelRepresentation": 0, "BitsStored": 12}

    def error_of(codestream):
        return refused(encapsulated_file(codestream, JPEGExtended12Bit, SIDE // 2, **tags))

    whole = error_of(stream)
    assert whole.code == "NO_DECODER"
    assert "dcmconv" in whole.hint
    third = len(stream) // 3
    for damaged in (
        stream[: 2 * third],
        stream[: 2 * third] + bytes(third),
        stream[:third] + b"\xff\x40" + stream[third + 2 :],
    ):
        assert error_of(damaged).code == "DECODE_ERROR"


def test_lossy_jpeg_of_8_bits_holds_no_hounsfield_units():
    stream, _ = golden("jpeg_8")
    tags = {"PixelRepresentation": 0, "BitsAllocated": 8, "BitsStored": 8}
    error = refused(encapsulated_file(stream, JPEGBaseline8Bit, SIDE // 2, **tags))
    assert error.code == "UNSUPPORTED_PIXELS"
    assert "BitsAllocated is 8; expected 16" in error.detail
