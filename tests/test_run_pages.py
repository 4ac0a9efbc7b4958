"""report.html: numbers of the run's files, warnings, hostile texts, runs that lack files."""

import base64
import re
import shutil
from copy import deepcopy

import cv2
import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from made_runs import made_run
from narrow import preset_of
from page_parts import PageParts
from sklearn.metrics import average_precision_score
from test_training import NARROW, config_of

from ich_keras import training
from ich_keras.cli import main
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.views import View
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.explanation import explain
from ich_keras.files import read_json, write_json
from ich_keras.labels import LABELS, SIX, LabelSet
from ich_keras.metrics.binary import binary_metrics, format_metric
from ich_keras.metrics.curves import curves
from ich_keras.models.spec import ModelSpec
from ich_keras.pages.chart import text_width
from ich_keras.run_folder import RunFolder
from ich_keras.run_pages.figures import _stepped
from ich_keras.run_pages.heat import _samples_of, _slice_of, heat_maps_of
from ich_keras.run_pages.metrics_form import wrong_entry
from ich_keras.run_pages.numbers import flat
from ich_keras.run_pages.report import NO_CACHE, write_report_page
from ich_keras.run_pages.scores import read_results
from ich_keras.run_pages.tables import constant_log_loss
from ich_keras.run_pages.thumbnails import heated, worst
from ich_keras.training import train
from ich_keras.verification import verify

SMALL = 3 * 2**20


@pytest.fixture(scope="module")
def trained(phantom_cache, tmp_path_factory):
    """A short training, with the page that it made at its end."""
    with preset_of(NARROW, ModelSpec(input_shape=(48, 48, 3), width=8)):
        out = train(config_of(), phantom_cache, tmp_path_factory.mktemp("trained") / "run")
    return RunFolder(out)


@pytest.fixture
def copy(trained, tmp_path):
    return RunFolder(shutil.copytree(trained.path, tmp_path / "copy"))


def page_of(run, cache=None, **settings) -> PageParts:
    return PageParts.of(write_report_page(run, cache, **settings).read_text(encoding="utf-8"))


def test_a_training_leaves_a_page_with_its_numbers(trained, phantom_cache):
    page = trained.page_file().read_text(encoding="utf-8")
    assert len(page) < SMALL
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    found = PageParts.of(page)
    metrics = trained.metrics("test")
    table = found.table("AUROC and average precision (AP) with 95 % intervals")
    for label in LABELS:
        for level in ("slice", "series"):
            part = metrics[level]
            for metric, name in (("auroc", "AUROC"), ("ap", "AP")):
                text = table[label][f"{name} per {level}"]
                assert text.startswith(format_metric(part["per_label"][label][metric], 3))
                row = part["intervals"]["metrics"][f"{metric}/{label}"]
                if row["low"] is not None:
                    assert text.endswith(f"({row['low']:.3f} to {row['high']:.3f})")
            positive = part["n"]["positive"][label]
            assert table[label][f"positive, per {level}"].startswith(f"{positive} of ")
    overall = found.table("Per slice: the model beside constant answers")
    assert overall["log loss"]["model"] == f"{metrics['slice']['log_loss']:.4f}"
    assert f"AUROC(any): {metrics['slice']['trivial_auroc_any']:.3f}" in found.text
    assert found.warnings[0].startswith("Synthetic data. This run was trained")
    assert len(found.charts) > 20 and found.pictures
    assert "Unfinished" not in found.text
    # The data card is that of the cache.
    card = found.table("All of the data")
    assert card["slices"]["value"] == f"{len(phantom_cache):,}"
    assert card["patients"]["value"] == str(phantom_cache.slices["patient_id"].nunique())
    assert found.table("Time")["evaluating test"]["time"].endswith(" s")
    settings = {row[0]: row[1] for row in found.tables["Settings, as they were decided"]}
    assert settings["training.epochs"] == "2" and settings["inputs.size"] == "48"


def test_patients_are_not_named(trained, phantom_cache):
    page = trained.page_file().read_text(encoding="utf-8")
    for patient in phantom_cache.slices["patient_id"].unique():
        assert patient not in page
    assert not any(uid in page for uid in phantom_cache.series["study_instance_uid"])


def test_the_page_is_among_the_checksums_and_made_again(copy, phantom_cache):
    assert any("files match" in line for line in verify(copy.path))
    before = copy.page_file().read_bytes()
    result = CliRunner().invoke(main, ["report", str(copy)])
    assert result.exit_code == 0, result.output
    assert f"With them: ich report {copy} --cache {phantom_cache.path.absolute()}" in result.output
    after = copy.page_file().read_bytes()
    assert after != before and NO_CACHE.replace("`", "").split(",")[0].encode() in after
    verify(copy.path)
    write_report_page(copy)
    assert copy.page_file().read_bytes() == after  # the same files, the same page
    copy.page_file().write_text("changed")
    with pytest.raises(StaleError, match="report.html changed or lost"):
        verify(copy.path)


def test_the_counts_of_decisions_are_those_of_the_predictions(trained):
    found = PageParts.of(trained.page_file().read_text(encoding="utf-8"))
    table = pd.read_csv(trained.predictions_file("test"))
    limits = trained.choices()["slice"]["thresholds"]["0.90"]
    rows = found.table("Per slice, thresholds for a specificity of 0.90")
    for label in LABELS:
        truth = table[f"true_{label}"].to_numpy() == 1
        yes = table[label].to_numpy(np.float32).astype(float) >= limits[label]
        counts = [(truth & yes), (truth & ~yes), (~truth & yes), (~truth & ~yes)]
        names = ("found", "missed", "false alarms", "true negatives")
        assert [int(rows[label][name]) for name in names] == [int(c.sum()) for c in counts]


def test_pictures_are_of_the_worst_mistakes(trained, phantom_cache, monkeypatch):
    table = pd.read_csv(trained.predictions_file("test"))
    limit = trained.choices()["slice"]["thresholds"]["0.90"]["any"]
    missed = table[(table["true_any"] == 1) & (table["any"] < limit)].sort_values("any")
    first = missed.drop_duplicates("series_instance_uid").iloc[0]
    found = page_of(trained, phantom_cache)
    heading = next(text for text in found.headings if text.startswith("any: worst misses"))
    assert f"({len(missed)} at" in heading
    picture = next(p for p in found.pictures if f"any {first['any']:.3f}" in p["alt"])
    encoded = base64.b64decode(picture["src"].partition(",")[2])
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
    row = np.flatnonzero(phantom_cache.slices["sop_instance_uid"] == first["sop_instance_uid"])
    hu = phantom_cache.slice_hu(int(row[0])).astype(float)
    expected = cv2.resize(np.clip(hu / 80, 0, 1), image.shape, interpolation=cv2.INTER_CUBIC)
    assert np.abs(image / 255 - expected.clip(0, 1)).mean() < 0.03
    # One of a series each, in order.
    texts = [
        p["alt"] for p in found.pictures if re.search(r"answered any .*; truly (?!none)", p["alt"])
    ]
    values = [float(re.search(r"any ([\d.]+);", text).group(1)) for text in texts]
    assert len(values) > 1 and values == sorted(values)


def test_a_slice_with_the_label_stands_for_a_series(phantom_cache, tmp_path):
    run = made_run(tmp_path / "run", is_series=True)
    recipe = read_json(run.recipe_file)
    recipe["inputs"]["cache_size"] = phantom_cache.size
    write_json(run.recipe_file, recipe)
    table = pd.read_csv(run.predictions_file("test"))
    table["series_instance_uid"] = phantom_cache.series_uids
    table[[f"true_{name}" for name in LABELS]] = phantom_cache.series[list(LABELS)].to_numpy()
    table[list(LABELS)] = 0.0  # everything is missed
    table.to_csv(run.predictions_file("test"), index=False)
    shown = []

    def heat_maps(rows, label):
        shown.extend((row, label) for row in rows.tolist())

    found = page_of(run, phantom_cache, heat_maps=heat_maps)
    assert len(shown) == len(found.pictures) > 10
    for row, label in shown:
        assert phantom_cache.slices[label].iloc[row] == 1
    assert found.pictures[0]["alt"].startswith("Brain window, slice ")
    assert "of the series; answered any 0.000" in found.pictures[0]["alt"]


def test_a_heat_map_is_laid_over_the_pictures(trained, phantom_cache):
    asked = []

    def heat_maps(rows, label):
        asked.append((len(rows), label))
        return np.ones((len(rows), 6, 6), np.float32)

    plain = page_of(trained, phantom_cache)
    warm = page_of(trained, phantom_cache, heat_maps=heat_maps)
    assert sum(count for count, _ in asked) == len(warm.pictures) == len(plain.pictures)
    assert {label for _, label in asked} <= set(LABELS)
    assert plain.pictures[0]["src"] != warm.pictures[0]["src"]
    picture = np.full((4, 4), 100, np.uint8)
    cold = heated(picture, np.zeros((2, 2), np.float32))
    assert (cold == 100).all()  # grey stays grey
    assert (heated(picture, np.ones((2, 2), np.float32))[..., 0] > 150).all()


@pytest.mark.skipif(keras.config.backend() != "torch", reason="heat maps need torch")
def test_the_command_draws_where_the_network_looked(copy, phantom_cache_folder, phantom_cache):
    arguments = ["report", str(copy), "--heat-maps"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 2 and "need --cache" in refused.output
    result = CliRunner().invoke(main, [*arguments, "--cache", str(phantom_cache_folder)])
    assert result.exit_code == 0, result.output
    found = PageParts.of(copy.page_file().read_text(encoding="utf-8"))
    assert "Colours show what speaks for the label" in found.text and found.pictures
    verify(copy.path)
    # The maps are those of `explain`, on the pixels of the slice, without the air around the head.
    rows = np.array([40, 41, 90])
    maps = heat_maps_of(copy, phantom_cache)(rows, "any")
    hu = phantom_cache.slices_hu(rows)
    expected = explain(copy, copy.recipe().inputs.prepare(hu), "any")["any"]
    expected = np.where(hu > -500, np.maximum(expected, 0), 0)
    for one, other in zip(maps, expected, strict=True):
        np.testing.assert_allclose(one, other / max(other.max(), 1e-30), atol=1e-5)


@pytest.mark.parametrize("kind", ["slab", "series"])
def test_maps_of_volumes_are_of_the_slice_that_is_shown(kind, phantom_cache):
    samples = phantom_cache.samples(View(kind, 5))
    numbers = _samples_of(phantom_cache, kind, np.arange(len(phantom_cache)))
    maps = np.arange(5)[:, np.newaxis, np.newaxis] * np.ones((5, 2, 2))
    for row in (3, 20, 111):
        number = numbers[row]
        place = int(_slice_of(samples, number, row, maps)[0, 0])
        there = samples.rows[number]
        if kind == "slab":
            assert there[place] == row
        else:
            uid = phantom_cache.slices["series_uid"].iloc[row]
            assert number == phantom_cache.series_uids.index(uid)
            assert abs(there[place] - row) == np.abs(there[there >= 0] - row).min()


def test_a_cache_of_other_pixels_or_sizes_is_refused(copy, phantom_cache, tmp_path):
    data = read_json(copy.data_file)
    data["pixels_of"]["test"] = "0" * 64
    write_json(copy.data_file, data)
    with pytest.raises(StaleError, match="the series of the test split have other pixels"):
        write_report_page(copy, phantom_cache)
    other = CTCache.open(phantom_cache.path)
    other.pixels.size = 32
    with pytest.raises(UsageError, match="Give a cache of size 48"):
        write_report_page(copy, other)


def test_a_cache_of_other_slices_is_refused(phantom_cache, tmp_path):
    run = made_run(tmp_path / "run")
    recipe = read_json(run.recipe_file)
    recipe["inputs"]["cache_size"] = 48
    write_json(run.recipe_file, recipe)
    with pytest.raises(StaleError, match="96 of 96 predictions per slice are not of the cache"):
        write_report_page(run, phantom_cache)


def test_an_interrupted_training_says_so(copy):
    copy.report_file.unlink()
    for name in ("checksums.json", "metrics-test.json", "predictions-test.csv", "report.html"):
        (copy.path / name).unlink()
    result = CliRunner().invoke(main, ["report", str(copy)])
    assert result.exit_code == 0, result.output
    assert not copy.page_file().exists()
    found = PageParts.of(copy.page_file(False).read_text(encoding="utf-8"))
    assert found.warnings[0].startswith("Unfinished: the training was interrupted, 2 of 2 epochs")
    assert any("test split was not evaluated" in text for text in found.warnings)
    assert any(alt.startswith("Losses over 2 epochs") for alt in found.charts)
    copy.forget_evaluations()
    assert not copy.page_file(False).exists()


def test_a_finished_training_survives_a_page_that_fails(phantom_cache, tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("no picture.", "Draw it by hand.")

    monkeypatch.setattr(training, "report_page", fail)
    told = []
    with preset_of(NARROW, ModelSpec(input_shape=(48, 48, 3), width=8)):
        config = config_of(fit={"epochs": 1})
        run = RunFolder(train(config, phantom_cache, tmp_path / "run", tell=told.append))
    assert run.is_finished and not run.page_file().exists()
    assert told[-1].startswith("report.html could not be made: no picture. Draw it by hand. To try")
    verify(run.path)
    monkeypatch.undo()
    write_report_page(run, phantom_cache)
    verify(run.path)


def test_hostile_texts_stay_texts(tmp_path):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>=1+1"
    run = made_run(tmp_path / "<b>run", card=None, **{"evil<i>": evil})
    data = read_json(run.data_file)
    data["plan"]["warning"] = data["plan"]["note"] = evil
    write_json(run.data_file, data)
    write_json(run.environment_file, {"backend": evil, "device": evil, "versions": {evil: evil}})
    page = write_report_page(run).read_text(encoding="utf-8")
    for text in ("<img src=x", "<script", "<b>run", "<i>"):
        assert text not in page
    found = PageParts.of(page)  # which refuses handlers, and links to anywhere
    assert "script" not in found.tags and "b" not in found.tags
    assert found.headings[0] == "Run <b>run"
    assert f"Warning: {evil}" in found.warnings


ONE = LabelSet(("bleed",))
CLASSES = LabelSet(("low", "middle", "high-up"), exclusive=True)


@pytest.mark.parametrize("is_series", [False, True])
@pytest.mark.parametrize("labels", [SIX, ONE, CLASSES], ids=["six", "one", "classes"])
def test_any_labels_and_views(labels, is_series, tmp_path):
    run = made_run(tmp_path / "run", labels, is_series)
    found = page_of(run)
    metrics = read_json(run.metrics_file("test"))
    assert set(metrics) == ({"series"} if is_series else {"slice", "series"})
    table = found.table("AUROC and average precision")
    assert list(table) == list(labels.names)
    for level, part in metrics.items():
        rows = found.table(f"Per {level}: each label beside the constant answer")
        for label in labels.names:
            assert rows[label]["log loss"] == f"{part['per_label'][label]['log_loss']:.4f}"
        kinds = [alt for alt in found.charts if f"per {level}" in alt]
        for kind in ("ROC", "Precision-recall", "Reliability"):
            assert sum(alt.startswith(kind) for alt in kinds) == len(labels)
    # Those of the stored predictions are those of the stored metrics.
    for level, scores in read_results(run).scores.items():
        again = binary_metrics(scores.truth, scores.values, label_set=labels)
        assert again["log_loss"] == pytest.approx(metrics[level]["log_loss"], rel=1e-6)
        assert again["auroc"] == pytest.approx(metrics[level]["auroc"], rel=1e-9)
    if labels.exclusive:
        level = "series" if is_series else "slice"
        scores = read_results(run).scores[level]
        table = found.table(f"Per {level}: the likeliest class")
        true, said = scores.truth.argmax(axis=1), scores.values.argmax(axis=1)
        assert int(table["low"]["answered middle"]) == int(((true == 0) & (said == 1)).sum())
        total = sum(int(n) for row in table.values() for n in row.values())
        assert total == len(true)


def test_many_labels_get_tables_but_not_all_get_charts(tmp_path):
    labels = LabelSet(tuple(f"finding number {n} with a long name" for n in range(30)))
    run = made_run(tmp_path / "run", labels)
    page = write_report_page(run).read_text(encoding="utf-8")
    found = PageParts.of(page)
    assert len(found.table("AUROC and average precision")) == 30
    assert sum(alt.startswith("ROC") for alt in found.charts) == 24
    assert len(page) < SMALL


def test_missing_labels_are_not_counted(tmp_path):
    run = made_run(tmp_path / "run")
    table = pd.read_csv(run.predictions_file("test"))
    table.loc[:9, "true_epidural"] = -1
    table.to_csv(run.predictions_file("test"), index=False)
    scores = read_results(run).scores["slice"]
    truth, values, patients = scores.of("epidural")
    assert len(truth) == len(values) == len(patients) == len(table) - 10


@pytest.mark.parametrize(
    "absent",
    [
        ("predictions-test.csv",),
        ("metrics-test.json", "predictions-test.csv"),
        ("choices.json",),
        ("history.csv", "environment.json", "split.json"),
    ],
    ids=" ".join,
)
def test_runs_that_lack_files_have_a_page(absent, tmp_path):
    run = made_run(tmp_path / "run")
    for name in absent:
        (run.path / name).unlink()
    found = page_of(run)
    said = {
        "predictions-test.csv": "no predictions of the test split to draw curves from",
        "metrics-test.json": "The test split was not evaluated",
        "history.csv": "No epoch is recorded",
        "choices.json": "AUROC",
    }
    assert said[absent[0]] in found.text


def test_older_metrics_and_predictions(tmp_path):
    run = made_run(tmp_path / "run")
    metrics = read_json(run.metrics_file("test"))
    for part in metrics.values():
        for name in ("intervals", "calibration", "operating", "triage"):
            del part[name]
    write_json(run.metrics_file("test"), metrics)
    table = pd.read_csv(run.predictions_file("test")).drop(columns="patient_number")
    table.to_csv(run.predictions_file("test"), index=False)
    data = read_json(run.data_file)
    del data["plan"]
    write_json(run.data_file, data)
    found = page_of(run)
    assert "do not say which rows are of one patient: there are no bands" in found.text
    assert "Nothing was chosen on validation: there are no thresholds" in found.text
    assert "did not keep a description of its data" in found.text
    assert found.table("AUROC and average precision")["any"]["AUROC per slice"].count("(") == 0


def test_what_is_no_run_or_damaged_is_refused(tmp_path):
    with pytest.raises(StaleError, match="is not a run folder"):
        write_report_page(tmp_path)
    run = made_run(tmp_path / "run")
    run.metrics_file("test").write_text("[1]")
    with pytest.raises(StaleError, match="metrics-test.json is damaged"):
        write_report_page(run)
    run = made_run(tmp_path / "other")
    run.history_file.write_text('"')
    with pytest.raises(StaleError, match="history.csv is damaged"):
        write_report_page(run)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The content of a file of metrics."""
    return read_json(made_run(tmp_path_factory.mktemp("sound") / "run").metrics_file("test"))


def damaged(metrics, place, value):
    *way, last = place
    for name in way:
        metrics = metrics[name]
    if value is KeyError:
        del metrics[last]
    else:
        metrics[last] = value


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["slice"], 3, "slice is 3; expected an object"),
        (["slice", "auroc", "any"], "x", "slice.auroc.any is 'x'; expected a number from 0 to 1"),
        (["series", "ap", "any"], [0.5], "series.ap.any is .0.5.; expected a number"),
        (["slice", "auroc", "any"], True, "slice.auroc.any is True"),
        (["slice", "auroc", "any"], -1e9, "slice.auroc.any is -1000000000.0"),
        (["slice", "log_loss"], {}, "slice.log_loss is {}; expected a number or null"),
        (["slice", "log_loss"], KeyError, "slice.log_loss is absent"),
        (["slice", "n", "positive", "any"], None, "n.positive.any is None; expected a count"),
        (["slice", "n", "positive", "any"], 1.5, "n.positive.any is 1.5; expected a count"),
        (["slice", "n"], KeyError, "slice.n is absent"),
        (["slice", "per_label", "any"], [], "slice.per_label.any is ..; expected an object"),
        (["slice", "baseline", "prevalence", "source"], 1, "source is 1; expected a text"),
        (["slice", "intervals", "metrics", "ap/any", "low"], None, "ap/any has one bound of two"),
        (["slice", "calibration", "labels", "any", "bins"], [3], "bins.0. is 3; expected an obj"),
        (["slice", "calibration", "temperature"], None, "has no temperature"),
        (["slice", "operating", "at_specificity", "0.90", "any"], KeyError, "0.90.any is absent"),
        (["slice", "aggregation"], {"rule": 3}, "slice.aggregation.rule is 3; expected a text"),
    ],
    ids=str,
)
def test_damaged_metrics_are_refused_by_entry(place, value, said, sound):
    assert wrong_entry(sound, SIX) == ""
    metrics = deepcopy(sound)
    damaged(metrics, place, value)
    assert re.search(said, wrong_entry(metrics, SIX))


def test_the_command_refuses_damaged_metrics(tmp_path):
    run = made_run(tmp_path / "run")
    metrics = read_json(run.metrics_file("test"))
    metrics["slice"]["auroc"]["any"] = "x"
    write_json(run.metrics_file("test"), metrics)
    with pytest.raises(StaleError, match="damaged: slice.auroc.any is 'x'.*--split test"):
        write_report_page(run)
    result = CliRunner().invoke(main, ["report", str(run)])
    assert result.exit_code == StaleError.exit_code and "is damaged" in result.output


def test_metrics_with_nan_and_damaged_tables_are_refused(tmp_path):
    run = made_run(tmp_path / "run")
    text = run.metrics_file("test").read_text(encoding="utf-8")
    run.metrics_file("test").write_text(text.replace('"log_loss": 0', '"log_loss": NaN, "a": 0', 1))
    with pytest.raises(StaleError, match="NaN is not a number"):
        write_report_page(run)
    run.metrics_file("test").write_text(text)
    environment = read_json(run.environment_file)
    write_json(run.environment_file, environment | {"seconds": {"evaluating test": "long"}})
    with pytest.raises(StaleError, match="seconds.evaluating test is 'long'; expected seconds"):
        write_report_page(run)
    write_json(run.environment_file, environment)
    history = run.history_file.read_text()
    for one, other in (("0.55", "low"), ("2,", "inf,")):
        run.history_file.write_text(history.replace(one, other))
        with pytest.raises(StaleError, match="history.csv is damaged"):
            write_report_page(run)


def test_a_softmax_is_named(tmp_path):
    assert "loss softmax cross-entropy," in page_of(made_run(tmp_path / "a", CLASSES)).text
    assert "loss bce," in page_of(made_run(tmp_path / "b")).text


def test_precision_and_recall_are_drawn_as_average_precision_sums_them():
    truth, values = np.array([0, 1, 0, 1, 1]), np.array([0.9, 0.8, 0.7, 0.3, 0.1])
    found = curves(truth == 1, values).pr
    steps = _stepped(found)
    area = float(np.trapezoid(steps.up, steps.across))
    assert area == pytest.approx(average_precision_score(truth, values))
    assert area != pytest.approx(float(np.trapezoid(found.up, found.across)), abs=0.02)


def test_a_lacking_interval_is_explained(tmp_path):
    run = made_run(tmp_path / "run")
    assert "No interval" not in page_of(made_run(tmp_path / "one", ONE)).text
    metrics = read_json(run.metrics_file("test"))
    metrics["slice"]["intervals"]["metrics"]["auroc/any"] |= {"low": None, "high": None}
    write_json(run.metrics_file("test"), metrics)
    text = page_of(run).text
    assert "No interval: too few patients" in text and "AUROC of any per slice" in text


def test_thresholds_have_the_same_decimals_and_numbers_a_true_minus(tmp_path):
    found = page_of(made_run(tmp_path / "run"))
    rows = found.table("Per slice, thresholds for a specificity of 0.90")
    decimals = {len(row["threshold"].partition(".")[2]) for row in rows.values()}
    assert len(decimals) == 1 and decimals.pop() >= 3
    cells = [
        cell
        for caption, table in found.tables.items()
        if "Settings" not in caption
        for row in table[1:]
        for cell in row[1:]
    ]
    assert any(re.match("\u2212[0-9]", cell) for cell in cells)
    assert not any(re.match("-[0-9]", cell) for cell in cells)


def test_long_names_stay_within_their_charts(tmp_path):
    labels = LabelSet(("W" * 64, "w" * 63 + "b", "short"))
    page = write_report_page(made_run(tmp_path / "run", labels)).read_text(encoding="utf-8")
    found = PageParts.of(page)
    (alt,) = [alt for alt in found.charts if alt.startswith("AUROC with 95 %")]
    assert all(name in alt for name in labels.names)
    texts = re.findall(r'<text x="([\d.]+)"[^>]*text-anchor="end"[^>]*>([^<]*\u2026[^<]*)<', page)
    assert len(texts) >= 2
    assert all(text_width(text) <= float(x) for x, text in texts)
    assert "answered" not in found.text or 'class="number long"' in page


def test_real_data_are_not_called_synthetic(tmp_path):
    run = made_run(tmp_path / "run", synthetic=False)
    found = page_of(run)
    assert found.warnings == [] and "ynthetic" not in found.text
    assert "Not a medical device" in found.text


def test_constants_lose_what_they_lose():
    truth = np.array([[1], [0], [0], [0], [0]])
    expected = binary_metrics(truth, np.full((5, 1), 0.3), label_set=ONE)["log_loss"]
    assert constant_log_loss(1, 5, 0.3) == pytest.approx(expected)
    assert constant_log_loss(0, 0, 0.3) is None


def test_misses_and_alarms_are_sorted(tmp_path):
    scores = read_results(made_run(tmp_path / "run")).scores["slice"]
    column = LABELS.index("any")
    for is_miss in (True, False):
        rows = worst(scores, "any", 0.4, is_miss)
        values = scores.values[rows, column]
        assert len(rows) and (scores.truth[rows, column] == is_miss).all()
        assert ((values < 0.4) == is_miss).all()
        assert (np.diff(values) >= 0).all() if is_miss else (np.diff(values) <= 0).all()


def test_settings_are_flat():
    content = {"a": {"b": {"c": True}, "d": None}, "e": [], "f": [{"level": 40.0}]}
    assert flat(content) == {"a.b.c": "yes", "a.d": "none", "e": "none", "f": "{level: 40.0}"}
