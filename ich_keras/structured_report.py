"""Answers as DICOM: one structured report (TID 1500) per study, for a PACS.

A report holds, for each series and label, the calibrated probability, the decision, the group, and
the slices to look at first, by reference. It copies who the patient is from the images, as every
DICOM object does: it is written only on request. highdicom makes and reads it.

Source: DICOM PS3.16, TID 1500 and TID 1501; codes of SNOMED CT as in PS3.16 where it has them. The
subtypes, which it lacks, have codes of our own scheme.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, CTImageStorage, generate_uid

from ich_keras import __version__
from ich_keras.ct.nifti import is_nifti
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex
from ich_keras.ct.sources import file_of, name_of, opened
from ich_keras.errors import EnvironmentProblem
from ich_keras.files import atomic_write
from ich_keras.labels import SIX, LabelSet
from ich_keras.prediction_journal import written
from ich_keras.prediction_tables import FolderPrediction
from ich_keras.progress import Progress
from ich_keras.secondary_capture import BROKEN, UnsuitableHeaders, captures

if TYPE_CHECKING:
    from ich_keras.report_maps import MapMaker

FOLDER = "sr"  # in the folder of a prediction
EXTRA = "dicom-out"
_SCHEME = "99ICHKERAS"
_NAME = "ich_keras"
_UID = "series_instance_uid"
_SERIES_NUMBER = 9400  # of reports; no scanner counts so far
_MOST_CHARACTERS = 64  # of a code meaning, PS3.5 table 6.2-1 (LO)


@dataclass(frozen=True)
class WrittenReports:
    """What became of the studies.

    Args:
        paths: of the reports, in the order of studies.csv.
        left_out: of a study without one: its number in studies.csv, from 1, and why.
        num_captures: secondary captures with heat maps beside them.
    """

    paths: tuple[Path, ...]
    left_out: tuple[tuple[int, str], ...]
    num_captures: int = 0

    def sentences(self) -> list[str]:
        """Say it in lines."""
        lines = [f"Structured reports: {len(self.paths):,}."] if self.paths else []
        if self.num_captures:
            lines[0] = f"{lines[0][:-1]}, with {self.num_captures:,} heat maps of slices."
        numbers: dict[str, list[int]] = {}
        for number, why in self.left_out:
            numbers.setdefault(why, []).append(number)
        for why, found in numbers.items():
            others = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
            lines.append(f"No structured report of study {found[0]}{others}: {why}")
        return lines


def require_highdicom() -> None:
    """See that highdicom is there, before hours of work.

    Raises:
        EnvironmentProblem: it is not.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            "highdicom is not installed; structured reports need it.",
            f"pip install 'ich_keras[{EXTRA}]'",
        ) from error


def write_structured_reports(
    folder: Path,
    prediction: FolderPrediction,
    index: SeriesIndex,
    run: str,
    progress: Progress | None = None,
    maker: "MapMaker | None" = None,
) -> WrittenReports:
    """Write one report per study, and read each again.

    Args:
        folder: of the prediction; receives sr/1.dcm for the first row of studies.csv, ...
        prediction: with answers, studies and paths.
        index: what was predicted.
        run: what made the answers: a name or digest of the run.
        progress: called as progress("writing structured reports", done, total) in studies.
        maker: of heat maps; with it, sr/1-heat-1.dcm, ... are secondary captures of the slices to
            look at first. A run on whole series has none.

    Raises:
        EnvironmentProblem: highdicom is not installed, or a file cannot be written.
    """
    require_highdicom()
    assert prediction.studies is not None  # of `predict_folder`
    studies = _study_of(index)
    answers = prediction.series.assign(study=prediction.series[_UID].map(studies))
    paths, left_out, num_captures = [], [], 0
    for number, (_, part) in enumerate(answers.groupby("study", sort=False), 1):
        if progress is not None:
            progress("writing structured reports", number - 1, len(prediction.studies))
        # pydicom's warnings quote values, which may be of a patient.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                images = {uid: _headers(index, uid) for uid in part[_UID]}
                report = _report(part, images, prediction, run)
                made = [] if maker is None else _captures(maker, part, prediction, index, images)
        except UnsuitableHeaders as error:
            left_out.append((number, str(error)))
            continue
        path = folder / FOLDER / f"{number}.dcm"
        with written(path):
            atomic_write(path, report)
        paths.append(path)
        for place, capture in enumerate(made, 1):
            path = folder / FOLDER / f"{number}-heat-{place}.dcm"
            with written(path):
                atomic_write(path, capture)
        num_captures += len(made)
    return WrittenReports(tuple(paths), tuple(left_out), num_captures)


def _captures(
    maker: "MapMaker",
    answers: pd.DataFrame,
    prediction: FolderPrediction,
    index: SeriesIndex,
    images: "dict[str, dict[str, tuple[pydicom.Dataset, int]]]",
) -> list[bytes]:
    return list(captures(maker, answers, prediction.look_first, index, images))


def _study_of(index: SeriesIndex) -> "pd.Series[str]":
    table = index.series.set_index("series_uid")["study_instance_uid"]
    return table.where(table != "", table.index.to_series())


def _headers(index: SeriesIndex, uid: str) -> dict[str, tuple[pydicom.Dataset, int]]:
    """Read the headers of a series: UID of a slice -> data set of its file, and the frame."""
    rows = index.slices[index.slices["series_uid"] == uid]
    found: dict[str, tuple[pydicom.Dataset, int]] = {}
    data_sets: dict[Any, pydicom.Dataset] = {}
    for row in rows.itertuples():
        file = file_of(row)
        if is_nifti(name_of(file)):
            raise UnsuitableHeaders("a NIfTI volume has no DICOM images to refer to.")
        if file not in data_sets:
            data_sets[file] = _data_set(file)
        found[str(row.sop_instance_uid)] = data_sets[file], int(row.frame)
    return found


def _data_set(file: Any) -> pydicom.Dataset:
    try:
        with opened(file, is_whole=False) as stream:
            data_set = pydicom.dcmread(stream, stop_before_pixels=True)
            # What highdicom copies; of type 2: there, but perhaps empty.
            for keyword in _COPIED:
                if keyword not in data_set:
                    setattr(data_set, keyword, "")
                getattr(data_set, keyword)
            if "SOPClassUID" not in data_set:  # as in RSNA's files
                meta = data_set.file_meta
                data_set.SOPClassUID = meta.get("MediaStorageSOPClassUID", CTImageStorage)
    except (RejectedFile, InvalidDicomError, ValueError, TypeError, NotImplementedError) as error:
        # Not its text: it may quote a value of the header, and so the patient.
        why = error.code if isinstance(error, RejectedFile) else type(error).__name__
        raise UnsuitableHeaders(f"{name_of(file)} cannot be read again ({why}).") from error
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        uid = UID(str(data_set.get(keyword, "")))
        if not uid.is_valid:
            raise UnsuitableHeaders(
                f"its {keyword} is no DICOM UID to refer to, as in RSNA's files."
            )
    return data_set


_COPIED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)


def _report(
    answers: pd.DataFrame,
    images: dict[str, dict[str, tuple[pydicom.Dataset, int]]],
    prediction: FolderPrediction,
    run: str,
) -> bytes:
    """Make the report of one study, and read it again."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    evidence = list({id(one): one for part in images.values() for one, _ in part.values()}.values())
    labels = prediction.labels
    groups = [
        group
        for row in answers.to_dict("records")
        for group in _groups(row, images[row[_UID]], prediction, labels, run)
    ]
    observer = sr.ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=_own_uid(run),
            name=_NAME,
            model_name=_NAME,
            serial_number=__version__,
        ),
    )
    try:
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=observer),
            procedure_reported=codes.SCT.ComputedTomographyOfHead,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
        )
        report = sr.ComprehensiveSR(
            evidence=evidence,
            content=content[0],
            series_instance_uid=generate_uid(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=_NAME,
            is_complete=True,
            is_final=False,
            is_verified=False,
            series_description="ich_keras: research only, not for clinical use",
        )
        stream = io.BytesIO()
        report.save_as(stream)
    except BROKEN as error:
        why = type(error).__name__
        raise UnsuitableHeaders(f"its headers do not make a report ({why}).") from error
    stream.seek(0)
    _require_same(sr.srread(stream), groups, evidence)
    return stream.getvalue()


def _require_same(report: Any, groups: Sequence[Any], evidence: Sequence[pydicom.Dataset]) -> None:
    """See that what was written says what was meant, and refers to images of the study only."""
    there = {str(one.SOPInstanceUID) for one in evidence}
    found = report.content.get_image_measurement_groups()
    referred = {
        item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        for group in found
        for item in group.source_images
    }
    values = [group.get_measurements()[0].value for group in found]
    meant = [group.get_measurements()[0].value for group in groups]
    if values != meant or not referred <= there:
        raise RuntimeError("a structured report reads otherwise than it was written")


def _groups(
    row: dict[str, Any],
    images: dict[str, tuple[pydicom.Dataset, int]],
    prediction: FolderPrediction,
    labels: LabelSet,
    run: str,
) -> Iterator[Any]:
    """Yield the measurement group of each label of one series."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    for name in labels.names:
        tracking = f"{name} in series {row[_UID]}"
        evaluations = [
            sr.QualitativeEvaluation(_own("Decision at the operating point"), value)
            for value in _decision(row.get(f"decision_{name}", ""))
        ]
        if group := row.get(f"group_{name}", ""):
            value = _own(f"{group}: conformal group")
            evaluations.append(sr.QualitativeEvaluation(_own("Conformal group"), value))
        yield sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(_own_uid(run, tracking), name),
            finding_type=label_code(name, labels),
            finding_category=codes.SCT.MorphologicallyAbnormalStructure,
            algorithm_id=sr.AlgorithmIdentification(_NAME, __version__, [f"run {run}"]),
            measurements=[
                sr.Measurement(
                    name=codes.DCM.Probability,
                    value=float(row[name]),
                    unit=codes.UCUM.NoUnits,
                )
            ],
            qualitative_evaluations=evaluations,
            source_images=[
                sr.SourceImageForMeasurementGroup(
                    str(data_set.SOPClassUID),
                    str(data_set.SOPInstanceUID),
                    [frame] if frame else None,
                )
                for data_set, frame in _shown(row[_UID], name, images, prediction.look_first)
            ],
        )


def _shown(
    uid: str,
    label: str,
    images: dict[str, tuple[pydicom.Dataset, int]],
    look_first: pd.DataFrame | None,
) -> Sequence[tuple[pydicom.Dataset, int]]:
    """Return the images behind a label: those to look at first, or all of a series.

    Of a run on whole series, and of a label that is not decided yes, no slice stands out.
    """
    if look_first is not None:
        rows = look_first[(look_first[_UID] == uid) & (look_first["label"] == label)]
        if len(rows):
            return [images[one] for one in rows.sort_values("rank")["sop_instance_uid"]]
    return list(images.values())


def label_code(name: str, labels: LabelSet) -> Any:
    """Return the code of a label's finding."""
    from pydicom.sr.codedict import codes

    if labels == SIX and name == labels.shown:
        return codes.SCT.IntracranialHemorrhage
    meaning = f"{name} hemorrhage" if labels == SIX else name
    return _own(meaning[:1].upper() + meaning[1:])


def _decision(word: str) -> Iterator[Any]:
    from pydicom.sr.codedict import codes

    if word:
        yield codes.SCT.Present if word == "yes" else codes.SCT.Absent


def _own(meaning: str) -> Any:
    """Return a code of our own; its value is made from its meaning."""
    from pydicom.sr.coding import Code

    digest = hashlib.sha256(meaning.encode()).hexdigest()[:12].upper()
    return Code(digest, _SCHEME, meaning[:_MOST_CHARACTERS])


def _own_uid(*parts: str) -> str:
    return str(generate_uid(prefix=None, entropy_srcs=["ich_keras structured report", *parts]))
