"""Downloading a published checkpoint, on request only, and checking it."""

import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from ich_keras.errors import DataError, EnvironmentProblem
from ich_keras.files import atomic_path, sha256_of
from ich_keras.models.weights_lookup import (
    converted_file,
    find_weights,
    source_of,
    weights_folder,
)
from ich_keras.progress import Progress
from weights_convert.checkpoint import MAX_BYTES
from weights_convert.conversion import convert
from weights_convert.sources import Source, source_named

CHECKPOINTS = "checkpoints"  # below the weights folder
TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 2**20
_MAX_DIGITS = 18  # of a length; Python refuses to read thousands of them
# A full disk is not among them: it is no fault of the transfer.
_TRANSFER_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    TimeoutError,
    ConnectionError,
    ssl.SSLError,
)


def require_published(source: Source, sha256: str, place: str) -> None:
    """Refuse a file whose SHA-256 is not the published one.

    Where the publisher states none (MedicalNet), every file passes.

    Args:
        source: the published weights.
        sha256: of the file, 64 hexadecimal digits.
        place: path or address of the file, for the error.

    Raises:
        DataError: the digits differ; the message names both.

    >>> from weights_convert.sources import SOURCES
    >>> require_published(SOURCES["torchvision_resnet18"], "f37072fd" + 56 * "0", "a.pth")
    >>> require_published(SOURCES["torchvision_resnet18"], 64 * "0", "a.pth")
    Traceback (most recent call last):
    ...
    ich_keras.errors.DataError: a.pth has the SHA-256 0000000000000000...; torchvision_resnet18 ...
    """
    if not sha256.startswith(source.published_sha256):
        raise DataError(
            f"{place} has the SHA-256 {sha256[:16]}...; {source.name} was published with"
            f" {source.published_sha256}...",
            "The file is damaged or is another one: remove any local copy, then fetch it again.",
        )


def fetch(
    source_name: str, folder: Path | str | None = None, progress: Progress | None = None
) -> Path:
    """Download a source's checkpoint unless it is already there.

    Args:
        source_name: a key of `SOURCES`.
        folder: where to put it; None takes `checkpoints` below the weights folder.
        progress: called as progress("downloading", bytes so far, bytes in all).

    Returns:
        The file. Its SHA-256 begins with the published digits; MedicalNet publishes none.

    Raises:
        EnvironmentProblem: no network, or the server refuses.
        DataError: the file is not the published one, or is too large.
    """
    source = source_named(source_name)
    path = Path(folder or weights_folder() / CHECKPOINTS) / source.file_name
    if path.is_file():
        require_published(source, sha256_of(path), str(path))
        return path
    digest, done = hashlib.sha256(), 0
    try:
        request = urllib.request.Request(source.url, headers={"User-Agent": "ich_keras"})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
            atomic_path(path) as temporary,
            open(temporary, "wb") as stream,
        ):
            if not response.geturl().startswith("https://"):
                raise DataError(
                    f"{source.url} redirects to {response.geturl()}, which is not https."
                )
            length = response.headers.get("Content-Length") or ""
            total = int(length) if length.isdecimal() and len(length) <= _MAX_DIGITS else 0
            while chunk := response.read(_CHUNK_BYTES):
                done += len(chunk)
                if done > MAX_BYTES:
                    raise DataError(f"{source.url} sends more than {MAX_BYTES:,} bytes; stopped.")
                digest.update(chunk)
                stream.write(chunk)
                if progress is not None:
                    progress("downloading", done, max(done, total))
            if total and done != total:
                raise EnvironmentProblem(
                    f"{source.url} broke off after {done:,} of {total:,} bytes.", "Try again."
                )
            require_published(source, digest.hexdigest(), source.url)
    except _TRANSFER_ERRORS as error:
        raise EnvironmentProblem(
            f"{source.url} could not be downloaded: {str(error) or type(error).__name__}.",
            "Download it on another machine, then run `weights-convert convert --source"
            f" {source.name} --checkpoint FILE`.",
        ) from error
    return path


def ensure_weights(name: str, preset_name: str, progress: Progress | None = None) -> Path:
    """Find converted weights by name; fetch and convert them if they are absent.

    Args:
        name: a source, or "imagenet", "kinetics", "medicalnet".
        preset_name: the network they are for.
        progress: as in `fetch`.

    Raises:
        UsageError: unknown names, or weights whose shape must be changed first.
        EnvironmentProblem, DataError: as `fetch` and `convert`.
    """
    source = source_named(source_of(name, preset_name))
    if not converted_file(source.name).is_file():
        convert(fetch(source.name, progress=progress), source.name)
    return find_weights(name, preset_name)
