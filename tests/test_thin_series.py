"""Thin series are averaged: in HU, by millimetres, never across a hole."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_keras.data.thin_series import (
    AS_THEY_ARE,
    SliceDistances,
    ThinRule,
    blocks_of,
    weighted_mean,
)
from ich_keras.errors import UsageError
from ich_keras.phantom.plan import PhantomSpec, draw_patient
from ich_keras.phantom.scan import draw_scan, scan_slice

FIVE = SliceDistances(5.0, 5.0)


def volume(count, seed=0):
    values = np.random.default_rng(seed).integers(-1024, 3000, (count, 3, 4))
    return values.astype(np.int16)


def averaged(positions, hu, distances=FIVE):
    return blocks_of(positions, "ok", distances).averaged(hu)


@pytest.mark.parametrize(("step", "count"), [(1.0, 5), (0.625, 8), (1.25, 4), (2.5, 2), (0.5, 10)])
@pytest.mark.parametrize("start", [0.0, -71.3])
def test_whole_numbers_of_slices_give_their_mean(step, count, start):
    hu = volume(4 * count)
    positions = start + step * np.arange(len(hu))
    found = blocks_of(positions, "ok", FIVE)
    expected = np.rint(hu.reshape(4, count, 3, 4).mean(axis=1)).astype(np.int16)
    np.testing.assert_array_equal(found.averaged(hu), expected)
    assert found.owner.tolist() == np.repeat(np.arange(4), count).tolist()
    np.testing.assert_allclose(found.centres_mm, positions.reshape(4, count).mean(axis=1))


def test_slices_count_by_the_millimetres_that_they_have_in_an_averaged_one():
    # Five of 2 mm: 2 + 2 + 1 mm, and 1 + 2 + 2 mm.
    hu = np.array([10, 20, 40, 60, 100], np.int16).reshape(5, 1, 1)
    found = averaged(2.0 * np.arange(5), hu)
    assert found.ravel().tolist() == [20, 72]  # (20 + 40 + 40) / 5, (40 + 120 + 200) / 5


def test_where_distances_vary_so_do_the_weights():
    # Spaces: -0.5 to 0.5, 1, 2.25, 3.75 and 4.5 mm; all in one of 5 mm.
    positions = np.array([0.0, 1.0, 1.5, 3.0, 4.5])
    hu = np.array([0, 8, 16, 40, 80], np.int16).reshape(5, 1, 1)
    edges = np.array([-0.5, 0.5, 1.25, 2.25, 3.75, 5.25])
    expected = np.rint((np.diff(edges) * hu.ravel()).sum() / 5.75)
    assert averaged(positions, hu).ravel().tolist() == [expected] == [35]


@pytest.mark.parametrize(
    ("count", "thick"), [(5, [5]), (6, [6]), (7, [7]), (8, [4, 4]), (12, [6, 6]), (13, [4, 5, 4])]
)
def test_what_does_not_divide_is_left_to_the_ends(count, thick):
    found = blocks_of(np.arange(float(count)), "ok", FIVE)
    assert [weights.sum() / 10_000 for weights in found.weights] == thick
    steps = np.diff(found.centres_mm)
    np.testing.assert_allclose(steps, 5)
    np.testing.assert_allclose(found.centres_mm.mean(), (count - 1) / 2)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_series_shorter_than_one_averaged_slice_makes_one(count):
    hu = volume(count)
    found = averaged(np.arange(float(count)), hu)
    np.testing.assert_array_equal(found, np.rint(hu.mean(axis=0, keepdims=True)))


def test_nothing_is_averaged_across_a_hole():
    # 5 slices of 1 mm, a hole of 3 mm, 5 more.
    positions = np.concatenate([np.arange(5.0), 7 + np.arange(5.0)])
    hu = np.repeat(np.array([100, 900], np.int16), 5).reshape(10, 1, 1)
    found = blocks_of(positions, "gap", FIVE)
    assert found.averaged(hu).ravel().tolist() == [100, 900]
    assert found.centres_mm.tolist() == [2, 9]
    assert found.owner.tolist() == [0] * 5 + [1] * 5
    # One missing slice of 1 mm is a hole, too; a distance of 1.4 mm is none.
    one_missing = np.concatenate([np.arange(2.0), 3 + np.arange(3.0)])
    assert len(blocks_of(one_missing, "gap", FIVE)) == 2
    assert len(blocks_of(np.array([0, 1, 2.4, 3.4]), "irregular", FIVE)) == 1


def test_the_thick_part_of_a_series_stays_as_it_is():
    positions = np.concatenate([np.arange(10.0), 14 + 5 * np.arange(4.0)])
    hu = volume(14)
    found = blocks_of(positions, "irregular", FIVE)
    np.testing.assert_array_equal(found.averaged(hu)[2:], hu[10:])
    assert found.centres_mm.tolist() == [2, 7, 14, 19, 24, 29]


@pytest.mark.parametrize(
    ("positions", "verdict", "distances"),
    [
        (5.0 * np.arange(30), "ok", FIVE),
        (3.0 * np.arange(30), "ok", FIVE),  # more than half
        (2.53 * np.arange(30), "ok", FIVE),
        (1.0 * np.arange(30), "ok", None),
        (1.0 * np.arange(30), "ok", SliceDistances(1.0, 5.0)),  # a quarter was as thin
        (1.0 * np.arange(30), "duplicate,tilted", FIVE),
        (np.zeros(1), "too few", FIVE),
        (np.zeros(0), "too few", FIVE),
        (np.array([0.0, np.nan, 2.0]), "ok", FIVE),
    ],
)
def test_other_series_are_left_as_they_are(positions, verdict, distances):
    assert blocks_of(positions, verdict, distances) is None


def test_half_the_distance_is_thin_and_may_be_kept():
    positions = 2.5 * np.arange(30) + 1e-6
    assert len(blocks_of(positions, "tilted", FIVE)) == 15
    assert ThinRule(FIVE).blocks(positions, "ok") is not None
    assert ThinRule(FIVE, "keep").blocks(positions, "ok") is None
    assert AS_THEY_ARE.blocks(positions, "ok") is None
    with pytest.raises(UsageError, match=r"thin 'mean'; expected one of average, keep\."):
        ThinRule(FIVE, "mean")


def by_sampling(positions, hu, edges):
    """The means of a staircase between edges, sampled every 0.01 mm."""
    found = []
    for low, high in itertools.pairwise(edges):
        places = np.arange(low + 0.005, high, 0.01)
        nearest = np.abs(places[:, None] - positions).argmin(axis=1)
        found.append(hu[nearest].mean(axis=0))
    return np.array(found)


@given(
    st.lists(st.integers(85, 115), min_size=9, max_size=60),
    st.sampled_from([3.0, 5.0, 6.1]),
    st.integers(0, 99),
)
def test_means_are_those_of_the_tissue_between_the_edges(steps, thickness, seed):
    positions = np.cumsum([0, *steps]) / 100
    hu = volume(len(positions), seed)
    found = blocks_of(positions, "irregular", SliceDistances(thickness, thickness))
    low = positions[0] - (positions[1] - positions[0]) / 2
    high = positions[-1] + (positions[-1] - positions[-2]) / 2
    inner = (found.centres_mm[1:] + found.centres_mm[:-1]) / 2
    edges = np.concatenate([[low], inner, [high]])
    result = found.averaged(hu)
    # A step may lie on an edge of the samples.
    np.testing.assert_allclose(result, by_sampling(positions, hu, edges), atol=0.51 + 4100 * 0.005)
    # What is put in comes out, and every slice has one owner.
    total = sum(weights.sum() for weights in found.weights) / 10_000
    assert total == pytest.approx(high - low, abs=0.02)
    assert set(np.diff(found.owner)) <= {0, 1} and found.owner[-1] == len(found) - 1
    assert (np.abs(positions - found.centres_mm[found.owner]) <= 0.75 * thickness + 0.01).all()
    same = np.full((len(positions), 2, 2), seed - 50, np.int16)
    assert (found.averaged(same) == seed - 50).all()


def test_halves_are_rounded_to_even_whatever_the_order():
    hu = np.array([-1, 0, 1, 2], np.int16).reshape(4, 1, 1)
    equal = np.full(2, 6250.0)
    assert weighted_mean(hu[:2], equal).item() == 0
    assert weighted_mean(hu[1:3], equal).item() == 0
    assert weighted_mean(hu[2:], equal).item() == 2
    assert weighted_mean(hu[::-1][:2], equal).item() == 2
    extremes = np.array([-32768, -32768, 32767], np.int16).reshape(3, 1, 1)
    assert weighted_mean(extremes, np.ones(3)).item() == -10923


def test_the_middle_slice_stands_for_an_averaged_one():
    import pandas as pd

    found = blocks_of(np.arange(13.0), "ok", FIVE)
    assert found.middle_rows().tolist() == [1, 6, 10]
    table = pd.DataFrame({"position_mm": np.arange(13.0), "name": list("abcdefghijklm")})
    seen = found.table(table)
    assert seen["name"].tolist() == ["b", "g", "k"]
    assert seen["position_mm"].tolist() == [1, 6, 11]


def drawn(spacing_mm, heights_mm, noise):
    """The same head at given heights, scanned with some slice distance: float32, HU."""
    spec = PhantomSpec(seed=5, patient=3, series=0, subtypes=("intraparenchymal",), matrix=128)
    head, bleeds = draw_patient(spec.subtypes, np.random.default_rng(1))
    scan = draw_scan(head, spec.matrix, (5.0, 5.0), np.random.default_rng(2))
    up = scan.origin[1] - scan.origin[0]
    scan = dataclasses.replace(
        scan,
        slice_spacing_mm=spacing_mm,
        origin=scan.origin[0] + np.outer(np.asarray(heights_mm) / 5, up),
        noise=noise,
        streak=0.0,
        metal=None,
    )
    random = np.random.default_rng(int(10 * spacing_mm))
    mask = np.zeros((len(heights_mm), 128, 128), np.uint8)
    return np.stack(
        [
            np.nan_to_num(scan_slice(head, bleeds, scan, n, mask[n], random), nan=-1024.0)
            for n in range(len(heights_mm))
        ]
    )


def test_a_phantom_drawn_thin_and_averaged_is_the_one_drawn_thick():
    heights = np.arange(35, 75.0)
    thin = np.rint(drawn(1.0, heights, noise=6.0)).astype(np.int16)
    found = averaged(heights, thin).astype(float)
    # Thick slices are those that average: what lies in 5 mm, without noise.
    exact = drawn(1.0, heights, noise=1e-6).reshape(8, 5, 128, 128).mean(axis=1)
    at_centres = drawn(5.0, heights.reshape(8, 5).mean(axis=1), noise=1e-6)
    brain = (exact > 0) & (exact < 90)
    assert brain.sum() > 20_000
    noise_thin = (thin[2::5] - drawn(1.0, heights[2::5], noise=1e-6))[brain].std()
    noise_averaged = (found - exact)[brain].std()
    assert noise_thin == pytest.approx(6.0, rel=0.2)
    assert noise_averaged == pytest.approx(noise_thin / np.sqrt(5), rel=0.15)
    assert abs((found - exact)[brain].mean()) < 0.1
    # A phantom's thick slices show their middle; half of the brain is the same within 1 HU.
    assert np.median(np.abs(exact - at_centres)[brain]) < 1
    assert abs(np.median((found - at_centres)[brain])) < 0.5


def test_distances_of_a_training_are_the_quartile_and_the_median():
    assert SliceDistances.of([4, 5, -5, np.nan, 6]) == SliceDistances(4.75, 5.0)
    assert SliceDistances.of([5.0] * 8 + [1.0]) == SliceDistances(5.0, 5.0)
    assert SliceDistances.of([np.nan, 0.0]) is None
    assert SliceDistances.from_record(None) is None
    assert SliceDistances.from_record(FIVE.record()) == FIVE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5.0, "does not hold lower_quartile and median"),
        ({"median": 5.0}, "does not hold"),
        ({"lower_quartile": "5", "median": 5.0}, "'5' is not a number"),
        ({"lower_quartile": True, "median": 5.0}, "True is not a number"),
        ({"lower_quartile": 6.0, "median": 5.0}, "6 and 5 are not a quartile and a median"),
        ({"lower_quartile": 0, "median": 5.0}, "0 and 5 are not"),
        ({"lower_quartile": float("nan"), "median": 5.0}, "nan and 5 are not"),
        ({"lower_quartile": 1.0, "median": float("inf")}, "1 and inf are not"),
    ],
)
def test_damaged_distances_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        SliceDistances.from_record(content)
