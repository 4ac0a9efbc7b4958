"""Tiny DICOM files for tests, written by pydicom."""

import io

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

AXIAL = (1, 0, 0, 0, 1, 0)


def tiny_values(seed=0, low=0, high=3000, side=16):
    """Random stored values; int32 (side, side)."""
    return np.random.default_rng(seed).integers(low, high, (side, side))


def tiny_head(number=0, side=64):
    """Stored values of a disc of brain in a ring of bone in air, unlike those of other numbers."""
    y, x = np.mgrid[:side, :side] - side / 2
    distance = np.hypot(x, y) / (side / 2)
    hu = np.where(distance < 0.8, 900, -1000)
    hu[distance < 0.7] = 35 + number
    return hu + 1024


def tiny_dataset(stored=None, **tags):
    """A CT slice of 16 x 16 signed 16-bit pixels, intercept -1024; a tag set to None is absent."""
    stored = tiny_values() if stored is None else np.asarray(stored)
    tags = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": "1.2.3.1",
        "Modality": "CT",
        "PatientID": "patient-1",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "ImagePositionPatient": [-125, -125, 10],
        "ImageOrientationPatient": list(AXIAL),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "PixelSpacing": [0.5, 0.5],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": tags.get("BitsStored", 16) - 1,
        "PixelRepresentation": 1,
        "RescaleIntercept": -1024,
        "RescaleSlope": 1,
        "PixelData": (stored & 0xFFFF).astype("<u2").tobytes(),
        **tags,
    }
    dataset = Dataset()
    for keyword, value in tags.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW"
    return dataset


def to_bytes(dataset, syntax=ExplicitVRLittleEndian, compress=None):
    """The bytes of a DICOM file with this data set."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or "1.2.3.1"
    if compress is not None:
        dataset.compress(compress, generate_instance_uid=False)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def tiny_file(stored=None, syntax=ExplicitVRLittleEndian, compress=None, **tags):
    """The bytes of a tiny CT slice; see `tiny_dataset`."""
    return to_bytes(tiny_dataset(stored, **tags), syntax, compress)


def encapsulated_file(codestream, syntax, side=16, fragments=1, **tags):
    """The bytes of a CT slice whose compressed pixels are given."""
    dataset = tiny_dataset(np.zeros((side, side), int), **tags)
    dataset.PixelData = encapsulate([codestream], fragments_per_frame=fragments)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return to_bytes(dataset, syntax)


def head_hu(side=64, seed=0):
    """A round head in air: skin, skull, brain and ventricles, with noise; int (side, side), HU."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    distance = np.hypot(rows, columns * 1.1)
    hu = np.full((side, side), -1000)
    for radius, tissue in ((0.4, 20), (0.38, 900), (0.33, 32)):
        hu[distance < radius] = tissue
    hu[(abs(rows) < 0.08) & (abs(columns) < 0.04)] = 6
    return hu + np.random.default_rng(seed).normal(0, 5, hu.shape).round().astype(int)
