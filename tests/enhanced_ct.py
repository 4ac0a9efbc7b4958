"""Enhanced multi-frame CT for tests, in the format of DICOM PS3.3 A.38, written by pydicom."""

import io

import numpy as np
import pydicom
from nifti_files import head_volume
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian

ORIGINAL = ["ORIGINAL", "PRIMARY", "AXIAL", "NONE"]


def item(**tags):
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def sequence(**tags):
    return Sequence([item(**tags)])


def frame_item(number, position, **own):
    """The functional groups of a frame; `own` are other macros, or None for one that is absent."""
    groups = {
        "FrameContentSequence": sequence(
            FrameAcquisitionNumber=1,
            StackID="1",
            InStackPositionNumber=number,
            DimensionIndexValues=[1, number],
            FrameAcquisitionDateTime="20200101120000.5+0100",
        ),
        "PlanePositionSequence": sequence(ImagePositionPatient=[float(x) for x in position]),
        "CTImageFrameTypeSequence": sequence(FrameType=ORIGINAL),
        **own,
    }
    return item(**{name: value for name, value in groups.items() if value is not None})


def shared_item(**own):
    groups = {
        "PixelMeasuresSequence": sequence(PixelSpacing=[4.0, 4.0], SliceThickness=5.0),
        "PlaneOrientationSequence": sequence(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "PixelValueTransformationSequence": rescale(1, -1024),
        "FrameVOILUTSequence": sequence(WindowCenter=40, WindowWidth=80),
        "CTReconstructionSequence": sequence(ConvolutionKernel="H30s"),
        "CTXRayDetailsSequence": sequence(KVP=120.0, FilterType="NONE"),
        **own,
    }
    return item(**{name: value for name, value in groups.items() if value is not None})


def rescale(slope, intercept, unit="HU"):
    return sequence(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType=unit)


def enhanced(hu=None, frames=None, shared=None, stored=None, **tags):
    """A head of 6 slices, 5 mm apart; a tag set to None is absent."""
    hu = head_volume(6) if hu is None else hu
    stored = hu + 1024 if stored is None else stored
    if frames is None:
        frames = [frame_item(n + 1, (-126, -126, 5 * n)) for n in range(len(hu))]
    tags = {
        "SOPClassUID": EnhancedCTImageStorage,
        "SOPInstanceUID": "1.2.3.9",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.4",
        "Modality": "CT",
        "PatientID": "patient-1",
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "InstanceNumber": 1,
        "NumberOfFrames": len(stored),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": stored.shape[1],
        "Columns": stored.shape[2],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "SharedFunctionalGroupsSequence": Sequence([shared or shared_item()]),
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
        "PixelData": np.asarray(stored).astype("<i2").tobytes(),
        **tags,
    }
    dataset = item(**{keyword: value for keyword, value in tags.items() if value is not None})
    if "PixelData" in dataset:
        dataset["PixelData"].VR = "OW"
    return dataset


def written(dataset, syntax=ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.9"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def encapsulated(dataset, codestreams, syntax, table="basic", fragments=1) -> bytes:
    """The file with compressed frames; `table` is basic, extended or none."""
    if table == "extended":
        dataset.PixelData, offsets, lengths = encapsulate_extended(codestreams)
        dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = offsets, lengths
    else:
        dataset.PixelData = encapsulate(
            codestreams, fragments_per_frame=fragments, has_bot=table == "basic"
        )
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return written(dataset, syntax)


def undefined_lengths(dataset):
    """Write all sequences and items without their lengths, as many programs do."""
    for element in dataset:
        if element.VR == "SQ":
            element.is_undefined_length = True
            for one in element.value:
                one.is_undefined_length_sequence_item = True
                undefined_lengths(one)
    return dataset
