"""Smoothing along z: by hand, against scipy, at gaps and edges, and as a run's choice."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.special import expit, logit

from ich_keras.errors import DataError, UsageError
from ich_keras.labels import SIX, LabelSet
from ich_keras.levels import Level
from ich_keras.metrics.binary import binary_metrics
from ich_keras.metrics.smoothing import KERNELS, NO_SMOOTHING, choose_kernel, smooth
from ich_keras.report import _split_section

KERNEL = "0.2 0.6 0.2"
ONE = LabelSet(("bleed",))
CLASSES = LabelSet(("a", "b", "c"), exclusive=True)


def smoothed(logits, positions=None, uids=None, kernel=KERNEL):
    """Smooth one label's logits, given and returned as such."""
    values = expit(np.array(logits, float))[:, np.newaxis]
    positions = 5.0 * np.arange(len(values)) if positions is None else positions
    uids = ["s"] * len(values) if uids is None else uids
    return logit(smooth(values, uids, positions, kernel, ONE))[:, 0]


def test_by_hand():
    # .6 / 1.8 / .6 of 3; at the ends .2 and .6 are divided by .8.
    expected = [(0.6 * 1 + 0.2 * 4) / 0.8, 0.2 * 1 + 0.6 * 4 + 0.2 * -2, (0.2 * 4 + 0.6 * -2) / 0.8]
    np.testing.assert_allclose(smoothed([1, 4, -2]), expected, rtol=1e-9)
    np.testing.assert_allclose(smoothed([3]), [3])
    five = smoothed([1, 0, 0, 0, 0, 2], kernel="0.1 0.2 0.4 0.2 0.1")
    expected = [0.4 / 0.7, 0.2 / 0.9, 0.1, 0.2, 0.4 / 0.9, 0.8 / 0.7]
    expected[3] = 0.1 * 2  # two slices before the last
    np.testing.assert_allclose(five, expected, rtol=1e-9)


def test_series_do_not_mix_whatever_the_order_of_their_rows():
    together = smoothed([1, 7, 4, -5, -2], uids=list("abaab"), positions=[0, 0, 5, 10, 5])
    np.testing.assert_allclose(together[[0, 2, 3]], smoothed([1, 4, -5]))
    np.testing.assert_allclose(together[[1, 4]], smoothed([7, -2]))


@pytest.mark.parametrize(
    ("positions", "is_gap"),
    [
        ([0, 5, 10, 15, 20], False),
        ([0, 5, 10, 20, 25], False),  # one slice is missing: exactly twice the distance
        ([0, 5, 10, 20.01, 25.01], False),  # rounded positions
        ([0, 5, 10, 20.2, 25.2], True),
        ([0, 5, 10, 25, 30], True),
        ([30, 25, 20, 5, 0], True),  # superior to inferior
        ([0, 0, 0, 0, 5], False),  # slices at one place do not make 5 mm a gap
        ([np.nan] * 5, False),
        ([0, 5, 10, np.nan, 20], False),
    ],
)
def test_neighbours_end_at_a_gap(positions, is_gap):
    logits = [1.0, -2, 4, 3, -1]
    found = smoothed(logits, positions)
    if is_gap:
        expected = np.concatenate([smoothed(logits[:3]), smoothed(logits[3:])])
    else:
        expected = smoothed(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_wide_kernel_does_not_reach_over_a_gap():
    kernel = "0.1 0.2 0.4 0.2 0.1"
    found = smoothed([1.0, -2, 4, 3, -1], [0, 5, 20, 25, 30], kernel=kernel)
    expected = np.concatenate([smoothed(part, kernel=kernel) for part in ([1.0, -2], [4, 3, -1])])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != NO_SMOOTHING])
@pytest.mark.parametrize("seed", range(3))
def test_against_scipy_with_a_mask(kernel, seed):
    """Places of missing slices are masked out; the mask is smoothed alike and divided by."""
    random = np.random.default_rng(seed)
    parts, expected = [], []
    for number in range(6):
        mask = np.ones(random.integers(3, 30))
        # Two slices in a row are missing: a gap. The places are apart, and not at an end.
        holes = np.arange(7, len(mask) - 8, 11)
        mask[holes] = mask[holes + 1] = 0
        logits = random.normal(0, 3, (len(mask), 6))
        weights = np.array(KERNELS[kernel])
        summed = ndimage.correlate1d(logits * mask[:, None], weights, axis=0, mode="constant")
        total = ndimage.correlate1d(mask, weights, mode="constant")
        is_here = mask == 1
        # A kernel of five would reach over one missing slice, and must not over two.
        expected.append((summed[is_here].T / total[is_here]).T)
        uids = [f"s{number}"] * int(mask.sum())
        parts.append((logits[is_here], uids, 2.5 * np.flatnonzero(mask)))
    logits, uids, positions = (np.concatenate([part[n] for part in parts]) for n in range(3))
    found = smooth(expit(logits), uids, positions, kernel)
    np.testing.assert_allclose(found, expit(np.concatenate(expected)), rtol=1e-6)
    assert not np.allclose(found, expit(logits), rtol=1e-3)


def test_exclusive_labels_stay_a_distribution():
    values = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    found = smooth(values, ["s", "s"], [0, 5], KERNEL, CLASSES)
    powers = np.exp((0.6 * np.log(values[0]) + 0.2 * np.log(values[1])) / 0.8)
    np.testing.assert_allclose(found[0], powers / powers.sum(), rtol=1e-9)
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_none_gives_the_values_as_they_are_and_others_their_type():
    values = np.array([[0, 1, 0.3, 1e-9, 0.5, 1]], np.float32)
    assert smooth(values, ["s"], [0], NO_SMOOTHING) is values
    found = smooth(np.repeat(values, 3, axis=0), ["s"] * 3, [0, 5, 10], KERNEL)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert smooth(values[:0], [], [], KERNEL).shape == (0, 6)


def test_bad_input():
    values = np.full((2, 6), 0.5)
    with pytest.raises(UsageError, match="smoothing 'box'; expected one of none, "):
        smooth(values, ["s", "s"], [0, 5], "box")
    with pytest.raises(DataError, match="1 series UIDs and 2 positions; expected one of each"):
        smooth(values, ["s"], [0, 5], KERNEL)


def noisy(num_series=40, seed=0, noise=3.0):
    """Make bleeds of six neighbouring slices, and logits that are right but noisy."""
    random = np.random.default_rng(seed)
    truth = np.zeros((num_series, 20, 6), np.int8)
    truth[::2, 6:12] = 1
    logits = 2.0 * truth - 1 + random.normal(0, noise, truth.shape)
    uids = np.repeat([f"s{number}" for number in range(num_series)], 20)
    positions = np.tile(5.0 * np.arange(20), num_series)
    return truth.reshape(-1, 6), expit(logits.reshape(-1, 6)), uids, positions


def test_the_kernel_with_the_lowest_log_loss_is_chosen():
    truth, values, uids, positions = noisy()
    kernel, losses = choose_kernel(truth, values, uids, positions)
    assert set(losses) == set(KERNELS) and losses[kernel] == min(losses.values())
    assert losses[kernel] < losses[NO_SMOOTHING]
    found = binary_metrics(truth, smooth(values, uids, positions, kernel))
    assert losses[kernel] == found["log_loss"]

    # Certain and right: neighbours can only harm.
    certain = np.where(truth == 1, 0.999, 0.001)
    assert choose_kernel(truth, certain, uids, positions)[0] == NO_SMOOTHING
    # Nothing to choose between: the first.
    assert choose_kernel(truth, np.full(truth.shape, 0.5), uids, positions)[0] == NO_SMOOTHING


def test_missing_labels_do_not_count_in_the_choice():
    truth, values, uids, positions = noisy(8)
    truth[::3, 2] = -1
    _, losses = choose_kernel(truth, values, uids, positions)
    is_known = truth != -1
    entropy = -np.log(np.where(truth == 1, values, 1 - values))[is_known].mean()
    assert losses[NO_SMOOTHING] == pytest.approx(entropy)


def test_the_gain_is_told_per_slice_and_per_series():
    truth, values, uids, positions = noisy()
    better = smooth(values, uids, positions, KERNEL)
    level = Level(truth, better, uids, SIX, values)
    for one in (level, level.aggregated(uids, "max")):
        found = one.beside_unsmoothed()["unsmoothed"]
        before = binary_metrics(one.truth, one.unsmoothed)
        assert found["log_loss"] == before["log_loss"] and found["auroc"] == before["auroc"]
        gain = found["gain"]["auroc/any"]
        now = binary_metrics(one.truth, one.values)["auroc"]["any"]
        assert gain["value"] == pytest.approx(now - before["auroc"]["any"])
    assert level.beside_unsmoothed()["unsmoothed"]["gain"]["auroc/any"]["low"] > 0

    assert Level(truth, values, uids, SIX, values).beside_unsmoothed() == {}
    alone = Level(truth, better, np.repeat("p", len(uids)), SIX, values)
    assert alone.beside_unsmoothed()["unsmoothed"]["gain"] is None


def test_the_report_shows_what_smoothing_changed():
    truth, values, uids, positions = noisy()
    level = Level(truth, smooth(values, uids, positions, KERNEL), uids, SIX, values)
    metrics = binary_metrics(truth, level.values, truth.mean(axis=0).tolist())
    metrics |= {"smoothing": {"kernel": KERNEL, "chosen_on": "valid"}, **level.beside_unsmoothed()}
    text = "\n".join(_split_section("Test", {"slice": metrics}, True))
    assert f"Smoothing of the slices' logits along z: {KERNEL} (chosen on validation)." in text
    row = metrics["unsmoothed"]["gain"]["auroc/any"]
    old = metrics["unsmoothed"]["auroc"]["any"]
    assert f"| AUROC(any) | {old:.4f} | {row['value']:+.4f} | {row['low']:+.4f} to" in text
