"""Phantoms: geometry of the bleeds, labels from masks, encodings, files."""

import csv
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_keras.ct.dicom import read_hu, read_slice
from ich_keras.ct.series import index_folder
from ich_keras.data.rsna_labels import read_rsna_labels
from ich_keras.data.trivial import hu_band_counts, inside_skull, trivial_detector
from ich_keras.errors import DataError, UsageError
from ich_keras.labels import LABELS, SUBTYPES
from ich_keras.phantom.bleeds import MAX_BLEED_HU, MIN_BLEED_HU, Bleed, bleed_extent
from ich_keras.phantom.dicom import (
    encode_pixels,
    hex_identifier,
    sop_instance_uids,
    write_phantoms,
)
from ich_keras.phantom.head import draw_head
from ich_keras.phantom.head_slice import HeadSlice
from ich_keras.phantom.plan import (
    ENCODINGS,
    MASK_BITS,
    MIN_AREA_MM2,
    PhantomSpec,
    draw_patient,
    make_phantom,
    plan_phantoms,
)
from ich_keras.phantom.scan import _noise
from ich_keras.phantom.skull import skull_mm


def _phantom(*subtypes, seed=5, patient=0, series=0, matrix=96, encoding="signed-16"):
    return make_phantom(PhantomSpec(seed, patient, series, subtypes, encoding, matrix))


@pytest.fixture(scope="module")
def of_subtype():
    return {name: _phantom(name) for name in SUBTYPES}


def _axial_plane(head, height_mm, step_mm=1.0, half_mm=100):
    """A level slice in head coordinates: a stand-in for a scan without noise, blur or tilt."""
    y, x = np.mgrid[-half_mm : half_mm + step_mm : step_mm, -half_mm : half_mm + step_mm : step_mm]
    x, y = x.astype(np.float32), y.astype(np.float32)
    return HeadSlice(head, x, y, np.full_like(x, height_mm))


@pytest.fixture(scope="module")
def head():
    return draw_head(np.random.default_rng(11))


def test_same_spec_gives_the_same_numbers():
    first, second = _phantom("subdural", "epidural"), _phantom("subdural", "epidural")
    assert np.array_equal(first.hu, second.hu)
    assert np.array_equal(first.masks, second.masks)


def test_other_series_of_a_patient_shows_the_same_bleeds_elsewhere():
    first, second = _phantom("epidural"), _phantom("epidural", series=1)
    assert first.bleeds == second.bleeds
    assert first.scan.pixel_mm != second.scan.pixel_mm
    assert not np.array_equal(first.scan.centre, second.scan.centre)
    # The same blood in another pose and spacing has the same volume, within the sampling.
    assert first.volume_ml("epidural") == pytest.approx(second.volume_ml("epidural"), rel=0.15)
    assert _phantom("epidural", patient=1).bleeds != first.bleeds


@pytest.mark.parametrize("name", SUBTYPES)
def test_each_subtype_spans_neighbouring_slices_and_only_itself(of_subtype, name):
    phantom = of_subtype[name]
    column = SUBTYPES.index(name)
    positive = np.flatnonzero(phantom.labels()[:, column])
    assert len(positive) >= 2
    assert np.diff(positive).min() == 1
    others = [other for other in SUBTYPES if other != name]
    assert not any(phantom.mask(other).any() for other in others)
    assert np.array_equal(phantom.labels()[:, -1], phantom.labels()[:, column])


@pytest.mark.parametrize("name", SUBTYPES)
def test_blood_is_brighter_than_brain_by_its_own_contrast(of_subtype, name):
    phantom = of_subtype[name]
    (bleed,) = phantom.bleeds
    blood = phantom.mask(name)
    brain = phantom.mask("cavity") & ~blood & ~phantom.mask("ventricles")
    assert MIN_BLEED_HU <= bleed.hu <= MAX_BLEED_HU
    assert np.median(phantom.hu[blood]) > np.median(phantom.hu[brain]) + 8


def test_all_blood_lies_in_the_cavity(of_subtype):
    for name, phantom in of_subtype.items():
        assert not (phantom.mask(name) & ~phantom.mask("cavity")).any(), name


def test_intraventricular_blood_lies_in_the_ventricles(of_subtype):
    phantom = of_subtype["intraventricular"]
    assert not (phantom.mask("intraventricular") & ~phantom.mask("ventricles")).any()


def test_layered_blood_fills_the_back_of_the_ventricles(head):
    plane = _axial_plane(head, 12)
    bleed = Bleed("intraventricular", "layered", 60, 0, (0, 18, 0), (0, 0, 0))
    blood = bleed_extent(bleed, plane) > 0
    assert blood.any()
    assert np.array_equal(blood, (plane.ventricles > 0) & (plane.y > 18))


def test_epidural_blood_is_a_lens_on_the_skull(head):
    point = head.surface_point(np.array([1.0, 0.0, 0.0]))
    bleed = Bleed("epidural", "convexity", 60, 1, tuple(point), (18, 30, 0))
    plane = _axial_plane(head, 0, step_mm=0.5)
    blood = bleed_extent(bleed, plane) > 0
    assert plane.depth[blood].min() < 1  # touches the inner table
    middle = blood[200, :].sum() * 0.5
    assert middle == pytest.approx(18, abs=1)
    # Biconvex: the brain side bulges inwards too, past the chord between the lens's two tips.
    rows, columns = np.nonzero(blood)
    tips = columns[rows == rows.min()].mean(), columns[rows == rows.max()].mean()
    innermost = columns[rows == 200].min()
    assert innermost < min(tips) - 4
    assert (rows.max() - rows.min()) * 0.5 < 2 * 30 + 1


@pytest.mark.parametrize("side", [-1, 1])
def test_subdural_blood_is_a_crescent_on_one_side(head, side):
    direction = np.array([side * 0.95, 0.1, 0.3])
    point = head.surface_point(direction / np.linalg.norm(direction))
    bleed = Bleed("subdural", "convexity", 60, side, tuple(point), (9, 60, 40))
    plane = _axial_plane(head, float(point[2]))
    blood = bleed_extent(bleed, plane) > 0
    assert (plane.x[blood] * side > 0).all()
    assert plane.depth[blood].min() < 1.5
    assert plane.depth[blood].max() <= 9
    length = np.ptp(plane.y[blood])
    assert length > 6 * 9  # much longer than thick
    # Concave towards the brain: at the middle of its length it lies outside the tips' chord.
    rows = np.nonzero(blood.any(axis=1))[0]
    inner = [np.abs(plane.x[row][blood[row]]).min() for row in (rows[2], rows[len(rows) // 2])]
    assert inner[1] > inner[0] + 4


def test_subarachnoid_blood_lies_near_the_surface_or_in_the_cisterns(head):
    for kind, height in (("sulci", 30), ("cisterns", -14)):
        point = head.surface_point(np.array([0.8, 0.0, 0.6]))
        bleed = Bleed("subarachnoid", kind, 60, 0, tuple(point), (2, 45, 1.5))
        plane = _axial_plane(head, height)
        blood = bleed_extent(bleed, plane) > 0
        assert blood.any()
        if kind == "sulci":
            assert plane.depth[blood].max() <= 22
            assert (np.minimum(plane.sulcus_distance, plane.depth)[blood] <= 2).all()
        else:
            assert (plane.cisterns[blood] > -1.5 - 1e-3).all()


def test_intraparenchymal_blood_is_one_lump_off_the_skull(head):
    bleed = Bleed("intraparenchymal", "deep", 60, 1, (23, 0, 8), (14, 16, 12), 5)
    plane = _axial_plane(head, 8)
    blood = bleed_extent(bleed, plane) > 0
    assert plane.depth[blood].min() >= 3
    assert abs(plane.x[blood].mean() - 23) < 4
    area = blood.sum()
    assert 0.5 < area / (np.pi * 14 * 16) < 1.5


def test_bleeds_push_the_midline_away_from_their_side():
    shifts = {-1: [], 1: []}
    for patient in range(40):
        head, (bleed,) = draw_patient(("epidural",), np.random.default_rng(patient))
        assert head.midline_shift_mm * bleed.side < 0
        shifts[bleed.side].append(abs(head.midline_shift_mm))
        # In the middle of the head, the third ventricle lies as far off as the shift says.
        plane = _axial_plane(head, 8, half_mm=40)
        row = plane.ventricles[40]
        assert plane.x[40][row > 0].mean() == pytest.approx(head.midline_shift_mm, abs=1.5)
    assert len(shifts[-1]) > 8 < len(shifts[1])
    healthy, _ = draw_patient((), np.random.default_rng(0))
    assert healthy.midline_shift_mm == 0


def test_blood_of_mixed_age_is_denser_where_the_cells_sink():
    found = 0
    for patient in range(30):
        phantom = _phantom("subdural", patient=patient)
        (bleed,) = phantom.bleeds
        if not bleed.old_hu or bleed.kind != "convexity":
            continue
        blood = phantom.mask("subdural")
        index = int(blood.sum(axis=(1, 2)).argmax())
        rows, columns = np.nonzero(blood[index])
        values = phantom.hu[index][rows, columns]
        back = rows > np.quantile(rows, 0.75)
        front = rows < np.quantile(rows, 0.1)
        found += np.median(values[back]) > np.median(values[front]) + 5
    assert found >= 2


def test_the_skull_is_thin_at_the_temples_and_thick_at_the_back(head):
    plane = _axial_plane(head, -5)
    thickness = skull_mm(plane)
    x, y, _ = plane.directions
    temples, back = np.abs(x) > 0.97, (y > 0.98) & (np.abs(x) < 0.1)
    assert np.median(thickness[temples]) < 0.8 * head.skull_mm
    assert np.median(thickness[back]) > 1.3 * head.skull_mm
    assert thickness[plane.vault_depth < 0].min() > 1


def test_the_point_on_the_surface_lies_on_the_surface(head):
    for direction in np.random.default_rng(0).normal(size=(20, 3)):
        direction[2] = abs(direction[2])
        point = head.surface_point(direction / np.linalg.norm(direction))
        plane = _axial_plane(head, float(point[2]), step_mm=0.5)
        nearest = np.hypot(plane.x - point[0], plane.y - point[1]).argmin()
        # But for the relief of the inner table, which is not part of the shape.
        depth = (plane.vault_depth + plane.relief).flat[nearest]
        assert depth == pytest.approx(0, abs=1)


def test_the_box_holds_what_it_says(head):
    y, x = np.mgrid[-60.0:60:1.3, -70.0:50:1.3].astype(np.float32)
    turned = 0.9 * x - 0.3 * y, 0.3 * x + 0.9 * y
    plane = HeadSlice(head, *turned, np.full_like(x, 3))
    for across, along, centre in ((10, 5, (0, 0)), (8, 20, (30, -40)), (5, 5, (500, 0))):
        inside = np.abs(plane.x - centre[0]) < across
        inside &= np.abs(plane.y - centre[1]) < along
        boxed = np.zeros_like(inside)
        boxed[plane.box(across, along, centre)] = True
        assert not (inside & ~boxed).any()
        assert boxed.sum() <= 4 * inside.sum() + 200


def test_drawing_soft_tissue_coarsely_moves_and_changes_nothing():
    def measured(matrix):
        phantom = _phantom("subdural", "intraparenchymal", patient=2, matrix=matrix)
        names = (*phantom.spec.subtypes, "cavity")
        middle = len(phantom.hu) // 2
        _, rows, columns = np.nonzero(phantom.mask("cavity")[middle : middle + 1])
        pixels = np.array([columns.mean(), rows.mean()])
        centre = phantom.scan.origin[middle] + pixels @ phantom.scan.orientation * (
            phantom.scan.pixel_mm
        )
        return [phantom.volume_ml(name) for name in names], centre

    # At 512 the brain is drawn on every second pixel, at 256 on every one.
    volumes, centre = measured(512)
    other_volumes, other_centre = measured(256)
    assert volumes == pytest.approx(other_volumes, rel=0.01)
    assert centre == pytest.approx(other_centre, abs=0.1)  # mm; a pixel is 0.47


def test_a_holder_lies_behind_the_head_and_not_in_it():
    shares = []
    for patient in range(12):
        phantom = _phantom(patient=patient, matrix=128)
        holder = phantom.scan.holder
        if holder is None:
            continue
        middle = phantom.hu[len(phantom.hu) // 2]
        rows, columns = np.nonzero(phantom.mask("cavity")[len(phantom.hu) // 2])
        beyond = middle[rows.max() + 12 :, columns.min() : columns.max()]
        shares.append((np.abs(beyond - holder.hu) < 0.6 * holder.hu).any())
    assert len(shares) >= 8
    assert np.mean(shares) > 0.7


def test_noise_is_correlated_as_the_kernel_says():
    scan = replace(_phantom().scan, noise=5.0, noise_blur=1.0)
    soft, sharp = (
        _noise(replace(scan, sharpness=value), 128, np.random.default_rng(0))
        for value in (0.0, 0.8)
    )
    for noise in (soft, sharp):
        assert noise.std() == pytest.approx(5, rel=1e-3)

    def far(noise):
        return np.corrcoef(noise[:, :-4].ravel(), noise[:, 4:].ravel())[0, 1]

    # A sharp kernel takes out the slow part: neighbours four pixels off turn against each other.
    assert far(sharp) < far(soft) - 0.05


def test_masks_and_labels_meet_at_the_stated_area(of_subtype):
    for name, phantom in of_subtype.items():
        area_mm2 = phantom.mask(name).sum(axis=(1, 2)) * phantom.scan.pixel_mm**2
        expected = (area_mm2 >= MIN_AREA_MM2).astype(int)
        assert np.array_equal(phantom.labels()[:, SUBTYPES.index(name)], expected)


def test_any_is_the_or_of_the_five():
    labels = _phantom(*SUBTYPES).labels()
    assert labels.shape[1] == len(LABELS) == 6
    assert np.array_equal(labels[:, 5], labels[:, :5].max(axis=1))
    assert (labels[:, :5].sum(axis=0) > 0).all()


def test_healthy_heads_are_bright_somewhere_too():
    bright = [(_phantom(patient=k, matrix=64).hu > 55).any(axis=(1, 2)) for k in range(3)]
    for k, phantom in enumerate(_phantom(patient=k, matrix=64) for k in range(3)):
        assert not phantom.labels().any()
        inside = np.stack([inside_skull(image) for image in phantom.hu])
        assert ((phantom.hu > 55) & (phantom.hu < 80) & inside).sum() > 30, bright[k]


def test_skull_scalp_and_air_have_their_values():
    phantom = _phantom(matrix=128)
    middle = phantom.hu[len(phantom.hu) // 2]
    assert middle.max() > 900
    assert middle[0, 0] == -3024  # outside the round field of view
    assert np.median(middle[middle < -500]) <= -990


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_decode_to_the_same_hu(name):
    encoding = ENCODINGS[name]
    hu = np.array([[-1000, -1, 0, 1], [40, 80, 1000, 2047]], np.int16)
    raw = np.frombuffer(encode_pixels(hu, encoding), "<i2" if encoding.is_signed else "<u2")
    stored = raw.reshape(hu.shape).astype(int)
    if name == "wrapped-12":
        assert stored[0].tolist() == [3096, 4095, 0, 1]  # wrapped at 4096, by hand
        stored, intercept = (stored + 1000) % 4096, -1000
    else:
        intercept = encoding.intercept
    assert np.array_equal(stored + intercept, hu)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms") / "set"
    calls = []
    write_phantoms(out, 6, 3, matrix=64, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("drawing phantoms", 6, 6)
    return out


@pytest.fixture(scope="module")
def drawn():
    return [make_phantom(spec) for spec in plan_phantoms(6, 3, matrix=64)]


def test_files_hold_what_was_drawn_in_every_encoding(written, drawn):
    assert {phantom.spec.encoding for phantom in drawn} == set(ENCODINGS)
    for phantom in drawn:
        for index, uid in enumerate(sop_instance_uids(phantom.spec, len(phantom.hu))):
            path = written / "images" / f"{uid}.dcm"
            assert np.array_equal(read_hu(path), phantom.hu[index]), phantom.spec.encoding
        is_wrapped = phantom.spec.encoding == "wrapped-12"
        assert read_slice(path).repaired == (is_wrapped and (phantom.hu[index] < 0).any())


def test_headers_are_those_of_rsna(written):
    absent = ("InstanceNumber", "SliceThickness", "GantryDetectorTilt", "PixelPaddingValue")
    has_class = set()
    has_several_windows = set()
    for path in sorted((written / "images").iterdir()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid UIDs, which are the point here
            dataset = pydicom.dcmread(path)
            assert path.stem == dataset.SOPInstanceUID
        assert not any(keyword in dataset for keyword in absent)
        assert dataset.Modality == "CT"
        assert len(path.stem) == len("ID_") + 9
        has_class.add("SOPClassUID" in dataset)
        has_several_windows.add(dataset["WindowCenter"].VM)
    assert has_class == {True, False}
    assert has_several_windows == {1, 2}


def test_label_csv_has_six_rows_per_image(written, drawn):
    with open(written / "stage_2_train.csv", newline="") as stream:
        rows = list(csv.reader(stream))
    images = list((written / "images").iterdir())
    assert rows[0] == ["ID", "Label"]
    assert len(rows) == 1 + 6 * len(images)
    table = read_rsna_labels(written / "stage_2_train.csv")
    table = getattr(table, "table", table)
    for phantom in drawn:
        uids = sop_instance_uids(phantom.spec, len(phantom.hu))
        assert np.array_equal(table.loc[uids].to_numpy(), phantom.labels())


def test_masks_and_manifest_lie_beside(written, drawn):
    manifest = json.loads((written / "phantoms.json").read_text())
    assert manifest["what"].startswith("synthetic")
    assert manifest["mask_bits"] == list(MASK_BITS)
    for record, phantom in zip(manifest["series"], drawn, strict=True):
        with np.load(written / "masks" / f"{record['series_instance_uid']}.npz") as archive:
            assert np.array_equal(archive["masks"], phantom.masks)
            uids = archive["sop_instance_uid"].tolist()
        assert uids == sop_instance_uids(phantom.spec, len(phantom.hu))
        assert [bleed["subtype"] for bleed in record["bleeds"]] == list(phantom.spec.subtypes)
        assert record["positive_slices"]["any"] == phantom.labels()[:, 5].sum()


def test_index_finds_the_series_in_their_order(written, drawn):
    index = index_folder(written / "images")
    assert len(index.rejects) == 0
    assert len(index.series) == len(drawn)
    assert index.series.patient_id.nunique() == len({p.spec.patient for p in drawn})
    by_uid = index.slices.set_index("sop_instance_uid")
    for phantom in drawn:
        rows = by_uid.loc[sop_instance_uids(phantom.spec, len(phantom.hu))]
        assert rows.slice_index.tolist() == list(range(len(phantom.hu)))
        spacing = np.diff(rows.position_mm)
        assert spacing == pytest.approx(phantom.scan.slice_spacing_mm, abs=1e-3)


def test_workers_do_not_change_a_byte(written, tmp_path):
    again = write_phantoms(tmp_path / "again", 6, 3, matrix=64, workers=2)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for name in files:
        assert (written / name).read_bytes() == (again / name).read_bytes(), name


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        write_phantoms(tmp_path / "full", 1, 0, matrix=32)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "new", 2, 0, matrix=32, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_series": 0}, "0 series asked for"),
        ({"seed": -1}, "seed is -1"),
        ({"prevalence": 1.5}, "prevalence is 1.5"),
        ({"mix": "odd"}, "mix 'odd'; expected one of even, rsna"),
        ({"series_per_patient": 0.5}, "0.5 series per patient"),
        ({"matrix": 8}, "matrix is 8"),
        ({"workers": -1}, "-1 workers"),
        ({"slice_spacing_mm": (8.0, 5.0)}, "slice spacing is 8.0 to 5.0 mm"),
        ({"slice_spacing_mm": (5.0, math.inf)}, "slice spacing is 5.0 to inf mm"),
        ({"slice_spacing_mm": (5.0, math.nan)}, "slice spacing is 5.0 to nan mm"),
        ({"num_series": 10**9}, "1000000000 series asked for; expected .* at most 1,000,000"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        write_phantoms(tmp_path / "out", **{"num_series": 1, "seed": 0, "matrix": 32} | arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"subtypes": ("any",)}, "unknown subtype 'any'"), ({"encoding": "x"}, "unknown encoding")],
)
def test_bad_specs_are_named(change, message):
    with pytest.raises(UsageError, match=message):
        PhantomSpec(0, 0, 0, **change)


def test_the_mix_of_rsna_has_its_shares():
    specs = plan_phantoms(6000, 3, mix="rsna", series_per_patient=1)
    assert len({spec.patient for spec in specs}) == 6000
    bleeders = [spec.subtypes for spec in specs if spec.subtypes]
    assert len(bleeders) == 2400
    # Of 538 bleeding series in the thesis's validation set of 1,350.
    for name, count in zip(SUBTYPES, (22, 329, 240, 262, 224), strict=True):
        share = np.mean([name in names for names in bleeders])
        assert share == pytest.approx(count / 538, abs=0.03)


def test_patients_have_as_many_series_as_asked_for():
    specs = plan_phantoms(2000, 3, series_per_patient=3)
    patients = [spec.patient for spec in specs]
    assert 2000 / len(set(patients)) == pytest.approx(3, rel=0.05)
    assert max(np.bincount(patients)) <= 8
    assert all(spec.series == number for number, spec in enumerate(specs))


def test_plan_spreads_subtypes_and_series():
    specs = plan_phantoms(200, 1)
    subtypes = {spec.patient: spec.subtypes for spec in specs}
    bleeders = [names for names in subtypes.values() if names]
    assert len(bleeders) == len(subtypes) // 2
    assert 1.7 < np.mean([len(names) for names in bleeders]) < 2.3
    for name in SUBTYPES:
        assert 0.12 < np.mean([name in names for names in subtypes.values()]) < 0.28
    encodings = [spec.encoding for spec in specs]
    assert encodings.count("signed-16") == 192  # 96 %, as in the RSNA headers
    assert all(spec.subtypes == subtypes[spec.patient] for spec in specs)
    assert 120 < len(subtypes) < 180  # some patients have several series


@given(st.integers(0, 2**36 - 1), st.integers(0, 2**36 - 1), st.integers(0, 1000))
@settings(max_examples=50)
def test_identifiers_never_collide(first, second, seed):
    names = {hex_identifier(number, seed, 9) for number in (first, second)}
    assert len(names) == len({first, second})
    assert all(len(name) == 12 and int(name[3:], 16) >= 0 for name in names)


def test_band_counts_of_a_drawn_skull():
    hu = np.full((2, 40, 40), -1000, np.int16)
    hu[0, 5:35, 5:35] = 1000
    hu[0, 8:32, 8:32] = 35  # 24 x 24 inside; 22 x 22 without the margin
    hu[0, 15:20, 15:20] = 60
    hu[0, 25, 25] = 59
    hu[0, 2, 2] = 60  # outside
    counts = hu_band_counts(hu)
    assert counts.shape == (2, 12)
    assert counts[0].tolist() == [0, 0, 0, 22 * 22 - 26, 0, 1, 25, 0, 0, 0, 0, 0]
    assert not counts[1].any()  # nothing is enclosed by bone
    assert np.array_equal(hu_band_counts(hu, 0.25), counts * 0.25)


def test_trivial_detector_counts_bright_voxels():
    rng = np.random.default_rng(0)
    counts = rng.poisson(500, (200, 12)).astype(float)
    any_bleed = np.arange(200) % 2
    counts[any_bleed == 1, 6] += 400
    probabilities = trivial_detector(counts[:100], any_bleed[:100], counts[100:])
    assert probabilities[any_bleed[100:] == 1].min() > probabilities[any_bleed[100:] == 0].max()
    with pytest.raises(DataError, match="same label"):
        trivial_detector(counts, np.zeros(200, int), counts)
