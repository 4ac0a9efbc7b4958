"""A run with a sequence head: what it answers, everywhere, and what interrupts or mixes it up."""

import json
import shutil
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from narrow import train_slices

from ich_keras import context_fitting
from ich_keras.cli import sequence, train_main
from ich_keras.context import MAPS_ALONE, Context, context_sentence
from ich_keras.context_fitting import ContextConfig, SeriesSet, choose_blend, series_set
from ich_keras.context_training import train_context
from ich_keras.errors import DataError, DivergedError, StaleError, UsageError
from ich_keras.evaluation import evaluate
from ich_keras.features import extract_features
from ich_keras.inference import load_run
from ich_keras.labels import SIX, LabelSet
from ich_keras.model_card import model_card
from ich_keras.models.sequence import KINDS, SequenceSpec, sequence_head, sequence_losses
from ich_keras.prediction import predict_folder
from ich_keras.run_folder import RunFolder
from ich_keras.run_pages.heat import heat_maps_of
from ich_keras.run_pages.report import write_report_page
from ich_keras.summary import run_summary
from ich_keras.verification import verify

CONFIG = ContextConfig("conv", width=16, depth=1, epochs=3, batch_size=4, learning_rate=5e-3)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("context")


@pytest.fixture(scope="module")
def slice_run(work, phantom_cache):
    return train_slices(phantom_cache, work / "slices")


@pytest.fixture(scope="module")
def features(work, slice_run, phantom_cache):
    return extract_features(slice_run, phantom_cache, work / "features.h5")


@pytest.fixture(scope="module")
def run(work, features, phantom_cache):
    return train_context(features, phantom_cache, work / "run", CONFIG)


def answers_by_hand(run, features, cache, rows):
    """Probabilities of slices, computed a series at a time from the two files of the context."""
    record = json.loads((run / "context.json").read_text())
    head = sequence_head(SequenceSpec(**record["spec"]), SIX, "logits")
    head.load_weights(run / "context.weights.h5")
    blend = np.array(record["blend"])
    found = {}
    for uid in cache.slices["series_uid"].iloc[rows].unique():
        own = np.array(cache.series_rows(uid))
        positions = cache.slices["position_mm"].to_numpy()[own]
        inputs = {
            "features": features.features[None, own],
            "logits": features.logits[None, own],
            "places_mm": (positions - positions[0])[None].astype(np.float32),
            "mask": np.ones((1, len(own)), np.float32),
        }
        logits = np.asarray(head.predict_on_batch(inputs)["slices"])[0]
        mixed = (1 - blend) * features.logits[own] + blend * logits
        for row, one in zip(own, 1 / (1 + np.exp(-mixed)), strict=True):
            found[row] = one
    return np.stack([found[row] for row in rows])


def test_its_predictions_are_those_of_both_together(run, features, phantom_cache):
    table = pd.read_csv(run / "predictions-test.csv")
    uids = pd.Index(phantom_cache.slices["sop_instance_uid"])
    rows = uids.get_indexer(table["sop_instance_uid"])
    expected = answers_by_hand(run, features, phantom_cache, rows)
    columns = [f"unsmoothed_{name}" for name in SIX.names]
    found = table[columns if columns[0] in table else list(SIX.names)].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    record = json.loads((run / "context.json").read_text())
    assert set(record["blend"]) <= {0, 0.25, 0.5, 0.75, 1}
    assert record["num_series"]["train"] > record["num_series"]["valid"] > 0


def test_prediction_gives_the_same_answers_as_evaluation(run, phantom_folder, tmp_path):
    table = pd.read_csv(run / "predictions-test.csv").set_index("sop_instance_uid")
    found = predict_folder(run, phantom_folder / "images", tmp_path / "out").slices
    found = found.set_index("sop_instance_uid").loc[table.index]
    raw = [f"raw_{name}" for name in SIX.names]
    np.testing.assert_allclose(found[raw].to_numpy(), table[list(SIX.names)], atol=1e-4)


def test_the_run_is_whole_and_evaluates_again_alike(run, phantom_cache, tmp_path):
    assert RunFolder(run).is_finished
    assert verify(run)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    content = bytearray((copy / "context.weights.h5").read_bytes())
    content[-1] ^= 1
    (copy / "context.weights.h5").write_bytes(content)
    with pytest.raises(StaleError, match=r"context\.weights\.h5"):
        verify(copy)
    before = json.loads((run / "metrics-test.json").read_text())
    again = evaluate(run, phantom_cache, "test")
    assert again["slice"]["log_loss"] == pytest.approx(before["slice"]["log_loss"], rel=1e-6)


def test_an_interrupted_training_resumes_bit_equal(
    work, run, features, phantom_cache, tmp_path, monkeypatch
):
    out, told = tmp_path / "again", []

    def stop(name):
        if name == "context epoch 2":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(context_fitting.files, "fail_point", stop)
        with pytest.raises(KeyboardInterrupt):
            train_context(features, phantom_cache, out, CONFIG)
    assert not out.exists()
    with pytest.raises(StaleError, match="is of a training with other settings or features"):
        train_context(features, phantom_cache, out, replace(CONFIG, seed=9))
    train_context(features, phantom_cache, out, CONFIG, tell=told.append)
    assert "Resuming after epoch 2." in told
    texts = [(folder / "context.json").read_text() for folder in (run, out)]
    assert json.loads(texts[0])["history"] == json.loads(texts[1])["history"]
    tables = [(folder / "predictions-test.csv").read_bytes() for folder in (run, out)]
    assert tables[0] == tables[1]
    assert not list(tmp_path.glob("again.*"))


def test_what_does_not_belong_together_is_refused(
    work, slice_run, features, phantom_cache, run, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="exists"):
        train_context(features, phantom_cache, run, CONFIG)
    other = replace(features, record=replace(features.record, cache="f" * 64))
    with pytest.raises(StaleError, match="features of another cache"):
        train_context(other, phantom_cache, out, CONFIG)
    other = replace(features, record=replace(features.record, network="f" * 64))
    with pytest.raises(StaleError, match="features of another network than that of") as error:
        train_context(other, phantom_cache, out, CONFIG)
    assert "ich features --run" in error.value.hint
    other = replace(features, record=replace(features.record, source=str(tmp_path / "gone")))
    with pytest.raises(UsageError, match="gone, whose network made .*, is not there") as error:
        train_context(other, phantom_cache, out, CONFIG)
    assert "--run RUN" in error.value.hint
    other = replace(features, record=replace(features.record, is_foreign=True))
    with pytest.raises(UsageError, match="a network of others"):
        train_context(other, phantom_cache, out, CONFIG)
    assert not out.exists()


def test_a_training_that_diverges_is_told(features, phantom_cache, tmp_path):
    with pytest.raises(DivergedError, match="the training loss of epoch 1 is nan"):
        train_context(
            features, phantom_cache, tmp_path / "out", replace(CONFIG, learning_rate=1e30)
        )


def edited_run(run, tmp_path, **changes):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((copy / "context.json").read_text()) | changes
    (copy / "context.json").write_text(json.dumps(record))
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "f" * 64}, "is of another network than that of"),
        ({"labels": ["any"]}, "is of other labels than those of"),
        ({"weights": "f" * 64}, "is lost or does not match its checksum"),
        ({"schema": 7}, "has version 7; this one reads 1"),
        ({"spec": {"kind": "rnn"}}, "is damaged .*no sequence head is called"),
    ],
)
def test_a_context_that_was_changed_is_refused(run, tmp_path, changes, message):
    copy = edited_run(run, tmp_path, **changes)
    recipe, model = load_run(run)
    with pytest.raises(StaleError, match=message):
        Context.load(RunFolder(copy), recipe.labels, model)
    (copy / "context.json").unlink()
    with pytest.raises(StaleError, match=r"has lost its context\.json"):
        Context.load(RunFolder(copy), recipe.labels, model)


def test_a_share_of_nothing_keeps_the_slice_networks_answers():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.01, 0.99, (7, 6)).astype(np.float32)
    features = rng.normal(size=(7, 5)).astype(np.float32)
    head = sequence_head(SequenceSpec("attention", 5, 4, 1), SIX, "logits")
    places = ["a"] * 4 + ["b"] * 3, [0, 5, 10, 15, 0, 5, 10]
    none = Context(head, SIX, np.zeros(6, np.float32), "").answer(values, features, *places)
    np.testing.assert_allclose(none, values, rtol=1e-6)
    # Untrained, the head gives the slice network's own logits.
    whole = Context(head, SIX, np.ones(6, np.float32), "").answer(values, features, *places)
    np.testing.assert_allclose(whole, values, rtol=1e-4)


def test_readers_are_told_of_the_head(run, slice_run, phantom_folder, phantom_cache, tmp_path):
    record = json.loads((run / "context.json").read_text())
    shares = dict(zip(record["labels"], record["blend"], strict=True))
    sentence = context_sentence(RunFolder(run))
    assert sentence.startswith(
        "Each slice is answered in the context of its series by convolutions along z; its share in"
    )
    assert all(f"{label} {share:g}" in sentence for label, share in shares.items())
    card = model_card(RunFolder(run))
    assert ("Context", sentence) in card.facts
    assert sentence in (run / "report.md").read_text()
    assert sentence in (run / "report.html").read_text().replace("&#39;", "'")
    assert sentence in " ".join(run_summary(run, 80).split())
    assert context_sentence(RunFolder(slice_run)) == ""
    assert "Context" not in dict(model_card(RunFolder(slice_run)).facts)

    first = next((phantom_folder / "images").iterdir())
    folder = first if first.is_dir() else phantom_folder / "images"
    out = tmp_path / "out"
    predict_folder(run, folder, out, report=True, heat_maps="gradcam")
    notice = (out / "notice.txt").read_text()
    assert sentence in notice and MAPS_ALONE in notice
    assert MAPS_ALONE in (out / "reports" / "1.html").read_text().replace("&#39;", "'")
    predict_folder([run, slice_run], folder, tmp_path / "both")
    assert f"Run 1 of 2: {sentence}" in (tmp_path / "both" / "notice.txt").read_text()
    page = write_report_page(run, phantom_cache, heat_maps_of(RunFolder(run), phantom_cache))
    assert MAPS_ALONE in page.read_text().replace("&#39;", "'")


@pytest.mark.parametrize(
    ("blend", "told"),
    [
        ([0] * 6, "no label was better with it on validation: the slice network answers alone."),
        ([0.5] * 6, "is 0.5 for every label."),
    ],
)
def test_equal_shares_are_told_in_a_word(run, tmp_path, blend, told):
    assert context_sentence(RunFolder(edited_run(run, tmp_path, blend=blend))).endswith(told)


def test_a_damaged_context_is_told_of_none(run, tmp_path):
    with pytest.raises(StaleError, match=r"context\.json is damaged"):
        context_sentence(RunFolder(edited_run(run, tmp_path, blend=None)))


class Constant:
    """A head that gives one logit for all."""

    def __init__(self, logits):
        self.logits = np.array(logits, np.float32)

    def predict_on_batch(self, inputs):
        shape = inputs["logits"].shape
        return {
            "slices": np.broadcast_to(self.logits, shape),
            "series": np.broadcast_to(self.logits, (shape[0], shape[2])),
        }


def test_the_shares_are_those_with_the_lowest_log_loss():
    labels = LabelSet(("right", "wrong", "unknown"))
    truth = np.array([[1, 1, np.nan]] * 4, np.float32)
    own = np.zeros((4, 3), np.float32)
    sets = SeriesSet([(np.zeros((4, 2), np.float32), own, np.arange(4.0))], [truth], truth[:1])
    blend, losses = choose_blend(Constant([3, -3, 3]), sets, labels)
    assert blend.tolist() == [1, 0, 1]
    assert losses["right"]["1"] == pytest.approx(np.log1p(np.exp(-3)), rel=1e-5)
    assert losses["wrong"]["0"] == pytest.approx(np.log(2), rel=1e-6)
    assert losses["unknown"] == {}
    # What shall learn from labels of series alone chooses by no label of a slice.
    blend, losses = choose_blend(Constant([3, -3, 3]), sets, labels, "series")
    assert blend.tolist() == [1, 1, 1] and losses == {"right": {}, "wrong": {}, "unknown": {}}


def test_series_are_taken_whole_with_their_labels(features, phantom_cache):
    rows = np.array(phantom_cache.series_rows(phantom_cache.series_uids[3]))
    more = np.array(phantom_cache.series_rows(phantom_cache.series_uids[5]))[:-1]
    found = series_set(features, phantom_cache, np.concatenate([rows, more]), SIX)
    assert len(found) == 1  # the other is not whole
    truth = phantom_cache.slices.iloc[rows][list(SIX.names)].to_numpy(np.float32)
    np.testing.assert_array_equal(found.slices[0], truth)
    np.testing.assert_array_equal(found.series[0], truth.max(0))
    inputs, labels = found.batch(np.array([0]), "series")
    assert np.isnan(labels["slices"]).all() and not np.isnan(labels["series"]).any()
    inputs, labels = found.batch(np.array([0]), "slices")
    assert np.isnan(labels["series"]).all()
    assert inputs["mask"].sum() == len(rows) and inputs["mask"].shape[1] % 16 == 0
    assert np.isnan(labels["slices"][0, len(rows) :]).all()


BAD = {
    "kind": ({"kind": "rnn"}, "no sequence head is called 'rnn'"),
    "learn": ({"learn_from": "text"}, "learn_from is 'text'; expected one of both, slices, series"),
    "epochs": ({"epochs": 0}, "epochs is 0; expected a whole number 1 to 100000"),
    "rate": ({"learning_rate": -1}, "learning_rate"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ContextConfig(**settings)


def ich_train(*options):
    return CliRunner().invoke(train_main, [str(option) for option in options])


def test_the_command(features, phantom_cache_folder, tmp_path):
    out = tmp_path / "run"
    data = "--features", features.path, "--cache", phantom_cache_folder
    done = ich_train("--preset", "sequence_attention", *data, "--out", out, "--epochs", 1)
    assert done.exit_code == 0, done.output
    assert "epoch 1/1: training loss" in done.output
    assert "Share of the head in the logits, chosen on validation: epidural" in done.output
    assert RunFolder(out).is_finished
    record = json.loads((out / "context.json").read_text())
    assert record["config"]["kind"] == "attention" and record["config"]["learn_from"] == "both"


BAD_OPTIONS = {
    "no features": (["--preset", "sequence_gru"], "--features, which --preset sequence_gru needs,"),
    "no preset": (["--features", "f.h5"], "--features given without --preset"),
    "another preset": (
        ["--features", "f.h5", "--preset", "resnet18_2d"],
        "--features given with --preset resnet18_2d",
    ),
    "unknown": (
        ["--features", "f.h5", "--preset", "sequence_rnn"],
        "no sequence head is called 'sequence_rnn'. Hint: Known: sequence_gru, sequence_lstm",
    ),
    "others": (
        ["--features", "f.h5", "--preset", "sequence_gru", "--size", "64", "--dicom", "d"],
        "--size, --dicom given with --features: a head takes none of it",
    ),
    "learn from": (["--learn-from", "series"], "--learn-from is for sequence heads"),
    "end to end": (["--end-to-end"], "--end-to-end is for sequence heads"),
    "not end to end": (
        ["--features", "f.h5", "--preset", "sequence_gru", "--joint-epochs", 3],
        "--joint-epochs given without --end-to-end",
    ),
    "backbone": (
        ["--features", "f.h5", "--preset", "sequence_gru", "--backbone-factor", 0.1],
        "--backbone-factor given with --features: a head takes none of it",
    ),
    "no cache": (["--features", "f.h5", "--preset", "sequence_gru"], "--cache is missing"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(options, message):
    done = ich_train(*options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_the_command_knows_the_kinds():
    assert sequence.KINDS == KINDS


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        *((kind, length) for kind in KINDS for length in (1, 2)),
        # Keras takes a step in Python for each slice of a recurrent head.
        *(
            pytest.param(kind, 600, marks=pytest.mark.slow if kind in ("gru", "lstm") else ())
            for kind in KINDS
        ),
    ],
)
def test_series_of_any_length_are_answered(kind, length):
    rng = np.random.default_rng(length)
    head = sequence_head(SequenceSpec(kind, 5, 4, 1, heads=2), SIX, "logits")
    for variable in head.trainable_variables:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    context = Context(head, SIX, np.ones(6, np.float32), "")
    values = rng.uniform(0.01, 0.99, (length, 6)).astype(np.float32)
    features = rng.normal(size=(length, 5)).astype(np.float32)
    places = np.sort(rng.uniform(0, 3000, length))  # gaps of all sizes
    found = context.answer(values, features, ["a"] * length, places)
    assert found.shape == values.shape and np.isfinite(found).all()
    assert (found > 0).all() and (found < 1).all()
    # Far from the origin of the scanner's table, and beside another series: the same answers.
    uids = ["a"] * length + ["b"] * length
    twice = context.answer(
        np.tile(values, (2, 1)), np.tile(features, (2, 1)), uids, np.tile(places + 64, 2)
    )
    np.testing.assert_allclose(twice, np.tile(found, (2, 1)), atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_refused(bad):
    head = sequence_head(SequenceSpec("gru", 5, 4, 1), SIX, "logits")
    head.get_layer("slice_change").kernel.assign(np.ones((4, 6)))
    features = np.ones((3, 5), np.float32)
    features[1, 2] = bad
    context = Context(head, SIX, np.ones(6, np.float32), "")
    with pytest.raises(DataError, match="the sequence head gave values that are not finite"):
        context.answer(np.full((3, 6), 0.5), features, ["a"] * 3, [0, 5, 10])


def test_a_label_that_the_head_never_saw_keeps_the_slice_networks_answer():
    rng = np.random.default_rng(5)
    labels = LabelSet(("seen", "unseen"))
    parts, slices = [], []
    for _ in range(6):
        own = rng.normal(size=(7, 2)).astype(np.float32)
        parts.append((rng.normal(size=(7, 3)).astype(np.float32), own, np.arange(7.0)))
        truth = rng.integers(0, 2, (7, 2)).astype(np.float32)
        truth[:, 1] = np.nan
        slices.append(truth)
    sets = SeriesSet(parts, slices, np.stack([one.max(axis=0) for one in slices]))
    head = sequence_head(SequenceSpec("gru", 3, 4, 1, dropout=0.0), labels, "logits")
    head.compile(keras.optimizers.AdamW(0.05), **sequence_losses(labels), auto_scale_loss=False)
    for _ in range(5):
        head.train_on_batch(*sets.batch(np.arange(6), "both"))
    inputs, _ = sets.batch(np.arange(6), "both")
    found = np.asarray(head.predict_on_batch(inputs)["slices"])[:, :7]
    assert np.abs(found[..., 0] - inputs["logits"][:, :7, 0]).max() > 0.05
    np.testing.assert_array_equal(found[..., 1], inputs["logits"][:, :7, 1])
