"""Writing phantoms as files like those of the RSNA 2019 data set.

```text
OUT/images/ID_<9 hex>.dcm    one slice each, in no meaningful order
OUT/stage_2_train.csv        ID,Label: six rows per image
OUT/masks/ID_<10 hex>.npz    per series: sop_instance_uid (slices,), masks (slices, rows, columns)
OUT/phantoms.json            what was drawn
```

The tags are those that remained in that set after de-identification, including the identifiers:
`ID_...` is not a valid UID (DICOM PS3.5 section 9.1), and readers must accept it. There is no
InstanceNumber, SliceThickness, GantryDetectorTilt or PixelPaddingValue.
"""

import io
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from pydicom import config
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, UID, CTImageStorage, ExplicitVRLittleEndian

from ich_keras.disk import full_disk_told, require_free
from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.files import replace, require_absent, write_json
from ich_keras.labels import LABELS
from ich_keras.leftovers import partial_of, remove_leftovers
from ich_keras.phantom.plan import (
    ENCODINGS,
    MASK_BITS,
    MIN_AREA_MM2,
    Encoding,
    Phantom,
    PhantomSpec,
    make_phantom,
    plan_phantoms,
)
from ich_keras.processes import process_pool
from ich_keras.progress import Progress

# No RSNA patient has this prefix: theirs are ID_<hex>.
PATIENT_PREFIX = "PHANTOM_"
IMAGES, MASKS, LABELS_CSV, MANIFEST = "images", "masks", "stage_2_train.csv", "phantoms.json"
BLEED_ML = "bleed_ml"  # in the manifest, and a column of the series table of phantoms
# Odd, so that multiplying by it modulo a power of two maps every number to another one.
_MIXER = 0x9E3779B97F4A7C15
_MAX_SLICES = 4096  # of a series; keeps the numbers of slices of different series apart


def hex_identifier(number: int, seed: int, digits: int) -> str:
    """Return `ID_<digits hex>`: looks random, is the same for the same seed, never occurs twice.

    Args:
        number: 0 to 16**digits - 1; every number has its own identifier.
        seed: of the data set.
        digits: hexadecimal digits.
    """
    space = 16**digits
    # Halves are swapped between two multiplications: low and high bits affect each other.
    mixed = (number * _MIXER + seed * 0xD1B54A32D192ED03) % space
    half = digits * 2
    mixed = (mixed >> half) | (mixed << (digits * 4 - half)) % space
    return f"ID_{mixed * _MIXER % space:0{digits}x}"


def patient_id(spec: PhantomSpec) -> str:
    """Return the PatientID of a phantom; its prefix marks it as synthetic in every table."""
    return PATIENT_PREFIX + hex_identifier(spec.patient, spec.seed, 8).removeprefix("ID_")


def is_synthetic(slices: pd.DataFrame) -> bool:
    """Return whether any slice comes from a phantom: such data support no clinical claim.

    Args:
        slices: with the column patient_id; a table of series will do.
    """
    return bool(slices["patient_id"].str.startswith(PATIENT_PREFIX).any())


def sop_instance_uids(spec: PhantomSpec, num_slices: int) -> list[str]:
    """Return the identifiers of a series' slices, inferior to superior."""
    if num_slices > _MAX_SLICES:
        raise UsageError(
            f"series {spec.series} has {num_slices} slices; expected at most {_MAX_SLICES}.",
            "Choose a wider slice spacing.",
        )
    first = spec.series * _MAX_SLICES
    return [hex_identifier(first + index, spec.seed, 9) for index in range(num_slices)]


def encode_pixels(hu: np.ndarray, encoding: Encoding) -> bytes:
    """Return pixel data of 16 bits allocated, little endian.

    Args:
        hu: int16 (rows, columns), HU, within the encoding's range.
        encoding: how to store it; values below zero wrap around where it is unsigned and its
            intercept too high for air.
    """
    stored = hu.astype(np.int32) - encoding.intercept
    if not encoding.is_signed:
        stored %= 1 << encoding.bits_stored
    return stored.astype("<i2" if encoding.is_signed else "<u2").tobytes()


def phantom_dataset(phantom: Phantom, index: int, sop_instance_uid: str) -> Dataset:
    """Return the DICOM object of one slice.

    Args:
        phantom: the series.
        index: of the slice, 0 is the most inferior.
        sop_instance_uid: its identifier.
    """
    spec, scan = phantom.spec, phantom.scan
    encoding = ENCODINGS[spec.encoding]
    dataset = Dataset()
    if spec.series % 2:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SOPClassUID = CTImageStorage
    dataset.add(_identifier("SOPInstanceUID", sop_instance_uid))
    dataset.Modality = "CT"
    dataset.PatientID = patient_id(spec)
    dataset.add(_identifier("StudyInstanceUID", hex_identifier(spec.series, spec.seed + 1, 10)))
    dataset.add(_identifier("SeriesInstanceUID", hex_identifier(spec.series, spec.seed, 10)))
    dataset.StudyID = ""
    dataset.ImagePositionPatient = [f"{value:.6f}" for value in scan.origin[index]]
    dataset.ImageOrientationPatient = [f"{value:.6f}" for value in scan.orientation.ravel()]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = spec.matrix
    dataset.PixelSpacing = [f"{scan.pixel_mm:.6f}"] * 2
    dataset.BitsAllocated = 16
    dataset.BitsStored = encoding.bits_stored
    dataset.HighBit = encoding.bits_stored - 1
    dataset.PixelRepresentation = int(encoding.is_signed)
    is_repeated = encoding.bits_stored == 12 and not encoding.is_signed
    dataset.WindowCenter = ["00040", "00040"] if is_repeated else "30"
    dataset.WindowWidth = ["00080", "00080"] if is_repeated else "80"
    dataset.RescaleIntercept = str(encoding.intercept)
    dataset.RescaleSlope = "1"
    dataset.PixelData = encode_pixels(phantom.hu[index], encoding)
    dataset["PixelData"].VR = "OW"
    dataset.preamble = bytes(128)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.FileMetaInformationGroupLength = 0  # pydicom fills it in
    dataset.file_meta.FileMetaInformationVersion = b"\x00\x01"
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    # The file's own header kept a valid UID (PS3.5 annex B.2: 2.25 and a decimal number).
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"2.25.{int(sop_instance_uid[3:], 16)}")
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    return dataset


def _identifier(keyword: str, text: str) -> DataElement:
    # pydicom refuses to write invalid UIDs unless validation is off for the element.
    return DataElement(keyword, "UI", text, validation_mode=config.IGNORE)


def dicom_bytes(dataset: Dataset) -> bytes:
    """Return the file of a DICOM object."""
    stream = io.BytesIO()
    # Enforcing the format would copy the invalid UID into the file's own header.
    dcmwrite(stream, dataset, enforce_file_format=False)
    return stream.getvalue()


def write_phantoms(
    out: Path | str,
    num_series: int,
    seed: int,
    matrix: int = 512,
    workers: int = 0,
    progress: Progress | None = None,
    prevalence: float | None = None,
    slice_spacing_mm: tuple[float, float] = (5.0, 8.0),
    mix: str = "even",
    series_per_patient: float = 1.3,
) -> Path:
    """Write a synthetic data set; the same arguments give the same bytes on the same processor.

    On another processor numpy rounds some functions differently: with AVX2 switched off, 49 of 36
    million cached pixels differed by 1 HU, and no label did.

    Args:
        out: a folder that is absent or empty; it appears only when all files are written.
        num_series: how many series.
        seed: of the data set, 0 or more.
        matrix: rows and columns of a slice.
        workers: processes; 0 draws in this one. The result does not depend on it.
        progress: called with ("drawing phantoms", done, total) in series.
        prevalence, slice_spacing_mm, mix, series_per_patient: see `plan_phantoms`.

    Returns:
        The folder.

    Raises:
        UsageError: the folder is not empty, or an argument is out of range.
        EnvironmentProblem: the disk is too full, or a worker process died.
    """
    out = require_absent(out).resolve()
    if workers < 0:
        raise UsageError(f"{workers} workers asked for; expected 0 or more.")
    specs = plan_phantoms(
        num_series, seed, matrix, prevalence, slice_spacing_mm, mix, series_per_patient
    )
    slices_at_most = 160 / slice_spacing_mm[0] + 1
    require_free(out.parent, int(num_series * slices_at_most * (2.1 * matrix**2 + 2000)))
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent, out.name)
    partial_out = partial_of(out)
    try:
        (partial_out / IMAGES).mkdir(parents=True)
        (partial_out / MASKS).mkdir()
        records = []
        every = -(-num_series // 200)
        if progress is not None:
            progress("drawing phantoms", 0, num_series)
        table = partial_out / LABELS_CSV
        with (
            full_disk_told(table),
            open(table, "w", encoding="utf-8", newline="\n") as stream,
        ):
            stream.write("ID,Label\n")
            for done, (record, rows) in enumerate(_write_all(partial_out, specs, workers), 1):
                records.append(record)
                stream.writelines(rows)
                if progress is not None and (done % every == 0 or done == num_series):
                    progress("drawing phantoms", done, num_series)
        write_json(partial_out / MANIFEST, _manifest(records, seed))
        if out.is_dir():
            out.rmdir()  # empty; Windows does not move a folder onto another one
        replace(partial_out, out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return out


def _write_all(
    folder: Path, specs: list[PhantomSpec], workers: int
) -> Iterator[tuple[dict, list[str]]]:
    write = partial(_write_series, folder)
    if not workers:
        yield from map(write, specs)
        return
    try:
        # One OpenCV thread per process: the processes already use the cores.
        with process_pool(workers, cv2.setNumThreads, 1) as pool:
            yield from pool.map(write, specs)
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a worker process died while drawing phantoms.",
            "Out of memory? Use fewer workers or a smaller matrix.",
        ) from error


def _write_series(folder: Path, spec: PhantomSpec) -> tuple[dict, list[str]]:
    """Write the images and the mask of one series; return its manifest record and csv rows."""
    phantom = make_phantom(spec)
    labels = phantom.labels()
    uids = sop_instance_uids(spec, len(phantom.hu))
    rows = []
    for index, uid in enumerate(uids):
        path = folder / IMAGES / f"{uid}.dcm"
        content = dicom_bytes(phantom_dataset(phantom, index, uid))
        with full_disk_told(path, len(content)):
            path.write_bytes(content)
        rows += [
            f"{uid}_{name},{label}\n" for name, label in zip(LABELS, labels[index], strict=True)
        ]
    series_uid = hex_identifier(spec.series, spec.seed, 10)
    path = folder / MASKS / f"{series_uid}.npz"
    with full_disk_told(path):
        np.savez_compressed(path, sop_instance_uid=np.array(uids), masks=phantom.masks)
    return _record(phantom, series_uid, labels), rows


def _record(phantom: Phantom, series_uid: str, labels: np.ndarray) -> dict:
    spec, scan = phantom.spec, phantom.scan
    return {
        "series_instance_uid": series_uid,
        "patient_id": patient_id(spec),
        "patient": spec.patient,
        "series": spec.series,
        "seed": spec.seed,
        "encoding": spec.encoding,
        "num_slices": len(phantom.hu),
        "pixel_spacing_mm": scan.pixel_mm,
        "slice_spacing_mm": scan.slice_spacing_mm,
        "tilt_degrees": scan.tilt_degrees,
        "noise_hu": scan.noise,
        BLEED_ML: phantom.bleed_ml,
        "bleeds": [
            {
                "subtype": bleed.subtype,
                "kind": bleed.kind,
                "hu": bleed.hu,
                "volume_ml": phantom.volume_ml(bleed.subtype),
            }
            for bleed in phantom.bleeds
        ],
        "positive_slices": dict(zip(LABELS, labels.sum(axis=0).tolist(), strict=True)),
    }


def _manifest(records: list[dict], seed: int) -> dict:
    return {
        "what": "synthetic head CT, drawn by ich_keras; not from patients, not for clinical use",
        "seed": seed,
        "min_area_mm2": MIN_AREA_MM2,
        "mask_bits": list(MASK_BITS),
        "num_series": len(records),
        "num_slices": sum(record["num_slices"] for record in records),
        "series": records,
    }
