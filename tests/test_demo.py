"""The demo, tiny: every station of the road, what it says and what it leaves behind."""

import json

import pytest
from sklearn.metrics import roc_auc_score

from ich_keras import demo
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import Split
from ich_keras.data.trivial import hu_band_counts, trivial_detector
from ich_keras.demo import PLANS, DemoSettings, choose_plan, run_demo
from ich_keras.errors import UsageError
from ich_keras.labels import LABELS
from ich_keras.phantom.dicom import PATIENT_PREFIX, is_synthetic

TINY = DemoSettings(num_series=24, matrix=64, size=32, epochs=1)


@pytest.mark.slow
def test_the_demo_walks_the_whole_road(tmp_path):
    told, calls = [], []
    result = run_demo(
        tmp_path / "demo",
        seed=4,
        settings=TINY,
        progress=lambda *call: calls.append(call),
        tell=told.append,
    )
    steps = {call[0] for call in calls}
    assert {"drawing phantoms", "indexing", "caching", "training", "validating"} <= steps
    # One step for the whole training, which ends after the last validation.
    fitting = [call for call in calls if call[0] == "training"]
    (total,) = {call[2] for call in fitting}
    assert fitting[0] == ("training", 0, total, "epoch 1/1")
    assert [call for call in fitting if call[1] == total] == fitting[-1:]
    assert all(call[3].startswith("epoch 1/1") for call in fitting)
    last_validation = max(n for n, call in enumerate(calls) if call[0] == "validating")
    assert calls.index(fitting[-1]) > last_validation
    assert result.run_dir == tmp_path / "demo" / "run"
    summary = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert summary["synthetic"] is True
    assert summary["plan"] is None
    assert told[0].startswith("Demo on synthetic head CT; backend ")
    assert told[1] == "Plan of your own: 24 series, resnet18_2d at 32x32 pixels, 1 epoch."
    metrics = json.loads((result.run_dir / "metrics-test.json").read_text())["slice"]
    assert summary["auroc"] == metrics["auroc"]
    assert any("AUROC(any): " in line for line in told)
    trivial = (
        f"Counting voxels per HU band instead, AUROC(any): {summary['trivial_auroc_any']:.3f}."
    )
    assert trivial in (result.run_dir / "report.md").read_text()
    assert str(result.run_dir / "report.html") in told[-1]

    cache = CTCache.open(tmp_path / "demo" / "cache")
    slices = cache.slices
    assert is_synthetic(slices)
    assert slices["patient_id"].str.startswith(PATIENT_PREFIX).all()
    assert not is_synthetic(slices.assign(patient_id="ID_f15c0eee"))
    split = Split.load(result.run_dir / "split.json")
    train, test = (split.indices(slices, part) for part in ("train", "test"))
    counts, truth = hu_band_counts(cache.slices_hu(range(len(slices)))), slices["any"].to_numpy()
    values = trivial_detector(counts[train], truth[train], counts[test])
    assert summary["trivial_auroc_any"] == pytest.approx(roc_auc_score(truth[test], values))
    positive = slices.iloc[test].loc[lambda table: table["any"] == 1]
    assert summary["test_patients_with"]["any"] == positive["patient_id"].nunique()
    assert set(summary["test_patients_with"]) == set(LABELS)
    with pytest.raises(UsageError, match="already exists"):
        run_demo(tmp_path / "demo", settings=TINY)


def test_the_hardware_chooses_a_plan(monkeypatch):
    assert choose_plan("cuda") == "full"
    monkeypatch.setattr(demo, "choose_precision", lambda name, device: "float32")
    assert choose_plan("cpu") == "light"
    monkeypatch.setattr(demo, "choose_precision", lambda name, device: "bfloat16")
    assert choose_plan("cpu") == "full"
    assert PLANS["full"] == DemoSettings()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan": "quick"}, "demo plan 'quick'; expected one of full, light"),
        ({"plan": "light", "settings": TINY}, "both a plan and settings are given"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_is_written(tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        run_demo(tmp_path / "demo", **given)
    assert list(tmp_path.iterdir()) == []


class Stop(Exception):
    pass


def test_a_named_plan_is_what_is_drawn_and_trained(tmp_path, monkeypatch):
    drawn, trained, told = [], [], []

    def stop(config, *arguments, **options):
        trained.append(config)
        raise Stop

    monkeypatch.setattr(demo, "write_phantoms", lambda out, count, seed, **o: drawn.append(count))
    monkeypatch.setattr(demo, "train_dicom", stop)
    for name, plan in PLANS.items():
        with pytest.raises(Stop):
            run_demo(tmp_path / name, plan=name, device="cpu", tell=told.append)
        assert f"Plan {name}: {plan.num_series} series" in told[-1]
        assert drawn[-1] == plan.num_series
        config = trained[-1]
        assert (config.preset, config.precision) == (plan.preset, plan.precision)
        assert (config.data.size, config.fit.epochs) == (plan.size, plan.epochs)
