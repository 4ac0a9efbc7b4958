"""The questions "context" and "labels": heads as a second stage, what is stored, what is said."""

import contextlib
import copy
import itertools
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from narrow import preset_of

from ich_keras import levels, training
from ich_keras.files import read_json, write_json
from ich_keras.labels import LABELS, SIX
from ich_keras.models.presets import PRESETS
from ich_keras.models.sequence import KINDS, SequenceSpec, sequence_head
from ich_keras.models.spec import ModelSpec

# Not installed: it runs from a clone.
sys.path.append(str(Path(__file__).parents[1]))

from experiments import reproduce as reproducing
from experiments.__main__ import main
from experiments.context_runs import HEADS
from experiments.data import claim_work
from experiments.declare import chosen_runs, declaration, head_settings, joint_settings, stage_of
from experiments.heads import head_operations, padded_lengths
from experiments.place import Place
from experiments.report import context
from experiments.report.page import write_report
from experiments.reproduce import plan_tasks, reproduce
from experiments.results import RESULT, Result, load_result, load_results
from experiments.runs import RUNS
from experiments.scales import SCALES, Fitting, Scale
from experiments.scores import scored, sound_results
from experiments.settle import Task

FAKE = Scale(
    name="fake",
    title="in a test",
    size=48,
    series_slices=9,
    fittings={
        "slice": Fitting(16, 2, 3e-3),
        "stack": Fitting(16, 1, 3e-3),
        "slab": Fitting(8, 1, 1e-3),
        "series": Fitting(2, 1, 1e-3),
    },
    seeds=(0, 1),
    fractions={"slice": (0.5,), "slab": (0.5,), "series": (0.5,)},
    warmup_steps=0,
    num_series=24,
    head=Fitting(4, 3, 3e-3),
)
NARROW = {
    "2d": ModelSpec((48, 48, 3), depth=10, width=4),
    "slab": replace(PRESETS["resnet10_3d_slab"].spec, input_shape=(5, 48, 48, 3), width=4),
    "series": ModelSpec((9, 48, 48, 3), depth=10, width=4),
    "stack": ModelSpec((48, 48, 9), depth=10, width=4),
    "slab-thin-operations": replace(
        PRESETS["resnet10_3d_thin"].spec, input_shape=(5, 48, 48, 3), width=4
    ),
    "stand-in-3d-18": replace(
        PRESETS["resnet10_3d_medicalnet"].spec, input_shape=(5, 48, 48, 1), width=4
    ),
}


@pytest.fixture(scope="module")
def narrow_runs():
    """All views with networks of four channels."""
    with pytest.MonkeyPatch.context() as patch:
        # Other tests look at these.
        patch.setattr(training, "report_page", lambda *_: "")
        patch.setattr(training, "domain_of", lambda *_: None)
        patch.setattr(levels, "_operating", lambda *_: {})
        patch.setattr(levels, "_intervals", lambda *_: None)
        narrow = {RUNS[key].preset: f"narrow_{key}" for key in NARROW}
        for key, run in list(RUNS.items()):
            if run.preset in narrow:
                patch.setitem(RUNS, key, replace(run, preset=narrow[run.preset]))
        with contextlib.ExitStack() as presets:
            for key, spec in NARROW.items():
                presets.enter_context(preset_of(f"narrow_{key}", spec))
            yield


MADE = ("2d", "sequence-conv", "sequence-attention-series", "sequence-gru-end-to-end")


@pytest.fixture(scope="module")
def made(narrow_runs, tmp_path_factory, phantom_cache_folder):
    """A head on a slice network, both trained."""
    folder = tmp_path_factory.mktemp("context")
    place = Place(work=folder / "work", out=folder / "out", scale=FAKE, device="cpu")
    claim_work(place)
    shutil.copytree(phantom_cache_folder, place.cache_dir())
    assert reproduce(place, [*MADE], (0,)) == len(MADE)
    return place


def test_a_head_is_a_second_stage(made):
    results = load_results(made.out)
    assert set(results) == set(MADE)
    (below,), (head,) = results["2d"], results["sequence-conv"]
    assert head.predictions["sop"].tolist() == below.predictions["sop"].tolist()
    assert not np.allclose(head.predictions[list(LABELS)], below.predictions[list(LABELS)])
    assert head.info["config"]["preset"] == "sequence_conv"
    assert head.info["config"]["fit"]["epochs"] == len(head.history) == 3
    assert head.info["config"]["data"]["split"] == below.info["config"]["data"]["split"]
    assert head.info["best_epoch"] == head.history["valid_log_loss"].idxmin() + 1
    # What it stands on, as it is stored.
    on = head.info["on"]
    assert on["key"] == "2d" and on["seconds"] == below.info["seconds"]
    assert on["training_operations"] == below.info["training_operations"]
    for level, part in on["metrics"].items():
        kept = below.info["metrics"][level]
        assert part == {"log_loss": kept["log_loss"], "auroc_any": kept["auroc"]["any"]}
    sound_results(made.out)


def test_operations_of_a_head_are_its_own_and_of_the_features(made):
    (below,), (head,) = (load_results(made.out)[key] for key in ("2d", "sequence-conv"))
    per_slice = below.info["training_operations"] / (3 * below.info["samples_seen"])
    with_features = head.info["training_operations"] - per_slice * sum(
        below.info["slices"].values()
    )
    assert 0 < with_features < head.info["training_operations"]
    assert head.info["samples_seen"] == 3 * head.info["series"]["train"]
    per_series = len(head.predictions) / head.predictions["series"].nunique() * per_slice
    assert per_series < head.info["predicting_operations"] < 2 * per_series


def test_end_to_end_is_a_head_and_three_epochs_of_both(made):
    (alone,), (both,) = (
        load_results(made.out)[key] for key in ("sequence-conv", "sequence-gru-end-to-end")
    )
    joint = both.info["head"]["end_to_end"]
    assert alone.info["head"]["end_to_end"] is None
    assert joint["config"] == joint_settings()
    assert both.history["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    before = both.history["valid_log_loss"][:3].idxmin() + 1
    kept = 3 + joint["best_epoch"] if joint["best_epoch"] else before
    assert both.info["best_epoch"] == kept
    # Three epochs over all training slices, forward twice and backward.
    (below,) = load_results(made.out)["2d"]
    per_slice = below.info["training_operations"] / (3 * below.info["samples_seen"])
    info = both.info
    slices = sum(info["slices"].values()) + 3 * 4 * info["slices"]["train"]
    heads = info["training_operations"] - per_slice * slices
    assert 0 < heads < info["training_operations"]
    series, of = info["series"]["train"], joint["config"]["batch_size"]
    assert info["steps"] == 3 * -(-series // 4) + 3 * -(-series // of)


def test_a_heads_own_answer_to_series_is_stored(made):
    """Where that rule won on validation; here it is made to."""
    (result,) = load_results(made.out)["sequence-conv"]
    table = result.predictions
    own = table[[f"head_{label}" for label in LABELS]]
    assert (own.groupby(table["series"]).nunique() == 1).all().all()
    info = copy.deepcopy(result.info)
    info["metrics"]["series"]["aggregation"]["rule"] = "head"
    found = scored(replace(result, info=info), "series")
    expected = own.groupby(table["series"], sort=False).first()
    np.testing.assert_allclose(found.values, expected.loc[found.names], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_of_the_kernels(kind):
    """Against torch's own count of a pass, on which recurrent layers are counted by hand."""
    spec = SequenceSpec(kind, features=10, width=8, depth=1, heads=2)
    head = sequence_head(spec)
    length, w, count = 16, 8, len(SIX)
    joined = 3 * w + count + 3
    cell = {"gru": 3, "lstm": 4}
    encoder = {
        **{name: 2 * gates * (w // 2) * (w + w // 2) for name, gates in cell.items()},
        "conv": 3 * w * w + w * w,
        "transformer": 4 * w * w + 2 * w * 2 * w + 2 * length * w,
        "attention": w * w,
    }[kind]
    pooled = 2 * w * (w // 2) + w // 2
    by_hand = length * (10 * w + joined * w + encoder + w * count + pooled) + w * count
    assert head_operations(head, length) == by_hand
    assert padded_lengths(np.array([1, 16, 17])).tolist() == [16, 16, 32]


def test_scores_on_validation_are_stored_beside_counting_voxels(made):
    for group in load_results(made.out).values():
        for result in group:
            valid = result.info["valid"]
            assert set(valid["metrics"]) == {"slice", "series"}
            assert 0 < valid["trivial_auroc_any"]["slice"] <= 1
    # The last column of the slice network's history, by another road: unsmoothed, at its epoch.
    (below,) = load_results(made.out)["2d"]
    row = below.history.iloc[below.info["best_epoch"] - 1]
    kept = below.info["valid"]["metrics"]["slice"]["auroc_any"]
    assert kept == pytest.approx(row["valid_auroc_any"], abs=0.01)


def test_memory_is_recorded_where_the_system_tells(made):
    peak = load_result(made.out, "2d", 0).info["peak_bytes"]
    assert peak["device"] is None
    if Path("/proc/self/clear_refs").exists():
        assert 10**8 < peak["resident"] < 10**11
        head = load_result(made.out, "sequence-conv", 0).info
        assert head["on"]["peak_bytes"] == peak


def test_heads_of_series_labels_have_all_of_the_share(made):
    head = load_result(made.out, "sequence-attention-series", 0).info["head"]
    assert head["config"]["learn_from"] == "series"
    assert set(head["share"].values()) == {1.0}
    assert set(load_result(made.out, "sequence-conv", 0).info["head"]["share"]) == set(LABELS)


def copied(made, tmp_path, with_cache=True):
    """Its results in another place, without its runs."""
    place = replace(made, work=tmp_path / "work", out=tmp_path / "out")
    shutil.copytree(made.out, place.out)
    claim_work(place)
    if with_cache:
        shutil.copytree(made.cache_dir(), place.cache_dir())
    return place


def test_a_slice_network_without_weights_is_planned_for_them_alone(made, tmp_path):
    place, keys = copied(made, tmp_path, with_cache=False), ["2d", "sequence-conv"]
    assert plan_tasks(place, keys, (0,)) == []
    shutil.rmtree(place.result_dir("sequence-conv", 0))
    again = [Task("2d", 0, "weights"), Task("sequence-conv", 0)]
    assert plan_tasks(place, keys, (0,)) == again
    # An interrupted training has weights, too, and they are not its last ones.
    run = place.run_dir("2d", 0)
    shutil.copytree(made.run_dir("2d", 0), run)
    assert plan_tasks(place, keys, (0,)) == again[1:]
    (run / "report.md").unlink()
    (run / "state" / "epoch-0001").mkdir(parents=True)
    assert plan_tasks(place, keys, (0,)) == again
    # Without its result it is an ordinary run.
    shutil.rmtree(place.result_dir("2d", 0))
    assert plan_tasks(place, keys, (0,)) == [Task("2d", 0), Task("sequence-conv", 0)]


@pytest.mark.slow
def test_the_slice_network_is_trained_again_and_its_result_stays(made, monkeypatch, tmp_path):
    place, keys = copied(made, tmp_path), ["2d", "sequence-conv"]
    shutil.rmtree(place.result_dir("sequence-conv", 0))
    before = (place.result_dir("2d", 0) / RESULT).read_bytes()
    told = []
    assert reproduce(place, keys, (0,), tell=told.append) == 2
    assert (place.result_dir("2d", 0) / RESULT).read_bytes() == before
    assert "2d seed 0 (weights): done (1/2)" in told
    assert any(line.startswith("2d seed 0 (features): computing") for line in told)
    # On the same machine both trainings are the same.
    head = load_result(place.out, "sequence-conv", 0)
    there = load_result(made.out, "sequence-conv", 0)
    assert head.info["metrics"] == there.info["metrics"]
    # A finished head whose result is lost is stored again, unless its network is another one now.
    shutil.rmtree(place.result_dir("sequence-conv", 0))
    assert plan_tasks(place, keys, (0,)) == [Task("sequence-conv", 0)]
    with monkeypatch.context() as patch:
        patch.setattr(reproducing, "train_head", None)
        assert reproduce(place, keys, (0,)) == 1
    shutil.rmtree(place.result_dir("sequence-conv", 0))
    path = place.run_dir("sequence-conv", 0) / "context.json"
    write_json(path, read_json(path) | {"network": "0" * 64})
    monkeypatch.setattr(reproducing, "train_head", stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce(place, keys, (0,))


def stopped(*_):
    raise KeyboardInterrupt


def test_heads_come_after_their_networks_and_are_fingerprinted_with_them(monkeypatch):
    small = SCALES["small"]
    keys = chosen_runs(small, (), ("context", "labels"))
    for key in keys:
        assert all(keys.index(other) < keys.index(key) for other in RUNS[key].needs)
    assert {f"sequence-{kind}" for kind in KINDS} < set(keys) and set(HEADS) == set(KINDS)
    assert stage_of("sequence-gru") == 1
    before = declaration("sequence-gru", small, 0)
    assert before != declaration("sequence-gru-series", small, 0)
    assert before != declaration("sequence-lstm", small, 0)
    assert before != declaration("sequence-gru-end-to-end", small, 0)
    assert before != declaration("sequence-gru", replace(small, head=Fitting(16, 31, 1e-3)), 0)
    plain = declaration("2d", small, 0)
    assert plain == declaration("2d", replace(small, head=Fitting(1, 1, 1.0)), 0)
    monkeypatch.setitem(RUNS, "2d", replace(RUNS["2d"], augment="thesis"))
    assert declaration("sequence-gru", small, 0) != before
    settings = head_settings(RUNS["sequence-gru-series"], small, 2)
    assert (settings["learn_from"], settings["seed"], settings["kind"]) == ("series", 2, "gru")


def rows_of(text, heading):
    """The rows of the first table behind a heading, as lists of cells."""
    lines = text[text.index(heading) :].splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("| "))
    table = itertools.takewhile(lambda line: line.startswith("| "), lines[begin:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_report_shows_costs_labels_and_what_taught_nothing(made, monkeypatch):
    monkeypatch.setitem(SCALES, FAKE.name, FAKE)
    text = write_report(made.out).read_text()
    assert "## context: What do the other slices" in text
    assert "Not run: `stack`, `slab`, `sequence-gru`, `sequence-lstm`" in text
    section = text[text.index("## context") : text.index("## labels")]
    (below,), (head,) = (load_results(made.out)[key] for key in ("2d", "sequence-conv"))
    costs = {row[0]: row for row in rows_of(section, "**Costs**")}
    total = sum(r.info["training_operations"] for r in (below, head)) / 1e12
    assert costs["`sequence-conv`"][2] == f"{total:,.1f}"
    seconds = below.info["seconds"] + head.info["seconds"]
    assert costs["`sequence-conv`"][4] == f"{seconds:.0f}"
    assert costs["`2d, smoothed`"][1] == "as above"
    labels = {(row[0], row[1]): row for row in rows_of(section, "**AUROC of each label**")}
    assert {level for _, level in labels} >= {"slice", "series"}
    kept = head.info["metrics"]["slice"]["auroc"]["any"]
    assert labels["`sequence-conv`", "slice"][-1].startswith(f"{kept:.3f}")
    assert "| `2d, smoothed` - `2d` | slice |" in section
    assert "| `sequence-conv` - `2d, smoothed` | series |" in section
    assert "`sequence-conv` - `2d` | slice | auroc/any" in section
    assert "Share of the head in the logits of `any`" in section
    labels_section = text[text.index("## labels") :]
    assert "`sequence-attention-series` - `2d` | slice" in labels_section


def made_up(key, seed, validation=None, counting=None, history=0.8, **info):
    """A stored result with what its validation says."""
    series = key.startswith("series")
    config = {"data": {"view": "series" if series else "slice", "split": f"patient-s{seed}.json"}}
    config["fit"] = {"epochs": 2, "learning_rate": 1e-3}
    metrics = {"series" if series else "slice": {"auroc": {"any": 0.7}, "log_loss": 0.3}}
    content = {"config": config, "metrics": metrics, "cache": "c", "patients": {"train": 9}}
    content["trivial_auroc_any"] = {"slice": 0.6, "series": 0.65}
    if counting is not None:
        level = "series" if series else "slice"
        content["valid"] = {
            "metrics": {} if validation is None else {level: {"auroc_any": validation}},
            "trivial_auroc_any": {"slice": counting, "series": counting},
        }
    table = {"epoch": [1, 2], "valid_log_loss": [0.5, 0.4], "valid_auroc_any": [0.1, history]}
    return Result(key, seed, content | info, pd.DataFrame(), pd.DataFrame(table), None)


def test_what_taught_nothing_is_told_by_validation_alone():
    results = {
        # Stored before validation was recorded: its history, and a later run's count.
        "2d": [made_up("2d", 0, history=0.75), made_up("2d", 1), made_up("2d", 2)],
        "sequence-gru": [
            made_up("sequence-gru", 0, 0.79, 0.78),
            made_up("sequence-gru", 1, 0.7, 0.7),
        ],
        "series": [made_up("series", 0, 0.9, 0.8)],
    }
    text = "\n".join(context.taught_nothing("context", results))
    rows = rows_of(text, "**Taught")[2:]
    assert [row[:5] for row in rows] == [
        ["`2d`", "0", "slice", "0.750", "0.780"],
        ["`sequence-gru`", "1", "slice", "0.700", "0.700"],
    ]
    assert rows[0][5:] == ["0.700", "0.600", "9 patients, 2 epochs at 0.001"]
    assert "Not known, since it was not recorded: `2d` seed 2." in text
    only = {"series": results["series"]}
    assert "in AUROC of `any`: none." in context.taught_nothing("context", only)[0]


def test_memory_is_that_of_all_stages_or_not_recorded():
    peak = {"resident": 3 * 2**30, "device": None}
    more = {"resident": 5 * 2**30, "device": None}
    assert context.peak_bytes({"peak_bytes": peak}) == 3 * 2**30
    assert context.peak_bytes({"peak_bytes": peak, "on": {"peak_bytes": more}}) == 5 * 2**30
    assert context.peak_bytes({"peak_bytes": {"resident": 1, "device": 7}}) == 7
    for unknown in ({}, {"peak_bytes": None}, {"peak_bytes": peak, "on": {"peak_bytes": None}}):
        assert context.peak_bytes(unknown) is None
    old, new = made_up("2d", 0), made_up("2d", 1, peak_bytes=peak)
    assert context._memory_text([old.info]) == "not recorded"
    assert context._memory_text([old.info, new.info]) == "3.0; 1 not recorded"


def test_a_slice_network_that_was_trained_again_is_told():
    on = {"key": "2d", "metrics": {"slice": {"auroc_any": 0.7}}}
    head = made_up("sequence-gru", 0, on=on)
    results = {"2d": [made_up("2d", 0)], "sequence-gru": [head]}
    assert context.networks_note("context", results) == []
    on["metrics"]["slice"]["auroc_any"] = 0.72
    (line, _) = context.networks_note("context", results)
    assert "`2d` seed 0 (0.700 stored, 0.720 here)" in line


@pytest.fixture
def few_resamples(monkeypatch):
    """Intervals of a few draws: other tests look at them."""
    from ich_keras.metrics.intervals import mean_bootstrap, mean_paired_bootstrap

    for name, of in (
        ("mean_bootstrap", mean_bootstrap),
        ("mean_paired_bootstrap", mean_paired_bootstrap),
    ):
        monkeypatch.setattr(f"experiments.scores.{name}", lambda parts, _, of=of: of(parts, 20))


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("name", ["context", "labels"])
def test_the_questions_are_answered_on_the_smallest_scale(narrow_runs, monkeypatch, tmp_path, name):
    tiny = replace(
        FAKE,
        name="tiny",
        size=32,
        num_series=16,
        matrix=64,
        slice_spacing_mm=(12.0, 16.0),
        seeds=(0,),
        fittings={view: Fitting(4, 1, 1e-3) for view in ("slice", "stack", "slab", "series")},
        other_series=12,
        head=Fitting(4, 1, 1e-3),
    )
    monkeypatch.setitem(SCALES, "tiny", tiny)
    words = ["question", name, "--tiny", "--device", "cpu", "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    results = load_results(tmp_path / "work" / "results")
    assert set(results) == set(chosen_runs(tiny, (), (name,)))
    text = (tmp_path / "work" / "results" / "README.md").read_text()
    assert f"## {name}: " in text and "Not run:" not in text[text.index(f"## {name}: ") :]
    if name == "labels":
        again = CliRunner().invoke(main, words)
        assert again.exit_code == 0 and "0 of" in again.output
