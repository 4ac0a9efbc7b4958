"""NIfTI files for tests, written by nibabel."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from tiny_dicom import head_hu

# Columns to the right, rows to the front, slices up: what RAS means.
RAS = np.diag([4.0, 4.0, 5.0, 1.0])


def head_volume(slices=4, side=64):
    """Return HU of a head: int16 (slices, side, side); rows to the left, columns to the back."""
    return np.stack([head_hu(side, seed=number) for number in range(slices)]).astype(np.int16)


def image_of(hu, dtype=np.int16, affine=RAS):
    """Return HU (slices, rows, columns; to the left, to the back, up) as a NIfTI image in RAS."""
    voxels = np.asarray(hu)[:, ::-1, ::-1].transpose(2, 1, 0)
    return nib.Nifti1Image(voxels.astype(dtype), affine)


def image_of_series(paths):
    """Return a DICOM series as pydicom reads it, as a NIfTI image, its voxels not turned."""
    files = [pydicom.dcmread(path) for path in paths]
    normal = np.cross(files[0].ImageOrientationPatient[:3], files[0].ImageOrientationPatient[3:])
    files.sort(key=lambda one: float(np.dot(one.ImagePositionPatient, normal)))
    first, last = files[0], files[-1]
    hu = [
        np.rint(one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept))
        for one in files
    ]
    affine = np.eye(4)
    orientation = np.array(first.ImageOrientationPatient, float)
    affine[:3, 0] = orientation[:3] * float(first.PixelSpacing[1])
    affine[:3, 1] = orientation[3:] * float(first.PixelSpacing[0])
    begin, end = (np.array(one.ImagePositionPatient, float) for one in (first, last))
    affine[:3, 2] = (end - begin) / (len(files) - 1)
    affine[:3, 3] = begin
    affine = np.diag([-1, -1, 1, 1]) @ affine
    voxels = np.stack(hu).transpose(2, 1, 0).astype(np.int16)
    return nib.Nifti1Image(voxels, affine)


def write_nifti(path: Path, image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path
