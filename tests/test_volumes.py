"""Scans and reconstructions that share a SeriesInstanceUID become volumes of their own."""

import time

import numpy as np
import pytest
from tiny_dicom import tiny_dataset, to_bytes

from ich_keras.ct.journal import Entry
from ich_keras.ct.series import index_folder
from ich_keras.ct.volumes import volumes_of

FULL = np.arange(0, 50, 5)


class Folder:
    """Writes slices of one SeriesInstanceUID, and says what became of them."""

    def __init__(self, path):
        self.path = path
        self.names = {}

    def add(self, name, zs, times=None, **tags):
        """Write a stack; `times` gives each slice its own AcquisitionTime."""
        for number, z in enumerate(zs):
            place = len(self.names)
            # UIDs in no meaningful order: nothing may depend on it.
            uid = f"1.2.3.{place * 7919 % 10007}"
            dataset = tiny_dataset(
                SOPInstanceUID=uid,
                ImagePositionPatient=[-125, -125, float(z)],
                **({} if times is None else {"AcquisitionTime": times[number]}),
                **tags,
            )
            self.names[uid] = f"{name}:{z:g}"
            (self.path / f"{place:03d}.dcm").write_bytes(to_bytes(dataset))

    def volumes(self):
        """(The slices of each volume, in order; the verdicts)."""
        index = index_folder(self.path)
        uids = index.slices.groupby("series_uid")["sop_instance_uid"].apply(list)
        return [[self.names[uid] for uid in volume] for volume in uids], (
            index.series["verdict"].tolist()
        )


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def places(name, zs):
    return [f"{name}:{z:g}" for z in zs]


def is_pure(volume):
    return len({name.partition(":")[0] for name in volume}) == 1


@pytest.mark.parametrize(
    ("tag", "one", "other"),
    [
        ("ConvolutionKernel", "H30s", "H60s"),
        ("ConvolutionKernel", ["I31f", "3"], ["I31f", "5"]),
        ("FilterType", "HEAD", "BODY"),
        ("KVP", "80", "140"),
        ("SliceThickness", "5", "10"),
        ("TemporalPositionIdentifier", 1, 2),
        ("FrameOfReferenceUID", "1.2.9", "1.2.8"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "AXIAL", "A"], ["ORIGINAL", "PRIMARY", "AXIAL"]),
        ("ContrastBolusAgent", "some", None),
    ],
)
def test_whatever_tells_two_stacks_at_the_same_places_apart(folder, tag, one, other):
    folder.add("a", FULL, AcquisitionNumber=1, **{tag: one})
    folder.add("b", FULL[:-1], AcquisitionNumber=1, **{tag: other})
    volumes, verdicts = folder.volumes()
    assert volumes == [places("a", FULL), places("b", FULL[:-1])]
    assert verdicts == ["ok", "ok"]


def test_the_kernel_stands_in_the_table(folder):
    folder.add("soft", FULL, ConvolutionKernel="H30s")
    folder.add("sharp", FULL[:-1], ConvolutionKernel="H60s")
    index = index_folder(folder.path)
    assert index.series["kernel"].tolist() == ["H30s", "H60s"]
    assert "kernel H60s" in index.describe("1.2.3.4#2")


def test_four_reconstructions_of_two_scans(folder):
    for acquisition in (1, 2):
        for kernel in ("soft", "sharp"):
            zs = FULL[: 10 - acquisition - 2 * (kernel == "sharp")]
            tags = {"AcquisitionNumber": acquisition, "ConvolutionKernel": kernel}
            folder.add(f"{acquisition}{kernel}", zs, **tags)
    volumes, verdicts = folder.volumes()
    assert [len(volume) for volume in volumes] == [9, 8, 7, 6]
    assert all(map(is_pure, volumes))
    assert verdicts == ["ok"] * 4


def test_two_kernels_and_two_voltages(folder):
    for kernel in ("soft", "sharp"):
        for voltage in ("80", "140"):
            folder.add(kernel + voltage, FULL, ConvolutionKernel=kernel, KVP=voltage)
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 4
    assert all(map(is_pure, volumes))
    assert verdicts == ["ok"] * 4


def test_a_head_in_two_halves_with_two_kernels_each(folder):
    for kernel in ("soft", "sharp"):
        for acquisition, half in ((1, FULL[:5]), (2, FULL[5:])):
            folder.add(kernel, half, AcquisitionNumber=acquisition, ConvolutionKernel=kernel)
    volumes, verdicts = folder.volumes()
    assert sorted(volumes) == [places("sharp", FULL), places("soft", FULL)]
    assert verdicts == ["ok", "ok"]


def test_a_kernel_of_a_part_of_the_head_beside_the_whole(folder):
    """The base in a sharp kernel, once more with the rest: that is not torn in two."""
    folder.add("base", FULL[:4], ConvolutionKernel="H50s")
    folder.add("rest", FULL[4:], ConvolutionKernel="H30s")
    folder.add("bone", FULL, ConvolutionKernel="H60s")
    volumes, verdicts = folder.volumes()
    both = places("base", FULL[:4]) + places("rest", FULL[4:])
    assert sorted(volumes) == sorted([both, places("bone", FULL)])
    assert verdicts == ["ok", "ok"]


@pytest.mark.parametrize("tag", ["ConvolutionKernel", "SliceThickness", "KVP"])
def test_regions_with_settings_of_their_own_are_one_head(folder, tag):
    folder.add("base", FULL[:4], **{tag: "1"})
    folder.add("rest", FULL[4:], **{tag: "2"})
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["ok"]


def test_thin_slices_of_the_base_then_thick_ones(folder):
    """The usual protocol: 2.5 mm through the posterior fossa, 5 mm through the cerebrum."""
    thin, thick = np.arange(0, 40, 2.5), np.arange(42.5, 140, 5)
    folder.add("thin", thin, SliceThickness="2.5", AcquisitionNumber=1)
    folder.add("thick", thick, SliceThickness="5", AcquisitionNumber=2)
    volumes, verdicts = folder.volumes()
    assert volumes == [places("thin", thin) + places("thick", thick)]
    assert verdicts == ["irregular"]


def test_one_slice_in_another_kernel_leaves_no_gap(folder):
    folder.add("most", np.delete(FULL, 4), ConvolutionKernel="H30s")
    folder.add("one", [FULL[4]], ConvolutionKernel="H40s")
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["ok"]


@pytest.mark.parametrize("shift", [2.5, 1.3])
def test_two_kernels_between_each_other(folder, shift):
    """Half a step apart, they would look like one regular volume."""
    folder.add("soft", FULL, ConvolutionKernel="H30s")
    folder.add("sharp", FULL[:-1] + shift, ConvolutionKernel="H60s")
    volumes, verdicts = folder.volumes()
    assert volumes == [places("soft", FULL), places("sharp", FULL[:-1] + shift)]
    assert verdicts == ["ok", "ok"]


def test_thin_slices_between_thick_ones(folder):
    folder.add("thick", FULL, SliceThickness="5")
    folder.add("thin", np.arange(10.5, 35), SliceThickness="1")
    volumes, verdicts = folder.volumes()
    assert all(map(is_pure, volumes))
    assert verdicts == ["ok", "ok"]


def test_two_scans_between_each_other(folder):
    folder.add("1", FULL, AcquisitionNumber=1)
    folder.add("2", FULL[:-1] + 1.3, AcquisitionNumber=2)
    volumes, verdicts = folder.volumes()
    assert volumes == [places("1", FULL), places("2", FULL[:-1] + 1.3)]
    assert verdicts == ["ok", "ok"]


def test_one_scan_in_two_passes_stays_together(folder):
    """Every second slice, then those between: one regular stack."""
    folder.add("1", FULL[::2], AcquisitionNumber=1)
    folder.add("2", FULL[1::2], AcquisitionNumber=2)
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["ok"]


def times(first, count, step=1):
    return [f"{first + step * number:06d}" for number in range(count)]


@pytest.mark.parametrize("step", [0, 1])
def test_two_scans_by_time_alone(folder, step):
    folder.add("1", FULL, times(101500, 10, step))
    folder.add("2", FULL[:-1], times(102000, 9, step))
    volumes, verdicts = folder.volumes()
    assert volumes == [places("1", FULL), places("2", FULL[:-1])]
    assert verdicts == ["ok", "ok"]


def test_a_second_scan_that_reaches_further(folder):
    folder.add("1", [0, 5, 10, 15], times(101500, 4))
    folder.add("2", [10, 15, 20, 25, 30], times(102000, 5))
    volumes, _ = folder.volumes()
    assert volumes == [places("2", [10, 15, 20, 25, 30]), places("1", [0, 5, 10, 15])]


def test_three_time_points(folder):
    for number in range(3):
        folder.add(str(number), FULL[: 10 - number], times(101500 + 100 * number, 10 - number))
    volumes, verdicts = folder.volumes()
    assert [volume[0] for volume in volumes] == ["0:0", "1:0", "2:0"]
    assert all(map(is_pure, volumes))
    assert verdicts == ["ok"] * 3


def test_content_time_where_the_scan_has_one_time(folder):
    for name, first in (("soft", 101500), ("sharp", 101700)):
        for number, z in enumerate(FULL):
            folder.add(name, [z], ["101000"], ContentTime=f"{first + number:06d}.25")
    volumes, verdicts = folder.volumes()
    assert all(map(is_pure, volumes))
    assert verdicts == ["ok", "ok"]


def test_reconstructions_made_side_by_side_stay_and_are_told(folder):
    """Their times alternate: they cannot be told apart, so nothing is guessed."""
    folder.add("soft", FULL, times(101500, 10, 2))
    folder.add("sharp", FULL, times(101501, 10, 2))
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["duplicate"]


def test_rotations_that_overlap_stay_and_are_told(folder):
    for number in range(5):
        folder.add(str(number), [5 * number, 5 * number + 5], [f"10150{number}"] * 2)
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["duplicate"]


@pytest.mark.filterwarnings("ignore:Invalid value for VR TM")
@pytest.mark.parametrize("time", ["", "noon", "10:15:00"])
def test_times_that_are_none_say_nothing(folder, time):
    folder.add("1", FULL, [time] * 10)
    folder.add("2", FULL, times(102000, 10))
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["duplicate"]


def test_a_fact_that_differs_from_slice_to_slice_says_nothing(folder):
    for number, z in enumerate([*FULL, *FULL]):
        folder.add(str(number), [z], FrameOfReferenceUID=f"1.2.{number}")
    volumes, verdicts = folder.volumes()
    assert len(volumes) == 1
    assert verdicts == ["duplicate"]


def test_many_values_of_many_facts_take_no_time(folder):
    """2,000 slices, each second one at the place of the one before it."""
    entries = [
        Entry(
            *(f"/{n}", 1, 1, "", "", f"1.{n}", "1.2", "1.3", "p", 16, 16, 0.5, 0.5),
            position=(0.0, 0.0, float(n // 2)),
            orientation=(1, 0, 0, 0, 1, 0),
            facts=tuple(f"{n % count}" for count in (90, 95, 99, 999, 2000, 7, 1, 1)),
            times=(f"{n:06d}", ""),
        )
        for n in range(2000)
    ]
    began = time.perf_counter()
    volumes = volumes_of(entries)
    assert time.perf_counter() - began < 10
    assert sum(map(len, volumes)) == 2000
