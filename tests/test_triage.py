"""A worklist in the order of a network."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ich_keras.metrics.triage import SHARES, triage


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 30), st.integers(0, 999), st.sampled_from([1, 8]))
def test_expected_values_are_the_means_over_random_orders_of_ties(n, seed, digits):
    random = np.random.default_rng(seed)
    truth = random.random(n) < 0.4
    truth[0] = True
    values = random.random(n).round(digits)
    found = triage(truth, values)
    firsts, curves = [], []
    for _ in range(400):
        shuffled = random.permutation(n)
        order = shuffled[np.argsort(-values[shuffled], kind="stable")]
        hits = truth[order].cumsum()
        firsts.append(np.argmax(hits > 0) + 1)
        curves.append(np.interp(np.array(SHARES) * n, range(n + 1), [0, *hits]) / truth.sum())
    near = 5 * np.std(firsts) / 20 + 1e-9
    assert found["first_positive"] == pytest.approx(np.mean(firsts), abs=near)
    np.testing.assert_allclose(found["found"], np.mean(curves, axis=0), atol=0.12)
    assert found["found"][-1] == 1
    if not truth.all():
        # The mean place of the positives and the AUROC are the same fact.
        share = truth.mean()
        auroc = roc_auc_score(truth, values)
        assert found["mean_place"] == pytest.approx(share / 2 + (1 - share) * (1 - auroc))


def test_a_perfect_order_finds_all_in_their_share():
    truth = np.arange(20) < 4
    found = triage(truth, 1 - np.arange(20) / 20)
    assert dict(zip(found["read"], found["found"], strict=True)) == pytest.approx(
        {0.05: 0.25, 0.1: 0.5} | dict.fromkeys(SHARES[2:], 1.0)
    )
    assert found["first_positive"] == 1 and found["first_positive_as_they_come"] == 21 / 5
    same = triage(truth, np.full(20, 0.5))
    assert same["found"] == pytest.approx(list(SHARES))
    assert same["first_positive"] == same["first_positive_as_they_come"]
    assert same["mean_place"] == 0.5
    assert triage(np.zeros(3, bool), np.zeros(3)) is None
