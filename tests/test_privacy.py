"""No patient data leave the input folder, and nothing leaves the machine."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pydicom
import pytest
from command_server import NARROW, ROOT, CommandServer

pytestmark = pytest.mark.slow

NAME, IDENTITY = "CANARY", "KINGFISHER"  # never to be seen; only where patients are kept apart
DATE = "19010203"
# Elements that hold people, places and words about them.
TEXTS = """
AccessionNumber AdditionalPatientHistory AdmittingDiagnosesDescription BranchOfService
CountryOfResidence CurrentPatientLocation DerivationDescription DetectorID DeviceSerialNumber
EthnicGroup ImageComments InstitutionAddress InstitutionName InstitutionalDepartmentName
IssuerOfPatientID MedicalAlerts MedicalRecordLocator Occupation OperatorsName OtherPatientIDs
OtherPatientNames PatientAddress PatientBirthName PatientComments PatientInstitutionResidence
PatientMotherBirthName PatientName PatientReligiousPreference PatientTelephoneNumbers
PerformedProcedureStepDescription PerformedProcedureStepID PerformedStationName
PerformingPhysicianName PersonName PhysiciansOfRecord ProtocolName ReferringPhysicianAddress
ReferringPhysicianName ReferringPhysicianTelephoneNumbers RegionOfResidence
RequestedProcedureDescription RequestedProcedureID RequestingPhysician RequestingService
ScheduledPerformingPhysicianName SeriesDescription SpecialNeeds StationName StudyDescription
StudyID VisitComments Manufacturer ManufacturerModelName ContrastBolusAgent ContrastBolusRoute
""".split()  # noqa: SIM905
DATES = ["PatientBirthDate", "AdmittingDate", "LastMenstrualDate"]
# From these, splits keep patients apart.
MAY_NAME_PATIENTS = (
    *(f"{folder}/{table}.csv" for folder in ("index", "cache") for table in ("slices", "series")),
)


def with_canaries(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    for number, keyword in enumerate(TEXTS):
        setattr(dataset, keyword, f"{NAME}{number}")
    for keyword in DATES:
        setattr(dataset, keyword, DATE)
    dataset.PatientID = f"{IDENTITY}-{dataset.PatientID}"
    dataset.add_new(0x00091001, "LO", f"{NAME} of a vendor")
    dataset.save_as(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, and those inside of archives."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    found |= {f"{name}/{part}": archive.read(part) for part in archive.namelist()}
    return found


@pytest.fixture
def server(tmp_path):
    with CommandServer(tmp_path) as server:
        yield server


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # RSNA's UIDs are none; a line feed
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_what_the_headers_say_of_people_is_in_no_output(server, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    said = [server.run("phantom", "--out", data, "--series", 8, "--matrix", 32, "--workers", 0)]
    files = sorted(data.rglob("*.dcm"))
    for path in files:
        with_canaries(path)
    # Files that are refused for what they lack or hold, and one that is there twice.
    for number, (keyword, value) in enumerate(
        [("Rows", 0), ("Modality", "MR"), ("PatientID", f"{IDENTITY}\n"), ("RescaleSlope", "0")]
    ):
        dataset = pydicom.dcmread(files[number])
        setattr(dataset, keyword, value)
        dataset.SOPInstanceUID = f"1.2.{number}"
        dataset.save_as(files[number].with_name(f"bad-{number}.dcm"))
    shutil.copy(files[0], files[0].with_name("copy.dcm"))
    labels, training = data / "stage_2_train.csv", ["--preset", NARROW, "--epochs", 1]
    commands = [
        ["index", "--dicom", data / "images", "--labels", labels, "--out", out / "index"],
        ["cache", "--index", out / "index", "--size", 32, "--out", out / "cache"],
        ["train", "--cache", out / "cache", "--out", out / "run", "--device", "cpu", *training],
        ["evaluate", "--run", out / "run", "--cache", out / "cache", "--split", "train"],
        [
            *("predict", "--run", out / "run", "--dicom", data / "images"),
            *("--out", out / "predicted", "--report"),
        ],
        ["view", data / "images", "--out", out / "view.html"],
        ["submission", "--predictions", out / "predicted/predictions.csv", "--out", out / "s.csv"],
        ["audit", "--cache", out / "cache", "--split", out / "leaking.csv"],
        ["verify", out / "run"],
        # And errors: a folder without heads, a run on another cache.
        ["index", "--dicom", data / "bad", "--out", out / "none"],
        ["train", "--cache", out / "cache", "--out", out / "run2", "--split", out / "leaking.csv"],
    ]
    (data / "bad").mkdir()
    shutil.copy(files[0].with_name("bad-0.dcm"), data / "bad")
    for command in commands:
        if command[0] == "audit":
            with open(out / "cache/slices.csv", newline="") as stream:
                uids = [row["sop_instance_uid"] for row in csv.DictReader(stream)]
            lines = [f"{uid},{('train', 'valid')[n % 2]}" for n, uid in enumerate(uids)]
            (out / "leaking.csv").write_text("\n".join(["sop_instance_uid,split", *lines]))
        said.append(server.run(*command))
    codes = [code for code, _ in said]
    assert codes == [0] * 8 + [3, 0, 3, 3], said
    for code, text in said:
        assert NAME not in text and IDENTITY not in text and DATE not in text, (code, text)
    found = contents(out)
    pages = {"predicted/reports/1.html", "view.html"}
    assert {"run/model.keras/config.json", "predicted/rejects.csv", "s.csv", *pages} <= set(found)
    for name, content in found.items():
        assert NAME.encode() not in content and DATE.encode() not in content, name
        if name not in MAY_NAME_PATIENTS:
            assert IDENTITY.encode() not in content, name
    # The test can see what it looks for.
    for name in MAY_NAME_PATIENTS:
        assert IDENTITY.encode() in found[name], name


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_traceback_shows_no_patient(server, tmp_path):
    """On request: of refusals, of an interruption, and of what a crash leaves behind."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    server.run("phantom", "--out", data, "--series", 4, "--matrix", 32, "--workers", 0)
    files = sorted(data.rglob("*.dcm"))
    for path in files:
        with_canaries(path)
    shutil.copytree(data / "images", data / "bad")
    for path in (data / "bad").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    labels, asked = data / "stage_2_train.csv", {"ICH_TRACEBACK": "1"}
    index = ["index", "--dicom", data / "images", "--labels", labels, "--workers", 0]
    cache = ["cache", "--index", out / "index", "--size", 32, "--workers", 0]
    training = ["--preset", NARROW, "--epochs", 1, "--device", "cpu"]
    said = [
        server.run("index", "--dicom", data / "bad", "--out", out / "none", **asked),
        server.run(*index, "--out", out / "killed", ICH_FAIL_AT="before series.csv"),
        server.run(*index, "--out", out / "index"),
        server.run(*index, "--out", out / "index", **asked),
        server.run(*cache, "--out", out / "half", ICH_FAIL_AT="before slices.csv"),
        server.run(*cache, "--out", out / "cache"),
        # Too few patients for three splits, and a list that leaks.
        server.run("train", "--cache", out / "cache", "--out", out / "run", *training, **asked),
    ]
    assert [code for code, _ in said[:6]] == [1, 137, 0, 1, 137, 0], said
    assert said[6][0] in (0, 1)
    assert sum("Traceback" in text for _, text in said) >= 2
    for code, text in said:
        assert NAME not in text and IDENTITY not in text and DATE not in text, (code, text)
    for name, content in contents(out).items():
        assert NAME.encode() not in content and DATE.encode() not in content, name
        # What an interrupted index or cache goes on with names patients, as its tables do.
        if "slices.csv" not in name and "series.csv" not in name and "journal" not in name:
            assert IDENTITY.encode() not in content, name


# Python imports this file when a process starts, worker processes included.
NO_NETWORK = """
import os, socket, sys

def refuse(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        os.write(2, f"asks for {args}".encode())
        os._exit(99)
    if event in ("socket.connect", "socket.sendto") and args[0].family != socket.AF_UNIX:
        os.write(2, f"connects to {args[1]}".encode())
        os._exit(99)

sys.addaudithook(refuse)
"""
DEMO = """
import sys
from ich_keras.demo import DemoSettings, run_demo

if __name__ == "__main__":
    settings = DemoSettings(num_series=24, matrix=64, size=32, epochs=1)
    run_demo(sys.argv[1], settings=settings, workers=2, device="cpu")
"""


def test_the_demo_needs_no_network(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    script = tmp_path / "demo.py"
    script.write_text(DEMO)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    # The test can see what it looks for.
    assert run("-c", "import socket; socket.create_connection(('127.0.0.1', 9))").returncode == 99
    done = run(script, tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "demo/demo.json").read_text())["synthetic"] is True
