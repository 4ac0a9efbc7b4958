"""One answer per study, of the series that counts."""

import pandas as pd
import pytest

from ich_keras.ct.kernels import is_sharp
from ich_keras.labels import LabelSet
from ich_keras.studies import study_table

LABELS = LabelSet(("bleed", "any"), "any")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("H30s", "B31f", "J30s", "Hr40", "H40s", "FC21", "FC64", "STANDARD", "SOFT", "UB"), False),
        (
            (
                "H60s",
                "B70f",
                "Hr64h",
                "J70h",
                "FC30",
                "FC81",
                "BONE",
                "BONEPLUS",
                "EDGE",
                "LUNG",
                "YC",
            ),
            True,
        ),
        (("", "  ", "CONVOLUTION", "12345"), None),
    ],
)
def test_kernels_are_known_by_their_makers_names(names, expected):
    assert {name: is_sharp(name) for name in names} == dict.fromkeys(names, expected)
    assert is_sharp("H60s\\3") is True


def tables(rows):
    """(study, series, verdict, kernel, spacing, slices, any, decision)."""
    columns = ("study", "series", "verdict", "kernel", "spacing", "slices", "any", "decision")
    table = pd.DataFrame(rows, columns=columns)
    answers = pd.DataFrame(
        {
            "series_instance_uid": table["series"],
            "num_slices": table["slices"],
            "verdict": table["verdict"],
            "any": table["any"],
            "bleed": 0.1,
            "decision_any": table["decision"],
            "decision_bleed": "no",
        }
    )
    series = pd.DataFrame(
        {
            "series_uid": table["series"],
            "study_instance_uid": table["study"],
            "kernel": table["kernel"],
            "slice_spacing_mm": table["spacing"],
        }
    )
    return answers, series.iloc[::-1]


ORDERS = {
    "a fault": [("ok", "H60s", 1.0, 5), ("gap", "H30s", 5.0, 30)],
    "a kernel": [("ok", "H30s", 1.0, 5), ("ok", "BONE", 5.0, 30)],
    "no kernel": [("ok", "", 1.0, 5), ("ok", "BONE", 5.0, 30)],
    "soft before none": [("ok", "H30s", 1.0, 5), ("ok", "", 5.0, 30)],
    "distance": [("ok", "H30s", 4.8, 5), ("ok", "H30s", 0.625, 200)],
    "distances alike": [("ok", "H30s", 5.2, 30), ("ok", "H30s", 5.0, 20)],
    "falling": [("ok", "H30s", -5.0, 30), ("ok", "H30s", 2.5, 60)],
    "no distance": [("ok", "H30s", 1.0, 5), ("ok", "H30s", float("nan"), 5)],
}


@pytest.mark.parametrize("rows", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("is_turned", [False, True])
def test_which_series_counts(rows, is_turned):
    """The first of each pair counts, in whatever order they come, whatever it answers."""
    named = [
        ("study", f"s{n}", verdict, kernel, spacing, slices, 0.9 * n, "yes" if n else "no")
        for n, (verdict, kernel, spacing, slices) in enumerate(rows)
    ]
    found = study_table(*tables(named[::-1] if is_turned else named), LABELS)
    assert found["series_instance_uid"].tolist() == ["s0"]
    assert found["num_series"].tolist() == [2]
    assert found["disagreement"].tolist() == ["any"]
    assert found["decision_any"].tolist() == ["no"]


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        # Without contrast medium before with it, and a head before none; the kernel goes before.
        (("ok", "H30s", 1.0, "", ""), ("ok", "H30s", 5.0, "yes", "")),
        (("ok", "H30s", 1.0, "no", ""), ("ok", "H30s", 5.0, "yes", "")),
        (("ok", "H30s", 5.0, "", ""), ("ok", "H30s", 1.0, "no", "")),
        (("ok", "H30s", 5.0, "yes", ""), ("ok", "BONE", 5.0, "no", "")),
        (("ok", "H30s", 5.0, "yes", ""), ("gap", "H30s", 5.0, "no", "")),
        (("gap", "BONE", 1.0, "yes", ""), ("ok", "H30s", 5.0, "no", "yes")),
    ],
)
def test_contrast_medium_and_empty_series_in_the_rule(first, second, is_turned):
    rows = [
        ("A", f"s{n}", verdict, kernel, spacing, 30, 0.5, "no")
        for n, (verdict, kernel, spacing, *_) in enumerate((first, second))
    ]
    answers, series = tables(rows)
    answers["contrast"], answers["empty"] = [first[3], second[3]], [first[4], second[4]]
    if is_turned:
        answers = answers.iloc[::-1].reset_index(drop=True)
    found = study_table(answers, series, LABELS)
    assert found["series_instance_uid"].tolist() == ["s0"]
    assert found["contrast"].tolist() == [first[3]]


def test_a_study_is_operated_where_any_of_its_series_shows_it():
    rows = [
        ("A", "a1", "ok", "H30s", 5.0, 30, 0.2, "no"),
        ("A", "a2", "ok", "B", 1.0, 9, 0.2, "no"),
    ]
    rows += [("B", "b", "ok", "H30s", 5.0, 30, 0.2, "no")]
    answers, series = tables(rows)
    answers["operated"] = ["", "yes", ""]
    found = study_table(answers, series, LABELS)
    assert found["series_instance_uid"].tolist() == ["a1", "b"]
    assert found["operated"].tolist() == ["yes", ""]


def test_studies_are_told_apart_and_agree():
    rows = [
        ("A", "a", "ok", "H30s", 5.0, 30, 0.2, "no"),
        ("B", "b1", "ok", "H60s", 5.0, 30, 0.8, "yes"),
        ("", "c", "ok", "", 5.0, 30, 0.3, ""),
        ("B", "b2", "ok", "H30s", 5.0, 30, 0.7, "yes"),
        ("", "d", "ok", "", 5.0, 30, 0.4, "yes"),
    ]
    found = study_table(*tables(rows), LABELS)
    assert found["study_instance_uid"].tolist() == ["A", "", "B", ""]
    assert found["series_instance_uid"].tolist() == ["a", "c", "b2", "d"]
    assert found["num_series"].tolist() == [1, 1, 2, 1]
    assert found["disagreement"].tolist() == [""] * 4
    assert found["any"].tolist() == [0.2, 0.3, 0.7, 0.4]


def test_a_prediction_without_decisions_has_none_to_disagree_on():
    answers, series = tables(
        [("A", "a", "ok", "", 5.0, 3, 0.2, ""), ("A", "b", "ok", "", 5.0, 3, 0.2, "")]
    )
    answers = answers.drop(columns=["decision_any", "decision_bleed"])
    found = study_table(answers, series, LABELS)
    assert found["disagreement"].tolist() == [""] and found["num_series"].tolist() == [2]
