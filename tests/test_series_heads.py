"""A sequence head's answer to whole series: the rule "head", chosen on validation like others."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from narrow import train_slices

from ich_keras.answer_rules import OperatingPoint, answer_rules
from ich_keras.context import WEIGHTS, Context
from ich_keras.context_fitting import ContextConfig
from ich_keras.context_training import train_context
from ich_keras.errors import StaleError, UsageError
from ich_keras.evaluation import evaluate
from ich_keras.external import evaluate_external
from ich_keras.features import extract_features
from ich_keras.inference import load_run
from ich_keras.labels import SIX, LabelSet
from ich_keras.metrics import aggregation
from ich_keras.metrics.aggregation import (
    HEAD,
    aggregate,
    choose_rule,
    head_columns,
    head_of,
    rule_in_words,
)
from ich_keras.models.sequence import SequenceSpec, sequence_head
from ich_keras.prediction import predict_folder
from ich_keras.prediction_journal import SeriesResult
from ich_keras.run_folder import RunFolder
from ich_keras.slice_features import SliceFeatures
from ich_keras.validation_scores import read_validation_scores

NAMES, HEADS = list(SIX.names), head_columns(SIX)
PAIR = LabelSet(("a", "b"))


def test_the_rule_takes_the_heads_answer_of_each_series():
    values = np.array([[0.1, 0.9], [0.3, 0.2], [0.5, 0.5]])
    head = np.array([[0.7, 0.6], [0.7, 0.6], [0.2, 0.4]])
    found = aggregate(values, ["x", "x", "y"], HEAD, PAIR, head)
    assert found.loc["x"].tolist() == [0.7, 0.6] and found.loc["y"].tolist() == [0.2, 0.4]
    assert aggregate(values, ["x", "x", "y"], "max", PAIR, head).loc["x"].tolist() == [0.3, 0.9]
    with pytest.raises(UsageError, match="'head' without the answers of a sequence head") as error:
        aggregate(values, ["x", "x", "y"], HEAD, PAIR)
    assert "max, mean of the top 3, noisy-or" in error.value.hint


def test_it_is_chosen_only_where_it_has_the_lowest_loss():
    truth = np.array([[1, 0], [0, 0], [0, 1], [0, 0]])
    values = np.array([[0.6, 0.3], [0.1, 0.2], [0.2, 0.7], [0.3, 0.4]])
    uids = ["x", "x", "y", "y"]
    good = np.array([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2)
    rule, losses = choose_rule(truth, values, uids, PAIR, good)
    assert rule == HEAD and losses[HEAD] == pytest.approx(-np.log(0.9))
    rule, losses = choose_rule(truth, values, uids, PAIR, 1 - good)
    assert rule == "max" and losses[HEAD] == pytest.approx(-np.log(0.1))
    # A tie goes to what is made of slices.
    same = aggregate(values, uids, "max", PAIR).loc[uids].to_numpy()
    assert choose_rule(truth, values, uids, PAIR, same)[0] == "max"
    assert HEAD not in choose_rule(truth, values, uids, PAIR)[1]


def test_of_classes_the_rule_stands_beside_the_mean():
    classes = LabelSet(("a", "b"), exclusive=True)
    truth = np.array([[1, 0], [1, 0], [0, 1]])
    values = np.array([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6]])
    head = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    rule, losses = choose_rule(truth, values, ["x", "x", "y"], classes, head)
    assert rule == HEAD and set(losses) == {"mean", HEAD}


def test_untrained_a_head_gives_series_their_largest_answer():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.01, 0.99, (7, 6)).astype(np.float32)
    features = rng.normal(size=(7, 5)).astype(np.float32)
    head = sequence_head(SequenceSpec("attention", 5, 4, 1), SIX, "logits")
    places = ["a"] * 4 + ["b"] * 3, [0, 5, 10, 15, 0, 5, 10]
    highest = np.repeat([values[:4].max(0), values[4:].max(0)], [4, 3], axis=0)
    for share in (0, 1):  # the slice network has no share in it
        context = Context(head, SIX, np.full(6, share, np.float32), "")
        slices, series = context.answer_all(values, features, *places)
        np.testing.assert_allclose(series, highest, rtol=1e-4)
        np.testing.assert_array_equal(slices, context.answer(values, features, *places))


def test_words_and_columns():
    assert rule_in_words("noisy-or") == "the noisy-or of its slices'"
    assert rule_in_words(HEAD) == "the sequence head's own answer"
    table = pd.DataFrame([[0.1, 0.2]], columns=head_columns(PAIR))
    assert head_of(table, PAIR).tolist() == [[0.1, 0.2]]
    assert head_of(pd.DataFrame({"a": [1]}), PAIR) is None


def test_the_journal_keeps_the_heads_answer():
    head = np.array([0.1, 0.7], np.float32)
    result = SeriesResult("u", (1,), ("h",), (), np.full((1, 2), 0.5, np.float32), head=head)
    again = SeriesResult.from_json(json.loads(json.dumps(result.to_json())))
    np.testing.assert_array_equal(again.head, head)
    assert again.head.dtype == np.float32


# A run whose head won -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def slice_run(work, phantom_cache):
    return train_slices(phantom_cache, work / "slices")


@pytest.fixture(scope="module")
def run(work, slice_run, phantom_cache):
    """A run whose head won on validation: the other rules are made to look worse there."""
    features = extract_features(slice_run, phantom_cache, work / "features.h5")
    config = ContextConfig("attention", width=8, depth=1, epochs=2, batch_size=4)

    def worse(values):
        is_truth = np.isin(values, (-1, 0, 1)).all()
        return values.max(axis=0) if is_truth else np.full(values.shape[1], 1e-6)

    with pytest.MonkeyPatch.context() as patch:
        for name in list(aggregation.RULES):
            patch.setitem(aggregation.RULES, name, worse)
        found = train_context(features, phantom_cache, work / "run", config)
    assert RunFolder(found).rule() == HEAD
    return found


def own_answers(run, cache, rows):
    """What the head answers to series, computed by hand from logits and features."""
    recipe, model = load_run(run)
    context = Context.load(RunFolder(run), recipe.labels, model)
    features = SliceFeatures.open(run.parent / "features.h5")
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
        logits = np.asarray(context.head.predict_on_batch(inputs)["series"])[0]
        found[uid] = 1 / (1 + np.exp(-logits))
    return found


def test_its_series_rest_on_the_head(run, phantom_cache, phantom_folder, tmp_path):
    table = pd.read_csv(run / "predictions-test.csv")
    uids = pd.Index(phantom_cache.slices["sop_instance_uid"])
    expected = own_answers(run, phantom_cache, uids.get_indexer(table["sop_instance_uid"]))
    by_hand = np.stack([expected[uid] for uid in table["series_instance_uid"]])
    np.testing.assert_allclose(table[HEADS].to_numpy(), by_hand, atol=1e-5)

    out = tmp_path / "out"
    found = predict_folder(run, phantom_folder / "images", out)
    series = pd.read_csv(out / "series.csv").set_index("series_instance_uid").loc[list(expected)]
    by_hand = np.stack(list(expected.values()))
    np.testing.assert_allclose(series[HEADS].to_numpy(), by_hand, atol=1e-4)
    raw = series[[f"raw_{name}" for name in NAMES]].to_numpy()
    np.testing.assert_allclose(raw, series[HEADS].to_numpy(), atol=1e-7)
    decisions = json.loads((out / "decisions.json").read_text())
    assert decisions["series_rule"] == HEAD
    assert "of a series, the sequence head's own answer" in (out / "notice.txt").read_text()
    assert found.studies is not None and set(HEADS) <= set(found.studies)
    words = "A series' probability: the sequence head's own answer (chosen on validation)."
    assert words in (run / "report.md").read_text()
    assert "sequence head" in (run / "report.html").read_text()
    choices = json.loads((run / "choices.json").read_text())["aggregation"]
    assert choices["rule"] == HEAD == min(choices["log_loss"], key=choices["log_loss"].get)


def test_evaluations_repeat_it(run, phantom_cache):
    before = json.loads((run / "metrics-test.json").read_text())["series"]["log_loss"]
    again = evaluate(run, phantom_cache, "test")["series"]
    assert again["log_loss"] == pytest.approx(before, rel=1e-5)
    assert again["aggregation"]["rule"] == HEAD


def test_groups_are_scored_with_what_each_fold_chooses(run):
    scores = read_validation_scores(RunFolder(run), SIX)
    rules = {part.rule for part in scores.folds("series")}
    assert rules and rules <= {*aggregation.RULES, HEAD}
    level = scores.level("series", HEAD)
    order = list(dict.fromkeys(scores.uids))
    first = [list(scores.uids).index(uid) for uid in order]
    np.testing.assert_array_equal(level.values, scores.rows.head[first])
    rules = answer_rules(RunFolder(run), OperatingPoint())
    assert rules.rule == HEAD and rules.to_dict()["series_rule"] == HEAD


def test_an_interrupted_prediction_gives_the_same_tables(
    run, phantom_folder, tmp_path, monkeypatch
):
    from ich_keras import prediction_journal

    whole = predict_folder(run, phantom_folder / "images", tmp_path / "whole", batch_size=40)
    count = 0

    def stop(name):
        nonlocal count
        count += name == "after a prediction's record"
        if count == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prediction_journal, "fail_point", stop)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(run, phantom_folder / "images", tmp_path / "again", batch_size=40)
    again = predict_folder(run, phantom_folder / "images", tmp_path / "again", batch_size=40)
    pd.testing.assert_frame_equal(again.series, whole.series)


def test_an_ensemble_averages_what_each_run_answers(run, slice_run, phantom_folder, tmp_path):
    found = predict_folder([run, slice_run], phantom_folder / "images", tmp_path / "both")
    assert not set(HEADS) & set(found.series)
    alone = [one.series.set_index("series_instance_uid") for one in found.members]
    assert set(HEADS) <= set(alone[0]) and not set(HEADS) & set(alone[1])
    raw = [f"raw_{name}" for name in NAMES]
    logits = [np.log(one[raw]) - np.log1p(-one[raw]) for one in alone]
    mean = 1 / (1 + np.exp(-(logits[0] + logits[1]) / 2))
    series = found.series.set_index("series_instance_uid").loc[mean.index]
    np.testing.assert_allclose(series[NAMES].to_numpy(), mean.to_numpy(), atol=1e-5)


def test_other_data_are_scored_with_it(run, phantom_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("ich_keras.external._require_unseen", lambda *_: {"note": ""})
    found = evaluate_external(run, phantom_cache, tmp_path / "out")
    assert found.metrics["series"]["aggregation"]["rule"] == HEAD
    expected = own_answers(run, phantom_cache, np.arange(len(phantom_cache.slices)))
    by_hand = np.stack([expected[uid] for uid in found.series["series_uid"]])
    np.testing.assert_allclose(found.series[NAMES].to_numpy(), by_hand, atol=1e-5)


def copy_of(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    return copy


def test_a_run_that_lost_its_head_is_refused(run, phantom_folder, tmp_path):
    copy = copy_of(run, tmp_path)
    (copy / "context.json").unlink()
    (copy / WEIGHTS).unlink()
    with pytest.raises(StaleError, match=r"has lost its context\.json"):
        predict_folder(copy, phantom_folder / "images", tmp_path / "out")


def test_validation_predictions_without_the_head_are_refused(run, tmp_path):
    copy = copy_of(run, tmp_path)
    (copy / "checksums.json").unlink()
    data = json.loads((copy / "data.json").read_text())
    data.pop("pixels_of")  # as a run of before there were checksums
    (copy / "data.json").write_text(json.dumps(data))
    path = copy / "predictions-valid.csv"
    table = pd.read_csv(path)
    table.drop(columns=HEADS).to_csv(path, index=False)
    with pytest.raises(StaleError, match=r"predictions-valid\.csv is damaged: .*head_"):
        read_validation_scores(RunFolder(copy), SIX)
    table[HEADS[0]] = 1.5
    table.to_csv(path, index=False)
    with pytest.raises(StaleError, match="a head's answer is not a probability"):
        read_validation_scores(RunFolder(copy), SIX)
