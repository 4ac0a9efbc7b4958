"""Decoding compressed pixels in a process of its own, so that a decoder harms one file at most.

Each process that reads compressed files has one decoder process. It starts with the first such
file, takes one slice at a time, and ends with the process that started it. Its standard error is
read after every slice: whatever a decoder complains about belongs to exactly one file.

It is started as a program, not by `multiprocessing`: a script that calls `read_hu` needs no
`if __name__ == "__main__":`, and a worker process may have one, too.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from ich_keras.ct.decoder_process import FRAME, READY
from ich_keras.ct.elements import name
from ich_keras.ct.encoding import StoredPixels, other_size, undecodable, unsupported
from ich_keras.ct.rejects import COPY_AGAIN, RejectedFile
from ich_keras.errors import EnvironmentProblem

# A slice of 512 x 512 takes about 20 ms, one of 4096 x 4096 seconds.
DECODE_SECONDS = 60.0
START_SECONDS = 120.0
MAX_WORDS = 200  # characters of a decoder's words that are shown

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from ich_keras.ct.decoder_process import serve; serve()"
)


class _Died(Exception):
    """The decoder process has ended; the message says how."""


class _TookTooLong(Exception):
    """The decoder process was ended because it took too long."""


class _Answer(NamedTuple):
    """What a decoder process said: a message, stored values as bytes, words on standard error."""

    message: dict
    content: bytearray
    words: str


class _DecoderProcess:
    """A running decoder process.

    Raises:
        EnvironmentProblem: it cannot be started.
    """

    def __init__(self) -> None:
        self.num_answers = 0
        self._error_file = _scratch_file()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._error_file,
                env={**os.environ, **_ONE_THREAD},
            )
        except OSError as error:
            self._error_file.close()
            raise _cannot_start(error.strerror or type(error).__name__) from error
        try:
            with self._time_limit(START_SECONDS):
                said = b""
                while not said.endswith(READY):  # a program that starts may print something first
                    said += self._read(1)
        except (_Died, _TookTooLong) as error:
            words = self.take_words()
            self.end()
            raise _cannot_start(f"{error} {words}".strip()) from error

    def ask(self, options: dict, raw: bytes) -> _Answer:
        """Have one slice decoded.

        Args:
            options: for the decoder.
            raw: the value of PixelData.
        """
        text = json.dumps(options).encode()
        with self._time_limit(DECODE_SECONDS):
            self._write(FRAME.pack(len(text), len(raw)) + text)
            self._write(raw)
            message, content = self._read_answer()
        self.num_answers += 1
        return _Answer(message, content, self.take_words())

    def take_words(self) -> str:
        """Return what was written to standard error since the last call."""
        file = self._error_file.fileno()
        if not os.fstat(file).st_size:
            return ""
        os.lseek(file, 0, os.SEEK_SET)
        text = os.read(file, 1 << 16)
        # Both processes share the position in the file.
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        return text.decode("utf-8", "replace")

    def end(self) -> None:
        """End the process; it may be dead already."""
        self._process.kill()
        self._process.wait()
        self._close()

    def abandon(self) -> None:
        """Let go of a process that belongs to the process from which this one was forked."""
        self._process.returncode = 0  # it is not a child of this process: nothing to wait for
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._error_file):
            if stream is not None:
                stream.close()

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        assert self._process.stdin is not None  # it is a pipe
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError:
            raise _Died(self._death()) from None

    def _read_answer(self) -> tuple[dict, bytearray]:
        text_length, content_length = FRAME.unpack(self._read(FRAME.size))
        return json.loads(self._read(text_length)), self._read(content_length)

    def _read(self, length: int) -> bytearray:
        content = bytearray(length)
        view = memoryview(content)
        assert self._process.stdout is not None  # it is a pipe
        while view:
            count = self._process.stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise _Died(self._death())
            view = view[count:]
        return content

    def _death(self) -> str:
        """Say how the process ended, once its pipes are closed."""
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        known = {int(one): one.name for one in signal.Signals}
        return f"died of signal {known.get(-code, -code)}"

    @contextlib.contextmanager
    def _time_limit(self, seconds: float) -> Iterator[None]:
        """End the process, and raise _TookTooLong, if the block takes longer."""
        is_over = threading.Event()

        def expire() -> None:
            is_over.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except _Died:
            if is_over.is_set():
                raise _TookTooLong(f"took over {seconds:g} seconds") from None
            raise
        finally:
            timer.cancel()
            timer.join()


_running: list[_DecoderProcess] = []  # one at most
_lock = threading.Lock()


def decode(raw: bytes, pixels: StoredPixels) -> np.ndarray:
    """Decode a slice in the decoder process.

    Args:
        raw: the value of PixelData, checked by `ich_keras.ct.codestream.check_codestream`.
        pixels: how it is stored.

    Returns:
        int16 or uint16 (rows, columns), stored values.

    Raises:
        RejectedFile: DECODE_ERROR (the decoder failed, or complained), DECODER_CRASH, TIMEOUT, or
            NO_DECODER (such as lossy JPEG of 12 bits, for which pydicom's usual decoders have no
            support, and which shows in their answer alone).
        EnvironmentProblem: the decoder process cannot be started.
    """
    with _lock:
        message, content, words = _ask(decoder_options(pixels), raw)
    if "error" in message:
        # A heading, then what each decoder says.
        reasons = message["error"].splitlines()[1:]
        if reasons and all("does not support" in reason for reason in reasons):
            raise unsupported(pixels.transfer_syntax_uid, _one_line(*reasons, words))
        raise undecodable(f"cannot be decoded: {_one_line(message['error'], words)}")
    said = _one_line(*message["complaints"], words)
    if said:
        raise undecodable(f"is damaged; the decoder says: {said}")
    stored = np.frombuffer(content, "<i2" if pixels.is_signed else "<u2")
    if message["shape"] != [pixels.rows, pixels.columns]:
        raise other_size(pixels, *message["shape"][:2])
    return stored.astype(stored.dtype.newbyteorder("="), copy=False).reshape(message["shape"])


def decoder_options(pixels: StoredPixels) -> dict:
    """Return what pydicom's decoders must know of a frame, by their names for it."""
    return {
        "transfer_syntax_uid": pixels.transfer_syntax_uid,
        "rows": pixels.rows,
        "columns": pixels.columns,
        "bits_stored": pixels.bits_stored,
        "pixel_representation": int(pixels.is_signed),
    }


def end_decoder() -> None:
    """End this process's decoder process, if any; the next compressed file starts another."""
    while _running:
        _running.pop().end()


def _ask(options: dict, raw: bytes) -> _Answer:
    while True:
        if not _running:
            _running.append(_DecoderProcess())
        process = _running[0]
        # Whatever else happens, Ctrl-C say: an answer that nobody read must not be the next one's.
        with contextlib.ExitStack() as stack:
            stack.callback(end_decoder)
            try:
                answer = process.ask(options, raw)
            except _TookTooLong as error:
                raise _lost("TIMEOUT", str(error), process) from error
            except _Died as error:
                # If it decoded other files before, one of those may have damaged its memory.
                if not process.num_answers:
                    raise _lost("DECODER_CRASH", str(error), process) from error
            else:
                stack.pop_all()
                return answer


def _lost(code: str, how: str, process: _DecoderProcess) -> RejectedFile:
    said = _one_line(process.take_words())
    detail = f"{name('PixelData')}: the decoder {how}{': ' if said else ''}{said}"
    return RejectedFile(code, detail, COPY_AGAIN)


def _one_line(*words: str) -> str:
    """Join a decoder's words for a message: one line, printable, short."""
    text = " ".join(" ".join(words).split())
    short = text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]}..."
    return ascii(short)[1:-1] if short else ""


def _scratch_file() -> IO[bytes]:
    """Open a nameless file, in memory where possible: a full disk must not swallow complaints."""
    if hasattr(os, "memfd_create"):  # Linux
        return os.fdopen(os.memfd_create("decoder"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _cannot_start(reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the process that decodes compressed pixels could not be started ({_one_line(reason)}).",
        "Is memory short? `ich doctor` says what is installed.",
    )


def _forget() -> None:
    """In a forked process: the decoder process is the parent's."""
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    while _running:
        _running.pop().abandon()


atexit.register(end_decoder)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
