"""Comparing runs: differences of the metrics, the same rows, and why runs cannot be compared."""

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_runs import made_run
from page_parts import PageParts

from ich_keras.cli import main
from ich_keras.comparison_summary import comparison_text
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.files import read_json, write_json
from ich_keras.labels import LABELS, LabelSet
from ich_keras.metrics.intervals import paired_bootstrap
from ich_keras.run_pages.comparison import compare
from ich_keras.run_pages.comparison_page import comparison_page


@pytest.fixture
def two(tmp_path):
    return made_run(tmp_path / "one"), made_run(tmp_path / "two", seed=1)


def shuffled(run, without=()):
    """Put the rows of the predictions in another order, with other numbers of patients."""
    path = run.predictions_file("test")
    table = pd.read_csv(path).sample(frac=1, random_state=3)
    table = table[~table["series_instance_uid"].isin(without)]
    table["patient_number"] = pd.factorize(table["patient_number"])[0]
    table.to_csv(path, index=False)


def test_differences_are_of_the_metrics_on_the_same_rows(two):
    shuffled(two[1])
    found = compare(two)
    assert found.names == ["one", "two"] and list(found.levels) == ["slice", "series"]
    tables = [pd.read_csv(run.predictions_file("test")) for run in two]
    tables[1] = tables[1].set_index("sop_instance_uid").loc[tables[0]["sop_instance_uid"]]
    truth = tables[0][[f"true_{name}" for name in LABELS]].to_numpy()
    values = [t[list(LABELS)].to_numpy(np.float32).astype(float) for t in tables]
    expected = paired_bootstrap(truth, values[1], values[0], tables[0]["patient_number"])
    level = found.levels["slice"]
    assert set(level.differences[0]) == set(expected)
    for name, row in expected.items():
        assert level.differences[0][name] == pytest.approx(row), name
    assert level.num_patients == 12 and level.num_left_out == [0, 0]
    for number, run in enumerate(two):
        metrics = read_json(run.metrics_file("test"))
        for name in ("slice", "series"):
            assert found.levels[name].metrics[number]["log_loss"] == pytest.approx(
                metrics[name]["log_loss"], rel=1e-6
            )
            assert found.levels[name].metrics[number]["auroc"] == pytest.approx(
                metrics[name]["auroc"]
            )


def test_a_run_differs_from_its_copy_by_nothing(tmp_path):
    one, two = made_run(tmp_path / "a" / "run"), made_run(tmp_path / "b" / "run")
    found = compare([one, two])
    assert found.names == ["a/run", "b/run"] and found.settings == []
    for row in found.levels["slice"].differences[0].values():
        assert row["value"] == 0 and row["low"] in (0, None) and row["high"] in (0, None)
    assert found.levels["slice"].differences[0]["auroc/any"]["low"] == 0
    assert "Their settings are the same." in comparison_text(found, 80)


def test_slices_and_series_are_compared_per_series(tmp_path):
    runs = [made_run(tmp_path / "slices"), made_run(tmp_path / "series", is_series=True)]
    found = compare(runs)
    assert list(found.levels) == ["series"]
    assert len(found.levels["series"].scores[0].names) == 24
    settings = {row[0]: row[1:] for row in found.settings}
    assert settings["inputs.view.kind"] == ["slice", "series"]
    assert "training.epochs" not in settings
    # The series of slices are their highest slices, as the run chose.
    table = pd.read_csv(runs[0].predictions_file("test"))
    highest = table.groupby("series_instance_uid", sort=False)["any"].max().to_numpy(np.float32)
    scores = found.levels["series"].scores[0]
    np.testing.assert_allclose(scores.values[:, -1], highest, rtol=1e-6)


def test_rows_that_one_view_skips_are_left_out_and_counted(two):
    shuffled(two[1], without=["t3"])
    found = compare(two)
    assert found.levels["slice"].num_left_out == [4, 0]
    assert len(found.levels["slice"].scores[0].names) == 92
    assert "Left out, because not all runs answer them: one: 4." in comparison_text(found, 100)


def test_without_patients_there_are_differences_but_no_intervals(two):
    for run in two:
        table = pd.read_csv(run.predictions_file("test")).drop(columns="patient_number")
        table.to_csv(run.predictions_file("test"), index=False)
    level = compare(two).levels["slice"]
    assert level.num_patients is None
    first, second = (metrics["auroc"]["any"] for metrics in level.metrics)
    assert level.differences[0]["auroc/any"] == {
        "value": second - first,
        "low": None,
        "high": None,
    }
    assert "n/a" in comparison_text(compare(two), 80)


def test_what_cannot_be_compared_says_why(tmp_path, two):
    one, other = two
    with pytest.raises(UsageError, match="1 run; expected at least two"):
        compare([one])
    with pytest.raises(UsageError, match="is given twice"):
        compare([one, other, one.path])
    own = made_run(tmp_path / "own", LabelSet(("bleed",)))
    with pytest.raises(DataError, match="one answers epidural.*; own answers bleed"):
        compare([one, own])
    split = made_run(tmp_path / "split", test="u")
    with pytest.raises(DataError, match="different splits: .* 24 and 24 members, 0 of them the sa"):
        compare([one, split])
    cache = made_run(tmp_path / "cache", test="u", cache="other")
    with pytest.raises(DataError, match="different caches, and of their 24 and 24 test series"):
        compare([one, cache])
    labels = made_run(tmp_path / "labels", data_seed=1)
    with pytest.raises(DataError, match="tested with different labels: .* of 96 rows per slice"):
        compare([one, labels])
    pixels = [made_run(tmp_path / d, pixels_of={"test": d}) for d in ("x", "y")]
    for run in pixels:
        write_json(run.checksums_file, {"weights": None, "files": {}})
    with pytest.raises(DataError, match="x and y were tested on other pixels"):
        compare(pixels)
    other.predictions_file("test").unlink()
    with pytest.raises(DataError, match="has no predictions of the test split.*--split test"):
        compare(two)
    other.report_file.unlink()
    with pytest.raises(StaleError, match="not a finished run"):
        compare(two)


def test_the_same_test_series_of_two_caches_are_compared(tmp_path):
    """As of two sizes: the fingerprints differ, the patients do not."""
    runs = [made_run(tmp_path / name, cache=name, seed=n) for n, name in enumerate("ab")]
    assert compare(runs).levels["slice"].num_patients == 12


def test_the_command_prints_and_writes_the_same_numbers(tmp_path, two):
    three = made_run(tmp_path / "<i>three", seed=2)
    out = tmp_path / "compare.html"
    arguments = ["compare", *(str(run) for run in (*two, three)), "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    page = PageParts.of(out.read_text(encoding="utf-8"))
    found = compare([*two, three])
    difference = found.levels["series"].differences[1]["auroc/any"]
    row = page.table("<i>three minus one, per series")["AUROC any"]
    # A page has a true minus, the terminal what every encoding has.
    shown = {name: row[name].replace("\u2212", "-") for name in ("difference", "95 % interval")}
    assert shown["difference"] == f"{difference['value']:+.4f}"
    assert shown["95 % interval"] == f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    assert all(text in result.output for text in shown.values())
    assert "These runs were trained and tested on phantoms" in page.warnings[0]
    assert "i" not in page.tags and "Synthetic data" in page.warnings[0]
    assert sum("ROC curves of any per slice" in alt for alt in page.charts) == 1
    assert max(map(len, comparison_text(found, 80).splitlines())) <= 80
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2 and "already exists" in again.output
    assert PageParts.of(comparison_page(found)).headings[0].startswith("Comparison of one, two")


def test_unfinished_and_damaged_runs_and_other_suffixes_are_refused(two, tmp_path, monkeypatch):
    arguments = ["compare", *(str(run) for run in two)]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "x.pdf")])
    assert result.exit_code == 2 and "ends in .html" in " ".join(result.output.split())
    metrics = read_json(two[1].metrics_file("test"))
    metrics["series"]["auroc"]["any"] = "x"
    write_json(two[1].metrics_file("test"), metrics)
    with pytest.raises(StaleError, match="series.auroc.any is 'x'"):
        compare(two)
    monkeypatch.setattr(type(two[0]), "is_interrupted", True)
    with pytest.raises(StaleError, match="only finished runs are compared.*--resume") as caught:
        compare(two)
    assert "--unfinished" not in str(caught.value)


def test_packages_that_differ_are_told(two):
    record = read_json(two[1].environment_file)
    write_json(two[1].environment_file, record | {"versions": {"a": "2"}})
    assert compare(two).environment == [["versions.a", "1", "2"]]
