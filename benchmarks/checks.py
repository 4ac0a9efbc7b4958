"""What the checks on the way from files to pixels cost, beside the work that they guard."""

import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder, get_encoder
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from benchmarks.harness import alternate
from benchmarks.records import Place, table, write_csv
from ich_keras.ct.codestream import check_codestream
from ich_keras.ct.decoder_process import decode_frame
from ich_keras.ct.decoding import decode, decoder_options
from ich_keras.ct.dicom import CTSlice, read_header, read_slice
from ich_keras.ct.encoding import StoredPixels
from ich_keras.ct.padding import Padding, find_padding, without_padding
from ich_keras.ct.pixels import stored_values
from ich_keras.ct.plausibility import judge_slice
from ich_keras.ct.series import index_folder
from ich_keras.data.cache.fill import Block, fill_block
from ich_keras.data.inputs import resize_hu
from ich_keras.data.reading import IndexedSlice, differences, indexed_slices, pixel_hash
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.progress import Tell

SIZE = 256  # of a cached slice, pixels
WHOLE = "a slice into the cache"
PADDING_BITS = 63536  # -2000 in 16 bits
COMPRESSED = {
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
    "JPEG 2000": JPEG2000Lossless,
}


@dataclass(frozen=True)
class Row:
    """The cost of one piece of work, per slice.

    Args:
        files: how the files store their pixels.
        work: what was timed.
        us_median, us_q25, us_q75: microseconds per slice over the repeats.
        percent: of the time of `WHOLE` for the same files.
        slices: number of slices.
        matrix: rows and columns of a file.
    """

    files: str
    work: str
    us_median: float
    us_q25: float
    us_q75: float
    percent: float
    slices: int
    matrix: int


def measure(
    num_series: int, matrix: int, repeats: int, path: Path, place: Place, tell: Tell
) -> None:
    """Time the checks on phantoms, uncompressed and in each compression that can be written here.

    Args:
        num_series: how many to draw.
        matrix: rows and columns of their files.
        repeats: timed passes over all slices.
        path: of the CSV.
        place: where this runs.
        tell: called with each line of the table.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_phantoms(folder / "plain", num_series, seed=1, matrix=matrix)
        plain = sorted((folder / "plain").rglob("*.dcm"))
        kinds: dict[str, Callable[[pydicom.Dataset], Any] | None] = {
            "uncompressed": None,
            "uncompressed, padding declared": _declare_padding,
        }
        for kind, syntax in COMPRESSED.items():
            if get_encoder(syntax).is_available and get_decoder(syntax).is_available:
                kinds[kind] = partial(_compress, syntax)
        for number, (kind, change) in enumerate(kinds.items()):
            place_of_kind = folder / f"kind-{number}"
            place_of_kind.mkdir()
            for file in plain:
                dataset = pydicom.dcmread(file)
                if change is not None:
                    change(dataset)
                dataset.save_as(place_of_kind / file.name)
            rows += _rows(kind, place_of_kind, matrix, repeats)
            write_csv(path, rows, place)
    shown = ("files", "work", "us_median", "percent")
    cells = [(row.files, row.work, f"{row.us_median:.0f}", f"{row.percent:.1f}") for row in rows]
    tell(table(shown, cells))


def _declare_padding(dataset: pydicom.Dataset) -> None:
    """Fill what lies outside the circle of reconstruction, as scanners do."""
    stored = np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns).copy()
    y, x = np.indices(stored.shape) - np.array(stored.shape).reshape(2, 1, 1) // 2
    stored[np.hypot(y, x) > min(stored.shape) // 2] = PADDING_BITS
    is_signed = dataset.PixelRepresentation
    value = PADDING_BITS - (1 << 16) if is_signed else PADDING_BITS
    dataset.add_new("PixelPaddingValue", "SS" if is_signed else "US", value)
    dataset.PixelData = stored.tobytes()


def _compress(syntax: str, dataset: pydicom.Dataset) -> None:
    dataset.compress(syntax, generate_instance_uid=False)


def _rows(kind: str, folder: Path, matrix: int, repeats: int) -> list[Row]:
    sources = indexed_slices(index_folder(folder))
    slices = [read_slice(source.container) for source in sources]
    shard = folder / "shard.raw"
    shard.write_bytes(bytes(2 * SIZE * SIZE))
    work = _work(sources, slices, shard)
    timings = alternate(work, repeats, steps=len(sources))
    whole = timings[WHOLE].median
    return [
        Row(
            kind,
            name,
            timing.median * 1e3,
            timing.q25 * 1e3,
            timing.q75 * 1e3,
            100 * timing.median / whole,
            len(sources),
            matrix,
        )
        for name, timing in timings.items()
    ]


def _work(
    sources: list[IndexedSlice], slices: list[CTSlice], shard: Path
) -> dict[str, Callable[[], None]]:
    """Return what is timed, each over all slices."""
    headers = [one.header for one in slices]
    raws = [_raw(source, header.pixels) for source, header in zip(sources, headers, strict=True)]
    small = [resize_hu(one.hu, SIZE) for one in slices]

    def each(function: Callable[..., Any], *columns: list) -> Callable[[], None]:
        def run() -> None:
            for values in zip(*columns, strict=True):
                function(*values)

        return run

    def cached(source: IndexedSlice) -> None:
        fill_block(Block(shard, 0, 0, (source,), SIZE))

    paths = [source.container for source in sources]
    work = {
        WHOLE: each(cached, sources),
        "reading the header": each(read_header, paths),
        "reading HU": each(read_slice, paths),
        "check: the header against the index": each(differences, headers, sources),
        "check: plausible HU": each(judge_slice, [one.hu for one in slices]),
        "check: hash of the cached pixels": each(pixel_hash, small),
        "crc32 of the cached pixels": each(zlib.crc32, [hu.data for hu in small]),
    }
    pixels = [header.pixels for header in headers]
    if headers[0].padding is not None:
        stored = [stored_values(*pair) for pair in zip(raws, pixels, strict=True)]
        columns = [[getattr(h, n) for h in headers] for n in ("padding", "slope", "intercept")]

        def pad(
            raw: bytes,
            stored: np.ndarray,
            pixels: StoredPixels,
            padding: Padding,
            slope: float,
            intercept: float,
        ) -> None:
            found = find_padding(raw, stored, pixels, padding, slope, intercept)
            if found is not None:
                without_padding(stored, found, slope, intercept)

        work["check: declared padding"] = each(pad, raws, stored, pixels, *columns)
    if not pixels[0].is_native:
        work["check: code stream"] = each(check_codestream, raws, pixels)
        work["decoding in a process of its own"] = each(decode, raws, pixels)
        decoder = get_decoder(pixels[0].transfer_syntax_uid)

        def decode_here(raw: bytes, pixels: StoredPixels) -> None:
            options = decoder_options(pixels)
            options.pop("transfer_syntax_uid")
            decode_frame(decoder, raw, options)

        work["decoding in this process"] = each(decode_here, raws, pixels)
    return work


def _raw(source: IndexedSlice, pixels: StoredPixels) -> bytes:
    content = Path(source.container).read_bytes()
    return content[pixels.offset : pixels.offset + pixels.num_bytes]
