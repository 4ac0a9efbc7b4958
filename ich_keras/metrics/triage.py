"""A worklist in the order of a network: what is found by when, against reading as it comes.

Series of equal probability are read in random order: all numbers are expected values over it.
"""

import numpy as np

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def triage(truth: np.ndarray, values: np.ndarray) -> dict | None:
    """Say how much of what is positive is found after reading the likeliest first.

    Args:
        truth: bool (n,), of one label; samples without it are left out before.
        values: float (n,), probabilities.

    Returns:
        JSON-able: "read": `SHARES` of the samples; "found": share of the positive ones among them;
        "first_positive": how many are read up to the first positive one, itself included, and
        "first_positive_as_they_come": the same in random order; "mean_place": the mean place of a
        positive sample, 0 (first) to 1 (last), .5 in random order. None without positives.

    >>> truth = np.array([True, False, False, True, False])
    >>> found = triage(truth, np.array([0.9, 0.8, 0.3, 0.3, 0.1]))
    >>> found["first_positive"], found["first_positive_as_they_come"]  # of 5, 2 are positive
    (1.0, 2.0)
    >>> dict(zip(found["read"], found["found"]))[0.6]  # the first, and half of the tie
    0.75
    """
    truth, values = np.asarray(truth, bool), np.asarray(values, np.float64)
    number, positive = len(truth), int(truth.sum())
    if not positive:
        return None
    order = np.argsort(-values, kind="stable")
    sorted_values, is_positive = values[order], truth[order]
    starts = np.flatnonzero(np.diff(sorted_values, prepend=np.inf))
    stops = np.append(starts[1:], number)
    hits = np.add.reduceat(is_positive.astype(float), starts)
    # Within a tie, positives are spread evenly: the expected count grows in a straight line.
    edges, found = np.append(0, stops), np.append(0, np.cumsum(hits))
    first = int(np.flatnonzero(hits)[0])
    size, count = int(stops[first] - starts[first]), int(hits[first])
    # The expected place of the first of `count` things among `size` in random order.
    first_place = float(starts[first]) + (size + 1) / (count + 1)
    middles = (starts + stops) / 2
    return {
        "read": list(SHARES),
        "found": [float(np.interp(share * number, edges, found) / positive) for share in SHARES],
        "first_positive": first_place,
        "first_positive_as_they_come": (number + 1) / (positive + 1),
        "mean_place": float((hits * middles).sum() / positive / number),
    }
