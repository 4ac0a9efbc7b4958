"""Arrays of Hounsfield units, written as DICOM slices that the one reader reads."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ich_keras.ct.identifiers import uid_of_content
from ich_keras.ct.units import ValueRange, require_hu
from ich_keras.disk import full_disk_told


class ArrayVolume(NamedTuple):
    """A volume in HU that is in memory.

    Args:
        name: of its files, and in messages.
        patient_id: whose it is.
        hu: (slices, rows, columns), HU, numbers of any kind; inferior to superior, columns to the
            patient's left, rows to the back.
        spacing_mm: between slices, rows and columns.
    """

    name: str
    patient_id: str
    hu: np.ndarray
    spacing_mm: tuple[float, float, float]


class VolumeUids(NamedTuple):
    """What a volume that was written is called: its series, and its slices in order."""

    series: str
    slices: tuple[str, ...]


def write_slices(folder: Path, volume: ArrayVolume) -> VolumeUids:
    """Write the slices of a volume into a new folder, 0001.dcm being the most inferior.

    Values are rounded to the nearest integer. UIDs come from the rounded values and the spacing.

    Raises:
        RejectedFile: its values cannot be HU.
        EnvironmentProblem: the disk is full.
    """
    ranges = ValueRange.joined(ValueRange.of(one) for one in volume.hu)
    require_hu(ranges)
    hu = np.rint(volume.hu).astype("<i2", order="C")  # a turned view is not contiguous
    digest = hashlib.sha256(repr((hu.shape, volume.spacing_mm)).encode())
    digest.update(hu.data)
    content = digest.hexdigest()
    uids = VolumeUids(
        uid_of_content(content, "series"),
        tuple(uid_of_content(content, "slice", number + 1) for number in range(len(hu))),
    )
    folder.mkdir(parents=True)
    dataset = _dataset(volume, uids.series, uid_of_content(content, "study"))
    for number, (pixels, uid) in enumerate(zip(hu, uids.slices, strict=True)):
        dataset.SOPInstanceUID = uid
        position_mm = number * volume.spacing_mm[0]
        dataset.ImagePositionPatient = ["0", "0", f"{position_mm:.9g}"]
        dataset.PixelData = pixels.tobytes()
        dataset["PixelData"].VR = "OW"
        path = folder / f"{number + 1:04d}.dcm"
        with full_disk_told(path, pixels.nbytes):
            dcmwrite(path, dataset, enforce_file_format=True)
    return uids


def _dataset(volume: ArrayVolume, series_uid: str, study_uid: str) -> Dataset:
    _, row_mm, column_mm = volume.spacing_mm
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.Modality = "CT"
    dataset.PatientID = volume.patient_id
    dataset.StudyInstanceUID = study_uid
    dataset.SeriesInstanceUID = series_uid
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [f"{row_mm:.9g}", f"{column_mm:.9g}"]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = volume.hu.shape[1:]
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleIntercept = "0"
    dataset.RescaleSlope = "1"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return dataset
