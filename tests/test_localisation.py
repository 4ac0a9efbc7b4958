"""How well maps find a bleed: metrics by hand and against other packages; the experiment's page."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from ich_keras.errors import DataError
from ich_keras.metrics.intervals import mean_interval
from ich_keras.metrics.localisation import (
    near,
    pixel_precision,
    pointing_hit,
    rank_correlation,
    share_found,
)

EVERYWHERE = np.ones((3, 4), bool)
MASK = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool)


def test_the_highest_value_counts_and_ties_are_shared():
    scores = np.zeros((3, 4))
    scores[0, 1] = 2
    assert pointing_hit(scores, MASK, EVERYWHERE) == 1
    scores[2, 2] = 3
    assert pointing_hit(scores, MASK, EVERYWHERE) == 0
    scores[0, 0] = 3
    assert pointing_hit(scores, MASK, EVERYWHERE) == 0.5
    region = EVERYWHERE.copy()
    region[2] = False  # outside the head it does not count
    assert pointing_hit(scores, MASK, region) == 1


def test_a_map_without_an_answer_scores_as_chance():
    flat = np.zeros((3, 4))
    for score in (pointing_hit, share_found, pixel_precision):
        assert score(flat, MASK, EVERYWHERE) == pytest.approx(2 / 12)


def test_overlap_by_hand():
    scores = np.arange(12.0).reshape(3, 4)
    assert share_found(-scores, MASK, EVERYWHERE) == 1
    assert share_found(scores, MASK, EVERYWHERE) == 0
    scores[0, 0] = 20
    assert share_found(scores, MASK, EVERYWHERE) == 0.5
    # One pixel above the threshold, and three that share it, one of them in the mask.
    scores = np.zeros((3, 4))
    scores[0, 0], scores[0, 1], scores[1, 1:3] = 5, 2, 2
    assert share_found(scores, MASK, EVERYWHERE) == pytest.approx((1 + 1 / 3) / 2)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_average_precision_is_that_of_scikit_learn(seed, levels):
    rng = np.random.default_rng(seed)
    scores, mask = rng.integers(0, levels, (6, 7)), rng.random((6, 7)) < 0.3
    mask[0, 0] = True
    region = rng.random((6, 7)) < 0.8
    region[0, 0] = True
    expected = average_precision_score(mask[region], scores[region])
    assert pixel_precision(scores.astype(float), mask, region) == pytest.approx(expected)


@given(st.integers(0, 2**32 - 1))
def test_rank_correlation_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 5, (4, 5)), rng.normal(size=(4, 5))
    one[0, :2] = 0, 1
    expected = spearmanr(one.ravel(), other.ravel()).statistic
    assert rank_correlation(one.astype(float), other) == pytest.approx(expected)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3), st.floats(0.3, 3), st.floats(0, 6))
def test_near_is_the_distance_to_the_mask(seed, row_mm, column_mm, tolerance_mm):
    mask = np.random.default_rng(seed).random((9, 11)) < 0.05
    mask[4, 4] = True
    distance = distance_transform_edt(~mask, sampling=(row_mm, column_mm))
    found = near(mask, row_mm, column_mm, tolerance_mm)
    is_sure = np.abs(distance - tolerance_mm) > 1e-6
    np.testing.assert_array_equal(found[is_sure], (distance <= tolerance_mm)[is_sure])


def test_a_mask_that_is_empty_has_nothing_near():
    assert not near(np.zeros((4, 4), bool), 1.0, 1.0, 5.0).any()


def test_intervals_of_means_are_by_patient():
    values = np.array([1.0, 1.0, 1.0, 0.0])
    found = mean_interval(values, ["a", "a", "a", "b"], resamples=400)
    assert found["value"] == 0.75
    assert (found["low"], found["high"]) == (0, 1)  # all of a, or all of b
    same = mean_interval(np.full(6, 0.3), list("aabbcc"))
    assert same["low"] == pytest.approx(0.3) and same["high"] == pytest.approx(0.3)
    alone = mean_interval(values, ["a"] * 4)
    assert alone == {"value": 0.75, "low": None, "high": None, "resamples": 0}
    with pytest.raises(DataError, match="expected one each"):
        mean_interval(values, ["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((2, 2))}, r"scores \(2, 2\), mask \(3, 4\)"),
        ({"region": np.zeros((3, 4), bool)}, "the region is empty"),
        ({"scores": np.full((3, 4), np.nan)}, "scores are not finite"),
        ({"mask": np.zeros((3, 4), bool)}, "no pixel of the mask lies in the region"),
    ],
)
def test_what_cannot_be_scored_is_said(change, message):
    given = {"scores": np.zeros((3, 4)), "mask": MASK, "region": EVERYWHERE, **change}
    with pytest.raises(DataError, match=message):
        share_found(**given)


def test_what_cannot_be_compared_is_said():
    with pytest.raises(DataError, match="arrays of shapes"):
        rank_correlation(np.ones(3), np.ones(4))
    with pytest.raises(DataError, match="not finite"):
        rank_correlation(np.array([1, np.inf]), np.ones(2))


def made_phantom(subtypes, seed=3, patient=0, matrix=64):
    from ich_keras.phantom.plan import PhantomSpec, make_phantom

    spec = PhantomSpec(
        seed, patient, patient, subtypes, "signed-16", matrix, slice_spacing_mm=(9, 10)
    )
    return make_phantom(spec)


def test_a_perfect_map_scores_1_and_chance_is_told():
    from experiments.localisation import brightest, scores_of
    from ich_keras.ct.head import head_mask

    phantom = made_phantom(("intraparenchymal",), matrix=128)
    head = head_mask(phantom.hu, *phantom.spacing_mm[1:])
    mask = phantom.mask("intraparenchymal")
    perfect = {"intraparenchymal": mask.astype(float), "any": -mask.astype(float)}
    rows = pd.DataFrame(scores_of(phantom, perfect, head))
    assert set(rows["level"]) == {"slice", "series"}
    right, wrong = rows[rows["label"] == "intraparenchymal"], rows[rows["label"] == "any"]
    assert (right[["hit", "share", "precision"]] == 1).all(axis=None)
    assert (wrong["share"] == 0).all()
    # Last of all, and all at one threshold.
    np.testing.assert_allclose(wrong["precision"], wrong["chance_share"])
    assert (right["chance_share"] < right["chance_hit"]).all()
    number = int(right[right["level"] == "slice"]["slice"].iloc[0])
    assert right.iloc[0]["chance_share"] == pytest.approx(
        mask[number].sum() / (head[number] | mask[number]).sum()
    )
    # Blood is bright: this phantom's is found without a network.
    bright = scores_of(phantom, {"any": brightest(phantom)}, head)
    assert np.mean([row["hit"] for row in bright]) > 0.5


def test_brightest_voxels_leave_out_bone_and_what_is_outside():
    from experiments.localisation import brightest

    phantom = made_phantom(())
    scores = brightest(phantom)
    assert (scores[~phantom.mask("cavity")] == -1000).all()
    assert (scores[phantom.hu > 100] == -1000).all()
    assert scores.max() <= 100


@pytest.mark.slow
def test_the_page_says_what_was_measured(tmp_path):
    from untrained_runs import untrained_run

    from experiments.localisation import OPTIONS, measure
    from experiments.localisation_page import write_page
    from ich_keras.models.spec import ModelSpec

    spec = ModelSpec((32, 32, 3), depth=10, width=4)
    run = untrained_run(tmp_path / "run", "narrow_2d", spec, size=32)
    kinds = ("subdural",), (), ("epidural", "intraventricular"), ()
    phantoms = [made_phantom(kind, patient=number) for number, kind in enumerate(kinds * 2)]
    told = []
    measured = {"slice": measure(run, phantoms, told.append)}
    assert len(told) == len(OPTIONS)
    page = write_page(tmp_path / "out", measured, phantoms, {"slice": run})
    text = page.read_text()
    assert "**Synthetic" in text and "n.j." in text
    assert "brightest voxels" in text and "chance" in text
    table = pd.read_csv(tmp_path / "out" / "localisation.csv")
    assert set(table["metric"]) == {"hit", "share", "precision"}
    own = table[(table["method"] == "brightest voxels")]
    assert (own["gain"] == 0).all()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "localisation.csv",
        "hits.svg",
        "examples.png",
    }


def test_runs_are_told_apart_by_what_they_see(tmp_path, monkeypatch):
    from click.testing import CliRunner
    from untrained_runs import untrained_run

    from experiments import localisation, localisation_page
    from experiments.__main__ import main
    from ich_keras.errors import UsageError
    from ich_keras.labels import label_set
    from ich_keras.models.spec import ModelSpec

    spec = ModelSpec((32, 32, 3), depth=10, width=4)
    one, two = (untrained_run(tmp_path / n, "narrow_2d", spec, size=32) for n in "ab")
    assert localisation.runs_by_view([one]) == {"slice": one}
    with pytest.raises(UsageError, match="both see slice"):
        localisation.runs_by_view([one, two])
    own = label_set(("bleed",))
    other = untrained_run(tmp_path / "c", "narrow_2d", spec, size=32, labels=own)
    with pytest.raises(UsageError, match="answers bleed; expected RSNA's six labels"):
        localisation.measure(other, [], print)

    monkeypatch.setattr(localisation, "scored_phantoms", lambda: iter(["phantom"]))
    monkeypatch.setattr(localisation, "measure", lambda run, phantoms, tell: (run, phantoms))
    written = []
    monkeypatch.setattr(localisation_page, "write_page", lambda *given: written.append(given))
    arguments = ["localisation", "--run", str(one), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    out, measured, phantoms, runs = written[0]
    assert out == tmp_path / "out" and runs == {"slice": one} and phantoms == ["phantom"]
    assert measured == {"slice": (one, ["phantom"])}
