"""The thesis's numbers and its convention; what is run, what is kept, what is said of it."""

import gzip
import hashlib
import json
import queue
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn import metrics as sk

from ich_keras.config import RunConfig
from ich_keras.data.split import Split, audit, split_by_patient
from ich_keras.data.trivial import (
    cache_band_counts,
    hu_band_counts,
    trivial_auroc,
    trivial_detector,
)
from ich_keras.environment import environment_record
from ich_keras.errors import DataError, EnvironmentProblem, LostState, StaleError, UsageError
from ich_keras.files import read_json, write_json
from ich_keras.labels import ANY, LABELS, SUBTYPES
from ich_keras.metrics.aggregation import aggregate
from ich_keras.metrics.binary import TRUTH_COLUMNS, binary_metrics
from ich_keras.models.classifier import build_classifier, classifier
from ich_keras.models.cost import cost
from ich_keras.models.presets import PRESETS
from ich_keras.models.weights import save_weights
from ich_keras.models.weights_file import RECORD, read_weights
from ich_keras.models.weights_lookup import changed_file
from ich_keras.planning import plan_training
from ich_keras.recipe import Recipe
from ich_keras.run_folder import RunFolder

# Not installed: it runs from a clone.
sys.path.append(str(Path(__file__).parents[1]))

import itertools

from experiments import reproduce as reproducing
from experiments.convention import thesis_metrics
from experiments.data import claim_work
from experiments.declare import Source, base_config, chosen_runs, declaration
from experiments.listing import listing
from experiments.normalise_first import in_thesis_order
from experiments.place import Place
from experiments.questions import QUESTIONS, TABLE_RUNS, TABLES
from experiments.reproduce import reproduce
from experiments.results import RESULT, Result, load_result, load_results
from experiments.runs import RUNS
from experiments.scales import SCALES, Fitting, Scale
from experiments.scores import (
    compare,
    constant_under_convention,
    intervals,
    scored,
    under_convention,
)
from experiments.settle import Task, resolve
from experiments.sheet import contact_sheet
from experiments.splits import FOLDER, leaky_split, with_fraction
from experiments.tables import (
    PUBLISHED,
    SERIES_HEALTHY,
    SERIES_POSITIVE,
    SERIES_VALIDATION,
)
from experiments.times import _COUNTED, expected_seconds
from experiments.weights import absent_weights, starting_weights


def whole_series_validation():
    """A table with the counts of the thesis's validation set of whole series."""
    truth = np.zeros((SERIES_VALIDATION, len(LABELS)), int)
    positive = SERIES_VALIDATION - SERIES_HEALTHY
    assert positive == SERIES_POSITIVE[ANY]
    truth[:positive, -1] = 1
    place = 0
    for column, name in enumerate(SUBTYPES):
        for _ in range(SERIES_POSITIVE[name]):
            truth[place % positive, column] = 1
            place += 1
    np.testing.assert_array_equal(truth.sum(axis=0), list(SERIES_POSITIVE.values()))
    np.testing.assert_array_equal(truth[:, :-1].any(axis=1), truth[:, -1] == 1)
    return np.random.default_rng(0).permutation(truth)


def test_table_3_is_what_no_for_everyone_scores():
    truth = whole_series_validation()
    found = thesis_metrics(truth, np.zeros(truth.shape), batch_size=1)
    rounded = [round(found[n], 4) for n in ("accuracy", "hamming_loss", "hamming_score")]
    assert rounded == [0.6015, 0.1994, 0.6015]
    table = PUBLISHED["series"]
    for name in ("accuracy", "hamming_loss", "hamming_score"):
        assert found[name] == pytest.approx(getattr(table, name), abs=0.001)
    # And its loss is worse than that of always answering the prevalence.
    baseline = binary_metrics(truth, np.zeros(truth.shape))["baseline"]["prevalence"]
    assert baseline["log_loss"] == pytest.approx(0.4534, abs=5e-5)
    assert baseline["log_loss"] < table.loss


def test_one_batch_of_all_is_scikit_learn():
    random = np.random.default_rng(1)
    truth = (random.random((90, 6)) < 0.4).astype(int)
    values = np.clip(0.4 * truth + random.random((90, 6)) * 0.7, 0.01, 0.99)
    predicted = values >= 0.5
    found = thesis_metrics(truth, values, batch_size=90)
    assert found["loss"] == pytest.approx(sk.log_loss(truth.ravel(), values.ravel()))
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    assert found["hamming_loss"] == pytest.approx(sk.hamming_loss(truth, predicted))
    for name, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
    ):
        assert found[name] == pytest.approx(score(truth, predicted, average="macro"))
    ours = binary_metrics(truth, values)
    assert found["specificity"] == pytest.approx(ours["specificity"])
    assert found["hamming_score"] == pytest.approx(ours["hamming_score"])


def test_means_over_batches_depend_on_the_batches():
    truth = np.zeros((4, 6), int)
    truth[0] = 1
    values = np.where(truth == 1, 0.9, 0.1)
    # By hand: all is right, but three of four batches of one have nothing to be precise about.
    assert thesis_metrics(truth, values, 1)["precision"] == pytest.approx(0.25)
    assert thesis_metrics(truth, values, 1, zero_division=1)["precision"] == pytest.approx(1)
    assert thesis_metrics(truth, values, 2)["precision"] == pytest.approx(0.5)
    assert thesis_metrics(truth, values, 4)["precision"] == pytest.approx(1)
    # The last, smaller batch counts as much as the first.
    values[3] = 0.9
    assert thesis_metrics(truth, values, 3)["accuracy"] == pytest.approx((1 + 0) / 2)


def test_declarations_are_valid_at_every_scale():
    for scale in SCALES.values():
        for key, run in RUNS.items():
            config = base_config(run, scale, seed=1)
            assert RunConfig.from_dict(config.to_dict()) == config
            assert run.preset in PRESETS or run.on is not None
            view = Recipe.of(config).inputs.view
            assert view.kind == run.view, key
            assert run.published is None or run.published in PUBLISHED
            assert all(other in RUNS for other in run.needs)
            assert run.like is None or run.like[1] in RUNS
            # Weights of one preset, not of a similar one.
            assert all(
                run.weights.startswith(("collapsed:", "restrided:"))
                or RUNS[other].preset == run.preset
                for other in run.depends_on
            )
        assert all(
            fraction == 2 ** round(np.log2(fraction))
            for fractions in scale.fractions.values()
            for fraction in fractions
        )
    for question in QUESTIONS.values():
        assert set(question.runs) <= set(RUNS)
        assert {key for pair in question.pairs for key in pair} <= set(question.runs)
    assert {key for keys in TABLE_RUNS.values() for key in keys} <= set(RUNS)


def test_the_scale_of_real_data_has_the_settings_of_the_thesis():
    fittings = SCALES["rsna"].fittings
    assert fittings["slice"] == Fitting(32, 6, 1e-5)
    assert fittings["series"] == Fitting(1, 5, 3e-4)
    assert fittings["slab"] == Fitting(16, 5, 1e-4)
    config = base_config(RUNS["2d"], SCALES["rsna"], 0)
    assert (config.data.size, config.data.augment, config.data.balance) == (256, "thesis", False)
    # Worker processes would augment as the library does.
    assert base_config(RUNS["2d-normalise-first"], SCALES["rsna"], 0).data.loader_workers == 0


def test_stand_ins_may_be_fitted_longer_than_the_rest():
    small = SCALES["small"]
    own, usual = small.other_fittings["resnet18_3d_medicalnet"], small.fittings["slab"]
    assert own.epochs > usual.epochs
    fitted = {
        key: base_config(RUNS[key], small, 0).fit.epochs
        for key in ("stand-in-3d-18", "stand-in-2d-18", "slab-medicalnet", "slab")
    }
    assert fitted == {
        "stand-in-3d-18": own.epochs,
        "stand-in-2d-18": small.fittings["slice"].epochs,
        "slab-medicalnet": usual.epochs,
        "slab": usual.epochs,
    }


def test_runs_come_after_what_they_start_from():
    tiny = SCALES["tiny"]
    keys = chosen_runs(tiny, TABLES, tuple(QUESTIONS))
    for key in keys:
        assert all(keys.index(other) < keys.index(key) for other in RUNS[key].depends_on)
    assert "2d-half" in keys
    assert "2d-eighth" not in keys  # not among the fractions of this scale
    small = chosen_runs(SCALES["small"], (), ("fractions",))
    assert [key for key in small if "quarter" in key] == ["2d-quarter", "series-quarter"]
    assert chosen_runs(tiny, (2,)) == [
        *("2d-pretrained", "2d-pretrained-thesis"),
        *("stand-in-2d-18", "2d-stand-in", "2d-stand-in-thesis"),
    ]
    # Real data have real weights.
    assert not any("stand-in" in key for key in chosen_runs(SCALES["rsna"], TABLES))


def test_thin_networks_and_kinetics_are_asked_for_by_name():
    assert not any(QUESTIONS[name].in_all for name in ("thin", "kinetics"))
    tiny = chosen_runs(SCALES["tiny"], (), ("thin",))
    assert tiny.index("stand-in-3d-18") < tiny.index("slab-thin-stand-in")
    real = chosen_runs(SCALES["rsna"], (), ("thin", "kinetics"))
    assert not any("stand-in" in key for key in real)
    for key in ("slab-thin-pretrained", "slab-thin-atrous-pretrained"):
        assert key in real
        assert RUNS[key].needs_weights == "medicalnet_resnet18_23datasets"
    assert RUNS["slab-r3d_18-pretrained"].needs_weights == "torchvision_r3d_18"
    assert RUNS["slab-thin-stand-in"].depends_on == ("stand-in-3d-18",)
    # The same windows or the same range for all that are compared.
    for name in ("thin", "kinetics"):
        for one, other in QUESTIONS[name].pairs:
            recipes = [Recipe.of(base_config(RUNS[k], SCALES["rsna"], 0)) for k in (one, other)]
            assert len({recipe.network.channels for recipe in recipes}) == 1, (one, other)
    # Estimated from operations, since nothing was measured: five times those of the slab.
    small = SCALES["small"]
    ratio = expected_seconds("slab-thin", small) / expected_seconds("slab", small)
    assert ratio == pytest.approx(4.987 / 0.978, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("preset", _COUNTED)
def test_operations_of_networks_that_were_not_timed(preset):
    spec = PRESETS[preset].spec
    for size, operations in _COUNTED[preset].items():
        shape = (5, size, size, spec.channels)
        found = cost(build_classifier(preset, input_shape=shape)).multiply_adds / 5e9
        assert found == pytest.approx(operations, abs=0.001)


def test_weights_of_thin_networks_are_restrided(tmp_path, monkeypatch):
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", str(tmp_path))
    source = tmp_path / "medicalnet_resnet18_23datasets.weights.h5"
    command = absent_weights("slab-thin-pretrained")
    assert command.startswith("weights-convert convert --source medicalnet_resnet18_23datasets")
    restriding = f"weights-convert restride {source} --to resnet18_3d_thin"
    assert command.endswith(f" && {restriding}")
    source.touch()
    assert absent_weights("slab-thin-pretrained") == restriding
    changed_file(source, "resnet18_3d_thin").touch()
    assert absent_weights("slab-thin-pretrained") == ""
    assert "restride" not in absent_weights("slab-mc3_18-pretrained")

    place = Place(tmp_path / "work", tmp_path / "out", SCALES["tiny"])
    best = RunFolder(place.run_dir("stand-in-3d-18", 0)).best_weights
    best.parent.mkdir(parents=True)
    spec = replace(PRESETS["resnet18_3d_medicalnet"].spec, width=8).with_any_size()
    save_weights(classifier(spec), best, {"network": spec.to_dict()})
    for preset in ("resnet18_3d_thin", "resnet18_3d_thin_atrous"):
        path = starting_weights(place, "restrided:stand-in-3d-18", preset)
        assert Path(path).parent == best.parent
        found = read_weights(path).spec
        assert found is not None
        assert set(found.differences(PRESETS[preset].spec)) == {"width"}
        assert starting_weights(place, "restrided:stand-in-3d-18", preset) == path


def test_list_tells_every_run():
    text = listing()
    assert all(f"| `{key}` |" in text for key in RUNS)
    assert "loss 0.0823" in text


def test_a_declaration_that_changed_has_another_fingerprint(monkeypatch):
    tiny = SCALES["tiny"]
    before = {key: declaration(key, tiny, 0) for key in ("2d", "2d-half", "series")}
    assert before["2d"] != declaration("2d", tiny, 1)
    monkeypatch.setitem(RUNS, "2d", replace(RUNS["2d"], intensity="wide"))
    assert declaration("2d", tiny, 0) != before["2d"]
    assert declaration("2d-half", tiny, 0) != before["2d-half"]  # has as many steps as it
    assert declaration("series", tiny, 0) == before["series"]
    monkeypatch.setitem(RUNS, "2d", replace(RUNS["2d"], intensity=None, title="Another"))
    assert declaration("2d", tiny, 0) == before["2d"]


def many_patients(count=96, per_patient=6):
    """A slice table of patients with two series each, a third of them with bleeds."""
    random = np.random.default_rng(0)
    rows = []
    for patient in range(count):
        kinds = (random.random(5) < 0.3) & (patient % 3 == 0)
        for number in range(per_patient):
            positive = kinds & (random.random(5) < 0.7)
            rows.append(
                {
                    "patient_id": f"SECRET{patient:03d}",
                    "study_instance_uid": f"T{patient}",
                    "series_uid": f"S{patient}-{number * 2 // per_patient}",
                    "sop_instance_uid": f"ID_{random.integers(2**40):010x}",
                    **dict(zip(LABELS, [*positive.astype(int), int(positive.any())], strict=True)),
                }
            )
    return pd.DataFrame(rows)


def test_fractions_are_nested_and_leave_valid_and_test_alone():
    slices = many_patients()
    whole = split_by_patient(slices, 3)
    parts = [with_fraction(whole, slices, fraction) for fraction in (0.125, 0.25, 0.5)]
    patients = [
        set(slices["patient_id"].iloc[split.indices(slices, "train")]) for split in (*parts, whole)
    ]
    for small, large in itertools.pairwise(patients):
        assert small < large
        assert len(small) == pytest.approx(len(large) / 2, abs=1.5)
    for split in parts:
        audit(split, slices)
        assert split.members["valid"] == whole.members["valid"]
        assert split.members["test"] == whole.members["test"]
        positive = slices.iloc[split.indices(slices, "train")].groupby("patient_id")[ANY].max()
        assert positive.mean() == pytest.approx(1 / 3, abs=0.15)
    assert with_fraction(whole, slices, 0.25) == parts[1]
    with pytest.raises(UsageError, match="0.3"):
        with_fraction(whole, slices, 0.3)


def test_the_leaky_split_has_as_many_patients_and_leaks():
    slices = many_patients()
    fair = split_by_patient(slices, 0)
    leaky = leaky_split(slices, fair)
    patients = {
        part: [
            set(slices["patient_id"].iloc[split.indices(slices, part)]) for split in (fair, leaky)
        ]
        for part in ("train", "valid", "test")
    }
    assert len(patients["train"][0]) == len(patients["train"][1])
    assert patients["test"][1] <= patients["test"][0] <= patients["train"][1]
    assert not patients["valid"][1] & patients["test"][1]  # who chooses the epoch reports nothing
    counts = {part: len(uids) for part, uids in leaky.members.items()}
    assert counts["train"] == pytest.approx(0.8 * sum(counts.values()), abs=1)
    shared = audit(leaky, slices)["shared"]["train/test"]
    assert shared["patients"] == len(patients["test"][1]) and shared["slices"] == 0
    assert "too good" in leaky.warning
    assert leaky_split(slices, fair) == leaky
    assert leaky_split(slices, split_by_patient(slices, 1)) != leaky


def test_normalised_before_brightness_is_cut_to_the_range_of_images():
    random = np.random.default_rng(0)
    windows = random.random((16, 16, 3), np.float32)
    change = in_thesis_order
    mean, std = np.array([0.1738, 0.1433, 0.1970]), np.array([0.3161, 0.2850, 0.3111])
    normalised = [(change(windows, seed) - mean) / std for seed in range(40)]
    is_cut = [found.min() > -1e-5 and found.max() < 1 + 1e-5 for found in normalised]
    assert 10 <= sum(is_cut) <= 30  # half of them
    # Bright blood, distinct before, is one value after.
    cut = normalised[is_cut.index(True)]
    assert (cut > 1 - 1e-5).mean() > 0.3
    np.testing.assert_array_equal(change(windows, 5), change(windows, 5))


def _thesis_order_of_the_kept_results():
    """How the thesis's order was computed for experiments/results, by replacing what the library's
    `make_augmentation` returned."""
    import albumentations
    import cv2

    from ich_keras.data import augment
    from ich_keras.data.seeds import sample_seed

    flip = albumentations.Compose([albumentations.HorizontalFlip(p=0.5)])
    moves = albumentations.Compose(
        [
            albumentations.VerticalFlip(p=0.5),
            albumentations.Affine(
                translate_percent=(-0.0625, 0.0625),
                scale=(0.9, 1.1),
                keep_ratio=True,
                rotate=(-45, 45),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=0.5,
            ),
        ]
    )
    mean = np.asarray((0.1738, 0.1433, 0.1970), np.float32)
    std = np.asarray((0.3161, 0.2850, 0.3111), np.float32)

    def change(windows, seed):
        augment.seed_pipeline(flip, seed)
        windows = np.clip(flip(image=windows)["image"], 0.0, 1.0, dtype=np.float32)
        augment.seed_pipeline(moves, sample_seed(seed, 0, 0))
        windows = np.clip(moves(image=windows)["image"], 0.0, 1.0, dtype=np.float32)
        random = np.random.default_rng([seed, 3])
        if random.random() >= 0.5:
            return windows
        contrast = 1 + random.uniform(-0.2, 0.2)
        brightness = random.uniform(-0.2, 0.2)
        changed = np.clip((windows - mean) / std * contrast + brightness, 0.0, 1.0)
        return (changed * std + mean).astype(np.float32)

    return change


# torch warns of more workers than cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_thesis_order_gives_the_batches_of_the_kept_results(phantom_cache):
    from ich_keras.data import batches
    from ich_keras.data.inputs import slice_windows
    from ich_keras.data.intensity import normalise
    from ich_keras.data.seeds import sample_seed

    indices = np.arange(0, len(phantom_cache), 3)[:32]
    change, expected = _thesis_order_of_the_kept_results(), []
    for epoch in range(2):
        loader = batches.slice_batches(phantom_cache, indices, 8, seed=7)
        for rows in loader.plan.batches(epoch):
            windows = slice_windows(phantom_cache.slices_hu(rows), 40)
            for place, row in enumerate(rows):
                windows[place] = change(windows[place], sample_seed(7, epoch, int(row)))
            expected.append(normalise(windows))
    settings = {"batch_size": 8, "size": 40, "seed": 7}
    for workers in (0, 1):
        loader = batches.slice_batches(
            phantom_cache, indices, augment=in_thesis_order, workers=workers, **settings
        )
        found = [inputs.numpy() for _ in range(2) for inputs, _ in loader]
        np.testing.assert_array_equal(np.stack(found), np.stack(expected))


# What is made, and made again.

FAKE = Scale(
    name="fake",
    title="in a test",
    size=48,
    series_slices=9,
    fittings={
        "slice": Fitting(4, 2, 1e-3),
        "slab": Fitting(4, 1, 1e-3),
        "series": Fitting(2, 1, 1e-3),
    },
    seeds=(0, 1),
    fractions={"slice": (0.5,), "slab": (0.5,), "series": (0.5,)},
    warmup_steps=0,
    num_series=24,
)


@pytest.fixture
def place(tmp_path, phantom_cache_folder):
    """A work folder whose cache is there."""
    made = Place(work=tmp_path / "work", out=tmp_path / "out", scale=FAKE, device="cpu")
    claim_work(made)
    shutil.copytree(phantom_cache_folder, made.cache_dir())
    return made


class FakeTraining:
    """In place of `ich_keras.training.train`: leaves what a run folder holds, at once."""

    def __init__(self, fails_at=None, says=None):
        self.configs = []
        self.fails_at = fails_at
        self.says = says or (lambda truth, values: values)
        self.started = "2026-01-02T03:04:05"

    def __call__(self, config, cache, out, tell=None):
        from ich_keras.data.split import make_split

        self.configs.append(config)
        assert not out.exists()
        write_json(out / "config.json", config.to_dict())
        write_json(out / "recipe.json", Recipe.of(config, cache.size).to_dict())
        if len(self.configs) == self.fails_at:
            raise KeyboardInterrupt
        split = make_split(config.data.split, cache.slices, config.seed)
        split.save(out / "split.json")
        with h5py.File(out / "best.weights.h5", "w") as file:
            file.attrs[RECORD] = json.dumps({"epoch": 2})
        plan = plan_training(cache, config).to_dict()
        data = {"cache": cache.fingerprint, "plan": plan, "synthetic": True}
        write_json(out / "data.json", data)
        write_json(out / "environment.json", environment_record("cpu") | {"started": self.started})
        history = {"epoch": [1, 2], "valid_log_loss": [0.5, 0.4], "valid_auroc_any": [0.6, 0.7]}
        history = pd.DataFrame(history | {"seconds": [1, 2]})
        history.to_csv(out / "history.csv", index=False)
        table = cache.slices.iloc[split.indices(cache.slices, "test")]
        truth = table[list(LABELS)].to_numpy()
        values = np.random.default_rng(config.seed).random(truth.shape, np.float32)
        values = self.says(truth, values)
        rows = pd.DataFrame({"sop_instance_uid": table["sop_instance_uid"].to_numpy()})
        rows["series_instance_uid"] = table["series_uid"].to_numpy()
        rows[list(LABELS)], rows[list(TRUTH_COLUMNS)] = values, truth
        rows.to_csv(out / "predictions-test.csv", index=False)
        series = table["series_uid"].to_numpy()
        levels = {
            "slice": binary_metrics(truth, values),
            "series": binary_metrics(
                aggregate(truth, series).to_numpy().astype(int),
                aggregate(values, series).to_numpy(),
            ),
        }
        levels["series"]["aggregation"] = {"rule": "max"}
        (out / "state").mkdir()
        write_json(out / "metrics-test.json", levels)
        (out / "report.md").touch()


def test_what_is_there_stays_and_what_is_half_made_is_made_again(place, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        reproduce(place, ["2d", "2d-half"], (0,), train_run=FakeTraining(fails_at=2))
    assert load_results(place.out).keys() == {"2d"}
    assert (place.run_dir("2d-half", 0) / "config.json").is_file()
    again = FakeTraining()
    assert reproduce(place, ["2d", "2d-half"], (0,), train_run=again) == 1
    assert len(again.configs) == 1
    # Twice the epochs, as half of the patients give half of the steps.
    assert again.configs[0].fit.epochs >= 3
    assert reproduce(place, ["2d", "2d-half"], (0,), train_run=again) == 0
    assert not (place.run_dir("2d", 0) / "state").exists()
    # A finished folder whose results were not kept yet is not trained again.
    shutil.rmtree(place.result_dir("2d", 0))
    assert reproduce(place, ["2d", "2d-half"], (0,), train_run=again) == 1
    assert len(again.configs) == 1
    # Another seed is another run. Voxels are counted once for all of them.
    assert len(list(place.work.glob("cache-bands-*.npy"))) == 1
    monkeypatch.setattr("experiments.keeping.cache_band_counts", None)
    reproduce(place, ["2d"], (0, 1), train_run=again)
    assert [config.seed for config in again.configs] == [0, 1]


def test_a_result_says_when_and_where_the_run_was_trained(place, monkeypatch):
    """Also where it is kept again, by another version on another day."""
    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    path = place.result_dir("2d", 0) / RESULT
    before = read_json(path)
    assert before["date"] == "2026-01-02"
    trained = environment_record("cpu") | {"started": FakeTraining().started}
    machine = before["machine"]
    for name, kept in (
        ("device_name", "device"),
        ("processor", "processor"),
        ("cpu_count", "cores"),
    ):
        assert machine[kept] == trained.pop(name)
    assert before["environment"] == trained
    shutil.rmtree(path.parent)
    monkeypatch.setattr("ich_keras.environment.versions", lambda: {"torch": "9"})
    monkeypatch.setattr("ich_keras.environment.device_name", lambda device: "another")
    reproduce(place, ["2d"], (0,), train_run=None)
    assert read_json(path) == before
    # A run of an older version does not know.
    shutil.rmtree(path.parent)
    write_json(place.run_dir("2d", 0) / "environment.json", {"backend": "torch"})
    with pytest.raises(StaleError, match="lacks cpu_count, device_name, processor, started"):
        reproduce(place, ["2d"], (0,), train_run=None)


def confidently_wrong(truth, values):
    """A sigmoid that saturates: positives at 4e-7 and less, most negatives at exactly 0 or 1."""
    wrong = np.where(truth == 1, values * np.float32(4e-7), np.where(values < 0.5, 0, 1))
    return wrong.astype(np.float32)


def test_a_network_that_is_sure_and_wrong_is_reported(place):
    """Its losses stand on digits that six decimals have not."""
    from experiments.scores import sound_results

    reproduce(place, ["2d"], (0,), train_run=FakeTraining(says=confidently_wrong))
    (result,) = sound_results(place.out)["2d"]
    kept = result.info["metrics"]["slice"]
    assert kept["log_loss"] > 5
    found = binary_metrics(
        result.predictions[list(TRUTH_COLUMNS)].to_numpy(),
        result.predictions[list(LABELS)].to_numpy(),
    )
    assert found["log_loss"] == pytest.approx(kept["log_loss"], abs=1e-6)
    assert found["auroc"] == kept["auroc"]


def test_results_of_another_scale_are_refused_before_anything_is_trained(place, monkeypatch):
    from experiments.__main__ import main

    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    command = ["question", "normalise", "--tiny", "--device", "cpu"]
    folders = ["--work", str(place.work.parent / "new"), "--out", str(place.out)]
    monkeypatch.setattr("experiments.reproduce.reproduce", None)
    result = CliRunner().invoke(main, [*command, *folders])
    assert result.exit_code == 6
    assert "has results of the scale fake, not tiny" in result.output
    assert not (place.work.parent / "new").exists()


def test_phantoms_as_dicom_files_try_the_road_of_real_data(place, monkeypatch):
    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    monkeypatch.setitem(SCALES, FAKE.name, replace(FAKE, num_series=None))
    assert not SCALES[FAKE.name].is_synthetic
    assert load_results(place.out)["2d"][0].info["synthetic"]
    # What is said to be phantoms must be.
    monkeypatch.setitem(SCALES, FAKE.name, FAKE)
    path = place.result_dir("2d", 0) / RESULT
    write_json(path, read_json(path) | {"synthetic": False})
    with pytest.raises(StaleError, match="result.json is missing or damaged"):
        load_results(place.out)


def test_lines_of_worker_processes_are_told_by_their_parent():
    lines, told = queue.Queue(), []
    for line in ("2d seed 0: one", "2d seed 1: two"):
        lines.put(line)
    reproducing._tell_all(lines, told.append)
    assert told == ["2d seed 0: one", "2d seed 1: two"]
    # A worker puts its lines there; only the commands print.
    folder = Path(reproducing.__file__).parent
    printing = [
        path.name
        for path in sorted(folder.rglob("*.py"))
        if re.search(r"(?<!\w)(print|echo)\(", path.read_text(encoding="utf-8"))
    ]
    assert printing == ["__main__.py", "pretrain_command.py"]


def interrupted(place):
    with pytest.raises(KeyboardInterrupt):
        reproduce(place, ["2d"], (0,), train_run=FakeTraining(fails_at=1))
    folder = place.run_dir("2d", 0)
    (folder / "state" / "epoch-0001").mkdir(parents=True)
    write_json(folder / "environment.json", environment_record("cpu"))
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"precision": "float32"})  # as training settles it
    return folder


@pytest.mark.parametrize("problem", [None, "lost", "versions"])
def test_an_interrupted_run_goes_on_where_it_can(place, monkeypatch, problem):
    folder, training, went_on, told = interrupted(place), FakeTraining(), [], []

    def resume(out, cache, tell, augment):
        assert augment is None
        went_on.append(out)
        if problem == "lost":
            raise LostState("damaged.")
        config = RunConfig.from_dict(read_json(out / "config.json"))
        shutil.rmtree(out)
        FakeTraining()(config, cache, out)

    monkeypatch.setattr(reproducing, "resume", resume)
    if problem == "versions":
        before = environment_record("cpu")
        before["versions"]["torch"] = "1.0"
        write_json(folder / "environment.json", before)
    assert reproduce(place, ["2d"], (0,), tell=told.append, train_run=training) == 1
    assert went_on == ([] if problem == "versions" else [folder])
    assert len(training.configs) == (problem is not None)
    said = [
        line for line in told if line.startswith("2d seed 0: cannot be resumed, starting over: ")
    ]
    wanted = {None: "", "lost": "damaged.", "versions": "torch .*, was 1.0"}[problem]
    assert len(said) == (problem is not None)
    assert re.search(wanted, "".join(said))
    assert load_results(place.out).keys() == {"2d"}


def test_a_run_that_somebody_else_goes_on_with_is_left_alone(place, monkeypatch):
    folder = interrupted(place)

    def resume(out, cache, tell, augment):
        raise StaleError("training.lock is locked by another process.")

    monkeypatch.setattr(reproducing, "resume", resume)
    with pytest.raises(StaleError, match="is locked by another"):
        reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    assert (folder / "state" / "epoch-0001").is_dir()


def test_an_interrupted_run_that_was_declared_otherwise_starts_anew(place, monkeypatch):
    folder, training = interrupted(place), FakeTraining()
    write_json(folder.with_name("2d-s0.json"), {"declaration": "another"})
    monkeypatch.setattr(reproducing, "resume", None)
    assert reproduce(place, ["2d"], (0,), train_run=training) == len(training.configs) == 1


def test_weights_to_start_from_are_made_again_when_only_results_were_kept(place, monkeypatch):
    monkeypatch.setattr(reproducing, "is_kept", lambda place, key, seed: key == "stand-in-2d-18")
    keys = ["2d-stand-in", "stand-in-2d-18"]
    first, second = Task("stand-in-2d-18", 0), Task("2d-stand-in", 0)
    assert reproducing.plan_tasks(place, keys, (0,)) == [first, second]
    weights = place.run_dir(first.key, 0) / "best.weights.h5"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert reproducing.plan_tasks(place, keys, (0,)) == [second]


@pytest.mark.parametrize("name", ["result.json", "predictions.csv.gz", "history.csv"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "other"])
def test_damaged_results_are_named_and_made_again(place, name, damage):
    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    path = place.result_dir("2d", 0) / name
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        changed = {"empty": b"", "cut": raw[: len(raw) // 2], "other": b"{}"}[damage]
        path.write_bytes(changed)
    if (name, damage) == ("result.json", "gone"):
        assert load_results(place.out) == {}
    else:
        with pytest.raises(StaleError, match=f"{name} is missing or damaged") as refusal:
            load_results(place.out)
        assert f"Remove {path.parent}" in refusal.value.hint
        with pytest.raises(StaleError, match=f"{name} is missing or damaged"):
            reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    shutil.rmtree(path.parent)
    assert reproduce(place, ["2d"], (0,), train_run=FakeTraining(fails_at=1)) == 1
    assert path.read_bytes() == raw or name == "result.json"


def test_results_under_another_name_or_on_other_data_are_refused(place):
    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    folder = place.result_dir("2d", 0)
    renamed = folder.rename(folder.with_name("slab-s0"))
    with pytest.raises(StaleError, match="slab-s0 holds the result of 2d-s0"):
        load_results(place.out)
    renamed.rename(folder)
    info = read_json(folder / RESULT)
    write_json(folder / RESULT, info | {"cache": "0" * 64})
    for keys in (["2d"], ["2d", "series"]):
        with pytest.raises(StaleError, match="a result of other data than"):
            reproduce(place, keys, (0,), train_run=FakeTraining())
    write_json(place.work / "experiment.json", [])
    with pytest.raises(StaleError, match="experiment.json is damaged"):
        claim_work(place)


def test_results_of_other_dicom_files_are_refused(place, tmp_path):
    real = replace(FAKE, num_series=None)
    here, there = (
        replace(place, work=tmp_path / name, scale=real, source=Source(name, "labels.csv"))
        for name in ("here", "there")
    )
    claim_work(here)
    shutil.copytree(place.cache_dir(), here.cache_dir())
    reproduce(here, ["2d"], (0,), train_run=FakeTraining())
    assert reproduce(here, ["2d"], (0,), train_run=FakeTraining(fails_at=1)) == 0
    with pytest.raises(StaleError, match="with other settings"):
        reproduce(there, ["2d"], (0,), train_run=FakeTraining())


def test_other_settings_are_refused(place, monkeypatch):
    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    with pytest.raises(StaleError, match="num_series 24 .now 25"):
        claim_work(replace(place, scale=replace(FAKE, num_series=25)))
    with pytest.raises(UsageError, match="draws phantoms"):
        claim_work(replace(place, source=Source("a", "b")))
    with pytest.raises(UsageError, match="needs --dicom"):
        claim_work(replace(place, scale=SCALES["rsna"]))
    with pytest.raises(UsageError, match="not empty"):
        claim_work(replace(place, work=place.out))
    monkeypatch.setitem(RUNS, "2d", replace(RUNS["2d"], intensity="wide"))
    with pytest.raises(StaleError, match="with other settings"):
        reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    # Without its results the run folder is refused all the same.
    shutil.rmtree(place.out)
    with pytest.raises(StaleError, match="with other settings"):
        reproduce(place, ["2d"], (0,), train_run=FakeTraining())


def test_real_data_need_real_weights(place, monkeypatch, tmp_path):
    monkeypatch.setenv("ICH_KERAS_WEIGHTS", str(tmp_path / "none"))
    real = replace(FAKE, num_series=None)
    with pytest.raises(EnvironmentProblem, match="2d-pretrained starts from torchvision_resnet18"):
        reproducing.plan_tasks(replace(place, scale=real), ["2d-pretrained"], (0,))
    # On phantoms such a run is left out.
    assert reproducing.plan_tasks(place, ["2d-pretrained", "2d"], (0,)) == [Task("2d", 0)]


def test_equal_operations_and_equal_memory_are_worked_out(place, phantom_cache):
    slab, slab_cost = resolve(place, Task("slab", 0), phantom_cache)
    config, cost = resolve(place, Task("2d-operations", 0), phantom_cache)
    totals = [
        c.fit.epochs * k.samples_per_epoch * k.operations_per_sample
        for c, k in ((slab, slab_cost), (config, cost))
    ]
    assert totals[1] == pytest.approx(totals[0], rel=0.5 / config.fit.epochs + 1e-9)
    memory, _ = resolve(place, Task("slab-memory", 0), phantom_cache)
    assert 2 <= memory.fit.batch_size < 4


def test_no_more_processes_make_batches_than_there_are_cores(place, phantom_cache, monkeypatch):
    many = replace(place, scale=replace(FAKE, loader_workers=8))
    for cores, jobs, workers in ((16, 1, 8), (2, 1, 2), (8, 2, 4), (1, 2, 1)):
        monkeypatch.setattr("experiments.settle.usable_cores", lambda cores=cores: cores)
        config, _ = resolve(replace(many, jobs=jobs), Task("2d", 0), phantom_cache)
        assert config.data.loader_workers == workers
    assert resolve(place, Task("2d", 0), phantom_cache)[0].data.loader_workers == 0


def test_no_patient_id_reaches_the_results(place, phantom_cache):
    reproduce(place, ["2d"], (0,), train_run=FakeTraining())
    names = set(phantom_cache.slices["patient_id"])
    for path in place.out.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
            assert not any(name in text for name in names), path
            assert str(place.work) not in text, path
    # The same patient has the same number in every run.
    rows = load_result(place.out, "2d", 0).predictions
    owner = phantom_cache.slices.set_index("sop_instance_uid")["patient_id"]
    pairs = set(zip(rows["patient"], owner[rows["sop"]], strict=True))
    assert len(pairs) == rows["patient"].nunique() == owner[rows["sop"]].nunique()


def test_the_detector_that_counts_voxels_is_scored_on_the_same_slices(phantom_cache):
    split = split_by_patient(phantom_cache.slices, 0)
    train, test = (split.indices(phantom_cache.slices, name) for name in ("train", "test"))
    counts = hu_band_counts(phantom_cache.slices_hu(np.arange(len(phantom_cache.slices))))
    truth = phantom_cache.slices["any"].to_numpy()
    values = trivial_detector(counts[train], truth[train], counts[test])
    found = trivial_auroc(phantom_cache, train, test)
    counted = cache_band_counts(phantom_cache)
    assert trivial_auroc(phantom_cache, train, test, counts=counted) == found
    assert found["slice"] == pytest.approx(sk.roc_auc_score(truth[test], values))
    series = phantom_cache.slices["series_uid"].to_numpy()[test]
    worst = [(truth[test][series == uid].max(), values[series == uid].max()) for uid in set(series)]
    assert found["series"] == pytest.approx(sk.roc_auc_score(*zip(*worst, strict=True)))


# What is said of it.


def made_result(key, seed, rows, level="slice", rule="max", **info):
    """A result of predictions (name, series, patient, probabilities, truth)."""
    table = pd.DataFrame([row[:3] for row in rows], columns=["sop", "series", "patient"])
    values = np.array([row[3] for row in rows], float)
    truth = np.array([row[4] for row in rows], int)
    table[list(LABELS)], table[list(TRUTH_COLUMNS)] = values, truth
    series = table["series"].to_numpy()
    metrics = {level: binary_metrics(truth, values)}
    if level == "slice":
        labels = aggregate(truth, series).to_numpy().astype(int)
        metrics["series"] = binary_metrics(labels, aggregate(values, series, rule).to_numpy())
        metrics["series"]["aggregation"] = {"rule": rule}
    config = {"precision": "float32", "data": {"view": level}, "fit": {"epochs": 2}}
    content = {"config": config, "metrics": metrics}
    content["trivial_auroc_any"] = {"slice": 0.7, "series": 0.6}
    content |= {"date": "2026-01-02", "machine": {"device": "ARM", "cores": 2}}
    content["environment"] = {"backend": "torch", "versions": {"torch": "2.0"}}
    history = {"epoch": [1, 2], "valid_log_loss": [0.6, 0.5], "valid_auroc_any": [0.6, 0.7]}
    history = pd.DataFrame(info.pop("history", history))
    return Result(key, seed, content | info, table, history, None)


def some_rows(seed, quality=1.0, count=40, prefix=""):
    random = np.random.default_rng(seed)
    truth = (np.random.default_rng(count).random((count, 6)) < 0.4).astype(int)
    truth[:, -1] = truth[:, :-1].max(axis=1)
    values = np.clip(0.5 + quality * (truth - 0.5) * 0.4 + random.normal(0, 0.2, (count, 6)), 0, 1)
    return [
        (f"{prefix}n{i}", f"{prefix}s{i // 4}", i // 8, values[i], truth[i]) for i in range(count)
    ]


def test_pairs_are_aligned_by_name():
    rows = some_rows(1)
    other = [
        (name, series, patient, values * 0.5, truth)
        for name, series, patient, values, truth in rows
    ]
    shuffled = [other[i] for i in np.random.default_rng(0).permutation(len(other))]
    straight = compare([made_result("a", 0, rows)], [made_result("b", 0, other)], "slice")
    mixed = compare([made_result("a", 0, rows)], [made_result("b", 0, shuffled)], "slice")
    assert straight.mean == mixed.mean
    assert straight.per_seed == mixed.per_seed
    # Halving keeps every ranking within a label.
    assert straight.mean["auroc/any"]["value"] == pytest.approx(0)
    series = compare([made_result("a", 0, rows)], [made_result("b", 0, shuffled)], "series")
    assert series.num_samples == 10


def test_networks_that_rank_no_better_than_counting_voxels_are_named():
    from experiments.report.confounders import behind_notes

    results = {
        "2d": [made_result("2d", seed, some_rows(1)) for seed in range(3)],
        "slab": [made_result("slab", s, some_rows(s, quality=0.0)) for s in range(2)],
        "series": [
            made_result("series", seed, some_rows(1, quality=quality), "series")
            for seed, quality in enumerate((1.0, 0.0, 0.0))
        ],
    }
    (line, _) = behind_notes(("2d", "slab", "series"), results)
    assert "`slab` per slice (every seed)" in line
    assert "`series` per series (of seed 1 and 2)" in line
    assert "`2d`" not in line
    assert behind_notes(("2d",), results) == []


def test_pairs_on_other_samples_are_refused_or_cut_to_the_shared_ones():
    rows = some_rows(1)
    one, other = made_result("a", 0, rows), made_result("b", 0, rows[8:])
    with pytest.raises(DataError, match="40 samples, the other 32"):
        compare([one], [other], "slice")
    found = compare([one], [other], "slice", only_shared=True)
    assert (found.num_samples, found.num_patients, found.seeds) == (32, 4, (0,))
    assert found.mean["log_loss"]["value"] == 0
    assert compare([one], [made_result("b", 1, rows)], "slice") is None  # no seed in common
    turned = [(*row[:4], 1 - row[4]) for row in rows]
    with pytest.raises(DataError, match="different labels"):
        compare([one], [made_result("b", 0, turned)], "slice")
    # Whole series say nothing about slices.
    assert compare([made_result("a", 0, rows, "series")], [one], "slice") is None


def test_numbers_by_hand():
    truth = [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]
    rows = [
        ("n0", "s0", 0, [0.1] * 6, truth[0]),
        ("n1", "s0", 0, [0.8, 0.1, 0.1, 0.1, 0.1, 0.8], truth[1]),
        ("n2", "s1", 1, [0.2] * 6, truth[0]),
    ]
    result = made_result("2d", 0, rows)
    found = intervals([result], "slice")
    by_hand = -(6 * np.log(0.9) + 2 * np.log(0.8) + 4 * np.log(0.9) + 6 * np.log(0.8)) / 18
    assert found["log_loss"]["value"] == pytest.approx(by_hand)
    series = scored(result, "series")
    assert series.names.tolist() == ["s0", "s1"]
    assert series.patients.tolist() == [0, 1]
    np.testing.assert_array_equal(series.truth, [truth[1], truth[0]])
    np.testing.assert_allclose(series.values[0], [0.8, 0.1, 0.1, 0.1, 0.1, 0.8])
    # The rule the run chose, not always the highest.
    mean = scored(made_result("2d", 0, rows, rule="mean of the top 3"), "series")
    assert mean.values[0, 0] == pytest.approx(0.45)
    convention = under_convention(result)
    assert convention["accuracy"] == 1
    assert convention["loss"] == pytest.approx(by_hand)  # one batch of three
    constant = constant_under_convention(result)
    assert constant["accuracy"] == pytest.approx(2 / 3)
    # The prevalence here is 1/3 of two labels and 0 of four.
    assert constant["loss"] == pytest.approx(
        2 / 6 * -(np.log(1 / 3) + 2 * np.log(2 / 3)) / 3, abs=1e-6
    )


def test_seeds_are_averaged_and_shown_apart():
    seeds = (0, 1)
    good = [made_result("a", s, some_rows(s, 1.0)) for s in seeds]
    bad = [made_result("b", s, some_rows(s + 10, 0.2)) for s in seeds]
    found = compare(good, bad, "slice")
    assert found.num_samples == 80
    assert found.num_patients == 5  # the same five patients in both seeds
    for name in ("log_loss", "log_loss/any", "auroc/any"):
        each = [seed_metric(g, name) - seed_metric(b, name) for g, b in zip(good, bad, strict=True)]
        assert found.per_seed[name] == pytest.approx(each)
        assert found.mean[name]["value"] == pytest.approx(np.mean(each))
        # What stands beside the interval is what the interval is of.
        mean = np.mean([seed_metric(g, name) for g in good])
        assert intervals(good, "slice")[name]["value"] == pytest.approx(mean)
    assert found.mean["log_loss"]["high"] < 0


def seed_metric(result, name):
    part = scored(result, "slice")
    kind, _, label = name.partition("/")
    column = LABELS.index(label) if label else slice(None)
    truth, values = part.truth[:, column], part.values[:, column]
    if kind == "auroc":
        return sk.roc_auc_score(truth, values)
    clipped = np.clip(values, 1e-7, 1 - 1e-7)
    return -np.log(np.where(truth == 1, clipped, 1 - clipped)).mean()


def test_probabilities_of_one_seed_do_not_rank_those_of_another():
    rows = some_rows(0)
    lower = [(*row[:3], row[3] / 10, row[4]) for row in rows]  # the same ranking, other numbers
    results = [made_result("a", 0, rows), made_result("a", 1, lower)]
    alone = intervals(results[:1], "slice")["auroc/any"]
    assert intervals(results, "slice")["auroc/any"] == alone


def test_parts_of_series_have_no_series_level():
    result = made_result("2d-thesis", 0, some_rows(0))
    del result.info["metrics"]["series"]
    assert scored(result, "series") is None
    assert intervals([result], "series") is None
    assert compare([result], [result], "series") is None


def cells(lines, begin):
    """The cells of the first row of a table that begins so."""
    (row, *_) = (r for line in lines for r in line.splitlines() if r.startswith(f"| {begin} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_tables_put_each_number_into_its_column():
    from experiments.report.formatting import bounds
    from experiments.report.thesis_tables import loss_table, metrics_table

    sound, thesis = (
        made_result(key, 0, some_rows(seed))
        for seed, key in enumerate(("2d-stand-in", "2d-stand-in-thesis"))
    )
    results = {"2d-stand-in": [sound], "2d-stand-in-thesis": [thesis]}
    metric, published, convention, constant, ours, interval, prevalence, never, skill = cells(
        metrics_table(2, results), "loss"
    )
    assert (metric, published, never) == ("loss", "0.0823", "n/a")
    # Forty slices are two batches of the thesis, by name: n0, n1, n10, ...
    order = sorted(range(40), key=lambda i: f"n{i}")
    truth, values = thesis.predictions[list(TRUTH_COLUMNS)], thesis.predictions[list(LABELS)]
    truth, values = truth.to_numpy()[order], np.clip(values.to_numpy()[order], 1e-7, 1 - 1e-7)
    entropy = -np.log(np.where(truth == 1, values, 1 - values))
    assert convention == f"{(entropy[:32].mean() + entropy[32:].mean()) / 2:.4f}"
    assert ours == f"{seed_metric(sound, 'log_loss'):.4f}"
    assert interval == bounds(intervals([sound], "slice")["log_loss"])
    rates = scored(sound, "slice").truth.mean(axis=0)
    by_hand = -(rates * np.log(rates) + (1 - rates) * np.log(1 - rates)).mean()
    assert prevalence == f"{by_hand:.4f}"
    assert skill == f"{1 - seed_metric(sound, 'log_loss') / by_hand:.3f}"
    assert float(constant) == pytest.approx(by_hand, abs=0.03)  # in batches of other shares
    row = cells(metrics_table(2, results), "auroc of any")
    assert row[4] == f"{seed_metric(sound, 'auroc/any'):.4f}"
    assert row[6] == "counting voxels: 0.7000"

    row = cells(loss_table(results), RUNS["2d-stand-in"].title)
    assert row[1:6] == ["0 (too few)", "0.0927", "0.5000", "0.5000", ours]
    assert row[6:] == [interval, prevalence, skill]
    several = results | {"2d-stand-in": [sound, made_result("2d-stand-in", 1, some_rows(3))]}
    row = cells(loss_table(several), RUNS["2d-stand-in"].title)
    assert row[1:4] == ["0, 1 (too few)", "0.0927", "0.5000 (seed 0)"]
    # Of a rate that falls it is said that four epochs are under way.
    for schedule, is_falling in (("cosine", True), ("constant", False)):
        config = {"fit": {"schedule": schedule}, "data": {"view": "slice"}}
        falling = {"2d": [made_result("2d", 0, some_rows(0), config=config)]}
        assert ("under way" in " ".join(loss_table(falling))) == is_falling
    alone = {"2d-thesis": [made_result("2d-thesis", 0, some_rows(0))]}
    row = cells(loss_table(alone), RUNS["2d"].title)
    assert (row[1], *row[3:5]) == ("n/a", "0.5000 (seed 0)", "n/a: not run")


def test_every_intensity_has_a_name_in_the_tables():
    from experiments.report.thesis_tables import intensity_text
    from ich_keras.data.intensity import INTENSITIES

    for name in (*INTENSITIES, None):
        config = {"data": {"view": "slab", "intensity": name}}
        text = intensity_text([made_result("slab", 0, some_rows(0), config=config)])
        assert ("not recorded" in text) == (name is None)


def test_runs_are_shown_as_means_with_every_place_they_were_trained_on():
    from experiments.report.trainings import runs_section

    def trained(seed, device, precision, steps):
        info = {"patients": {"train": 10 + seed, "test": 5}, "steps": steps}
        info |= {"samples_seen": 8 * steps, "training_operations": 3e12, "seconds": 60.0}
        fit = {"epochs": 2, "learning_rate": 0.001 * (1 + seed), "batch_size": 32}
        config = {"precision": precision, "fit": fit, "data": {"view": "slice"}}
        info["machine"] = {"device": device, "cores": 2}
        return made_result("2d", seed, some_rows(seed), config=config, **info)

    mixed = [trained(0, "ARM", "float32", 100), trained(2, "H100", "bfloat16", 300)]
    row = cells(runs_section({"2d": mixed}), "`2d`")
    assert row[:4] == [
        "`2d`",
        RUNS["2d"].title,
        "0, 2",
        "ARM, float32, torch 2.0; H100, bfloat16, torch 2.0",
    ]
    assert row[4:8] == ["11", "5", "0.001, 32; 0.003, 32", "2 of 2, 2 of 2"]
    assert row[8:] == ["200", "1,600", "3.0", "60 (60 to 60)"]
    alone = cells(runs_section({"2d": mixed[:1]}), "`2d`")
    assert alone[2:4] == ["0", "ARM, float32, torch 2.0"]


def test_what_starts_from_a_network_that_has_not_learned_says_so():
    from experiments.report.thesis_tables import loss_table, metrics_table
    from experiments.report.trainings import runs_section

    info = {"patients": {"train": 10, "test": 5}, "steps": 1, "samples_seen": 1}
    info |= {"training_operations": 1e12, "seconds": 60.0}
    config = {
        "precision": "float32",
        "fit": {"epochs": 2, "learning_rate": 0.001, "batch_size": 32},
        "data": {"view": "slice", "balance": False},
    }

    def made(key, quality):
        rows = some_rows(0, quality)
        return [made_result(key, 0, rows, config=config, **info)]

    good = {"stand-in-2d-18": made("stand-in-2d-18", 1.0), "2d-stand-in": made("2d-stand-in", 1.0)}
    bad = good | {"stand-in-2d-18": made("stand-in-2d-18", 0.0)}
    said = "`2d-stand-in` starts from `stand-in-2d-18`, which does not rank above counting"
    for lines in (loss_table(bad), metrics_table(2, bad)):
        assert any(line.startswith(said) for line in lines)
        assert "(too few)" in "".join(lines)
    for lines in (
        loss_table(good),
        metrics_table(2, good),
        metrics_table(2, {"2d-stand-in": good["2d-stand-in"]}),
    ):
        assert not any(line.startswith(said) for line in lines)
    named = [line for line in runs_section(bad) if "Not above counting voxels" in line]
    assert ["`stand-in-2d-18` per slice (of seed 0)" in line for line in named] == [True]
    assert not any("Not above counting voxels" in line for line in runs_section(good))


def test_the_leak_is_shown_on_shared_slices():
    from experiments.report.comparisons import compare_runs, leak_section
    from experiments.report.confounders import over_seeds

    counts = {"patients": {"train": 30}, "slices": {"train": 200}}
    fewer = {"patients": {"train": 30}, "slices": {"train": 160}}
    fair = [made_result("2d", s, some_rows(s, count=40), **counts) for s in range(3)]
    leaky = [made_result("2d-leaky", s, some_rows(s + 5, 1.5)[:24], **fewer) for s in range(3)]
    results = {"2d": fair, "2d-leaky": leaky}
    lines = leak_section(results, compare_runs("leak", results))
    assert "They trained on 30 and 30 patients and 160 and 200 slices" in lines[0]
    row = cells(lines, "`2d-leaky` - `2d`")
    shared = [made_result("2d", s, some_rows(s, count=40)[:24]) for s in range(3)]
    each = [
        seed_metric(one, "log_loss") - seed_metric(other, "log_loss")
        for one, other in zip(leaky, shared, strict=True)
    ]
    assert row[2] == "log_loss"
    assert row[3] == f"{np.mean(each):.4f} ({', '.join(f'{value:.4f}' for value in each)})"
    assert row[5] == over_seeds(each)
    assert row[6:] == ["0, 1, 2", "72 / 3", "too few patients"]
    # Both alone, on the same slices.
    for group in (leaky, shared):
        values = [seed_metric(one, "log_loss") for one in group]
        row = cells(lines, f"`{group[0].key}`")
        assert row[2] == f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
        positive = [int((one.predictions["true_any"] == 1).sum()) for one in group]
        assert row[1] == "; ".join(f"24 ({number})" for number in positive)
    # Only of the seeds that are compared.
    more = made_result("2d", 3, some_rows(3), patients={"train": 90}, slices={"train": 999})
    results["2d"] = [*fair, more]
    assert leak_section(results, compare_runs("leak", results)) == lines
    assert compare_runs("leak", {"2d": fair}) == leak_section({"2d": fair}, []) == []


def test_smoothing_is_shown_as_a_control_of_slabs():
    from experiments.report.comparisons import smoothing_section
    from experiments.scores import CONTROL, smoothed

    results = {
        key: [made_result(key, s, some_rows(s + start)) for s in range(3)]
        for key, start in (("2d", 0), ("slab", 5))
    }
    lines = smoothing_section(results)
    assert CONTROL in lines[0]
    after = {key: smoothed(group) for key, group in results.items()}
    for name, one, other in (
        ("`2d, smoothed` - `2d`", after["2d"], results["2d"]),
        ("`slab` - `2d, smoothed`", results["slab"], after["2d"]),
        ("`slab, smoothed` - `2d, smoothed`", after["slab"], after["2d"]),
    ):
        each = []
        for pair in zip(one, other, strict=True):
            tables = [result.predictions for result in pair]
            found = [
                binary_metrics(
                    table[list(TRUTH_COLUMNS)].to_numpy(), table[list(LABELS)].to_numpy()
                )
                for table in tables
            ]
            each.append(found[0]["log_loss"] - found[1]["log_loss"])
        assert cells(lines, name)[3].startswith(f"{np.mean(each):.4f} (")
    # Neighbours are of the same series: three of its four slices by hand.
    logits = {
        name: np.log(p / (1 - p))
        for name, p in (
            (name, np.clip(table[0].predictions["any"].to_numpy()[:4], 1e-7, 1 - 1e-7))
            for name, table in (("before", results["2d"]), ("after", after["2d"]))
        )
    }
    before = logits["before"]
    expected = [(0.6 * before[0] + 0.2 * before[1]) / 0.8]
    expected.append(0.2 * before[0] + 0.6 * before[1] + 0.2 * before[2])
    expected.append((0.6 * before[3] + 0.2 * before[2]) / 0.8)
    np.testing.assert_allclose(logits["after"][[0, 1, 3]], expected, rtol=1e-6)
    assert smoothing_section({"2d": results["2d"]}) == []


def test_results_are_kept_without_smoothing():
    from experiments.trained import unsmoothed

    (result,) = [made_result("2d", 0, some_rows(0), rule="mean of the top 3")]
    raw = result.predictions.rename(columns={"series": "series_instance_uid"})
    metrics = result.info["metrics"]
    assert unsmoothed(raw, metrics) == (raw, metrics)
    columns = {f"unsmoothed_{label}": raw[label] for label in LABELS}
    run = raw.assign(**columns, **dict.fromkeys(LABELS, 0.5))
    worse = {
        level: binary_metrics(np.eye(6, dtype=int), np.full((6, 6), 0.5))
        | {"aggregation": {"rule": "mean of the top 3"}}
        for level in metrics
    }
    table, found = unsmoothed(run, worse)
    pd.testing.assert_frame_equal(table[list(LABELS)], raw[list(LABELS)])
    assert not set(table) & set(columns)
    for level, part in metrics.items():
        assert found[level]["log_loss"] == part["log_loss"]
        assert found[level]["auroc"] == part["auroc"]
        probabilities = worse[level]["baseline"]["prevalence"]["probabilities"]
        assert found[level]["baseline"]["prevalence"]["probabilities"] == probabilities


def test_the_report_begins_with_every_comparison_in_one_line():
    from experiments.report.comparisons import compare_runs
    from experiments.report.summary import summary_section

    results = {
        "slab": [made_result("slab", s, some_rows(s, 1.5)) for s in range(3)],
        "2d": [made_result("2d", s, some_rows(s, 0.0 if s == 1 else 0.8)) for s in range(3)],
        "slab-9": [made_result("slab-9", s, some_rows(s)) for s in range(3)],
    }
    compared = {name: compare_runs(name, results) for name in QUESTIONS}
    assert len(compared["stride-9"]) == 2  # per slice and per series
    lines = summary_section(compared, results)
    # Of questions that `all` asks.
    assert not any("slab-9" in line for line in lines)
    table = next(line for line in lines if line.startswith("| question"))
    row = [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")]
    each = [
        seed_metric(one, "auroc/any") - seed_metric(other, "auroc/any")
        for one, other in zip(results["slab"], results["2d"], strict=True)
    ]
    assert row[:4] == ["views", "`slab` - `2d`", "slice", "auroc/any"]
    assert row[4] == f"{np.mean(each):.4f} ({', '.join(f'{value:.4f}' for value in each)})"
    assert row[7] == "0, 1, 2"
    assert row[8] == "too few patients; not above counting voxels: `2d` (seed 1)"
    assert summary_section({name: [] for name in QUESTIONS}, results) == []


def test_early_epochs_are_named():
    from experiments.report.confounders import early, early_notes, kept_epoch

    def trained(seed, losses, rankings):
        table = {"epoch": range(1, len(losses) + 1)}
        table |= {"valid_log_loss": losses, "valid_auroc_any": rankings}
        return made_result("2d", seed, some_rows(seed), history=table)

    group = [
        trained(0, [0.5, 0.4, 0.6, 0.7], [0.5, 0.6, 0.7, 0.9]),
        trained(1, [0.5, 0.4, 0.3, 0.7], [0.5, 0.6, 0.7, 0.8]),
        trained(2, [0.3, 0.4, 0.5, 0.7], [0.5, 0.6, 0.7, 0.8]),
    ]
    assert [kept_epoch(result) for result in group] == [2, 3, 1]
    assert early(group) == [0, 2]
    (line, _) = early_notes(("2d",), {"2d": group})
    assert "`2d` (epochs 2 of 4, 1 of 4; 0.550 and 0.850)" in line
    assert early_notes(("2d",), {"2d": group[1:2]}) == []
    undefined = [trained(0, [0.3, 0.4], [np.nan, np.nan])]
    assert "(epochs 1 of 2; n/a and n/a)" in early_notes(("2d",), {"2d": undefined})[0]


def test_trainings_in_other_places_are_named():
    from experiments.report.confounders import unlike_places

    config = {"precision": "float32", "fit": {"epochs": 2}, "data": {"view": "slice"}}
    ones = [made_result("2d", s, some_rows(s), config=config) for s in range(3)]
    machine = {"machine": {"device": "H100"}}
    version = {"environment": {"backend": "torch", "versions": {"torch": "2.1"}}}
    others = [
        made_result("slab", s, some_rows(s), config=config, **changes)
        for s, changes in enumerate((machine, {}, version))
    ]
    results = {"2d": ones, "slab": others}
    from experiments.report.confounders import confounders

    found = confounders("slab", "2d", "slice", (0, 1, 2), results)
    assert "other device, precision or version (seed 0, 2)" in found
    (line, _) = unlike_places([("slab", "2d", (0, 1, 2))] * 2, results)
    assert line.endswith("part of the difference: `slab` - `2d` (seed 0, 2).")
    assert unlike_places([("slab", "2d", (1,))], results) == []


def test_a_result_older_than_its_source_is_named():
    from experiments.report.confounders import source_notes

    source = [made_result("stand-in-2d-18", 0, some_rows(0))]
    made = [
        made_result("2d-stand-in", seed, some_rows(seed), date=f"2026-01-0{1 + seed}")
        for seed in range(3)
    ]
    (line, _) = source_notes(("2d-stand-in",), {"2d-stand-in": made, "stand-in-2d-18": source})
    assert line.startswith("`2d-stand-in` of seed 0 is older than the stored result")
    # The same day: newer results have the time.
    made, source = (
        [made_result(key, 0, some_rows(0), environment={"started": f"2026-01-02T{hour}:00:00"})]
        for key, hour in (("2d-stand-in", "03"), ("stand-in-2d-18", "04"))
    )
    for group, date in ((made, "2026-01-02"), (source, "2026-01-02")):
        group[0].info["date"] = date
    (line, _) = source_notes(("2d-stand-in",), {"2d-stand-in": made, "stand-in-2d-18": source})
    assert line.startswith("`2d-stand-in` of seed 0 is older than the stored result")
    assert source_notes(("2d-stand-in",), {"2d-stand-in": source, "stand-in-2d-18": made}) == []


def test_words_follow_the_numbers():
    from experiments.report.confounders import over_seeds, verdict
    from experiments.report.formatting import bounds, each, spread
    from experiments.report.thesis_tables import loss_after

    above = [0.19, 0.2, 0.21]
    below = [-value for value in above]
    assert verdict({"low": 0.1, "high": 0.3}, 100, above) == "above 0"
    assert verdict({"low": -0.3, "high": -0.1}, 100, below) == "below 0"
    assert verdict({"low": -0.1, "high": 0.1}, 100, above) == "includes 0"
    assert verdict({"low": None, "high": None}, 100, above) == "not defined often enough"
    assert verdict({"low": 0.1, "high": 0.3}, 10, above) == "too few patients"
    assert verdict({"low": 0.1, "high": 0.3}, 100, above[:2]) == "too few seeds"
    disagreeing = verdict({"low": -0.3, "high": -0.1}, 100, [-0.9, 0.1, -0.2])
    assert disagreeing == "below 0; the seeds disagree"
    # A difference of exactly 0, of two that rank all rightly, has no sign.
    assert verdict({"low": 0.01, "high": 0.04}, 100, [0.0, 0.02, 0.03]).startswith(
        "above 0; interval over seeds"
    )
    apart = verdict({"low": 0.1, "high": 0.3}, 100, [0.01, 0.2, 0.4])
    assert apart == "above 0; interval over seeds includes 0"
    for low, high in ((-0.001, 0.1), (0.001, 0.1), (-0.1, 0.001)):
        assert verdict({"low": low, "high": high}, 100, above) == "ends at about 0"
    # Mean 2, standard deviation 1: 4.3027 / sqrt(3) either way.
    assert over_seeds([1.0, 2.0, 3.0], 3) == "-0.484 to 4.484"
    assert over_seeds([1.0, 2.0]) == "n/a"
    assert spread([]) == bounds(None) == "n/a"
    assert spread([0.5]) == "0.5000"
    assert spread([0.25, 0.75], 2) == "0.50 (0.25 to 0.75)"
    assert each([0.75, None, 0.25], 2) == "0.50 (0.75, n/a, 0.25)"
    assert (each([0.5]), each([None])) == ("0.5000", "n/a")
    assert loss_after(made_result("2d", 0, some_rows(0)), 1) == 0.6
    assert loss_after(made_result("2d", 0, some_rows(0)), 4) == 0.5


def test_the_report_needs_nothing_but_the_results(place, monkeypatch, tmp_path):
    from experiments.report.page import write_report
    from ich_keras.models.weights_lookup import FOLDER_VARIABLE

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "no-weights"))

    reproduce(place, ["2d", "2d-half"], (0, 1), train_run=FakeTraining())
    alone = place.out.parent / "elsewhere"
    shutil.move(place.out, alone)
    shutil.rmtree(place.work)
    text = write_report(alone).read_text()
    assert "phantoms (synthetic): says nothing about patients" in text
    assert (
        "n/a: weights not fetched (`weights-convert convert --source torchvision_resnet18" in text
    )
    assert "| `2d` - `2d-half` | slice |" in text
    assert "Not run: `slab`, `series`, `2d-eighth`, `2d-quarter`, `slab-eighth`," in text
    # A scale that has no quarters and eighths does not lack them.
    monkeypatch.setitem(SCALES, FAKE.name, FAKE)
    of_scale = write_report(alone).read_text()
    assert "Not run: `slab`, `series`, `slab-half`, `series-half`." in of_scale
    # Nor may its results have been declared otherwise.
    with monkeypatch.context() as patched:
        patched.setitem(RUNS, "2d", replace(RUNS["2d"], augment="thesis"))
        with pytest.raises(StaleError, match="with other settings"):
            write_report(alone)
    monkeypatch.delitem(SCALES, FAKE.name)
    for name in ("learning-curves", "reliability", "roc-pr", "labels"):
        path = alone / "figures" / f"{name}.svg"
        assert path.stat().st_size < 150_000

    assert write_report(alone).read_text() == text
    with pytest.raises(StaleError, match="no finished run"):
        write_report(alone.parent / "nothing")


def test_a_report_is_made_of_whole_results_only(place, monkeypatch):
    from experiments.__main__ import main
    from experiments.report.page import write_report

    reproduce(place, ["2d"], (0, 1), train_run=FakeTraining())
    folder = place.result_dir("2d", 0)
    kept = {path: path.read_bytes() for path in folder.iterdir()}

    def refused(message):
        with pytest.raises(StaleError, match=message):
            write_report(place.out)
        for path, content in kept.items():
            path.write_bytes(content)

    def changed(info, path, value):
        *names, last = path.split(".")
        inner = info
        for name in names:
            inner = inner[name]
        inner[last] = value
        write_json(folder / RESULT, info)

    for path, value in (
        ("environment", {}),
        ("environment.versions", "x"),
        ("config", None),
        ("machine", {"device": "ARM"}),
        ("seconds", "1"),
    ):
        changed(read_json(folder / RESULT), path, value)
        refused("2d-s0/result.json is missing or damaged")
    for path, value in (
        ("metrics.slice.log_loss", 0.001),
        ("metrics.slice.auroc.any", 0.999),
        ("metrics.series.n.samples", 1),
    ):
        changed(read_json(folder / RESULT), path, value)
        refused("metrics of 2d seed 0 per (slice|series) do not follow from its predictions")
    changed(read_json(folder / RESULT), "scale", "another")
    refused("of the scales another and fake")

    def rewritten(name, change):
        path = folder / name
        table = pd.read_csv(path)
        change(table).to_csv(path, index=False)
        info = read_json(folder / RESULT)
        info["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_json(folder / RESULT, info)

    for name, change in (
        ("history.csv", lambda t: t.drop(columns="valid_log_loss")),
        ("history.csv", lambda t: t[:0]),
        ("history.csv", lambda t: t.assign(valid_log_loss=np.nan)),
        ("history.csv", lambda t: t.assign(valid_log_loss=["x", "0.4"])),
        ("history.csv", lambda t: t.assign(valid_auroc_any="x")),
        ("predictions.csv.gz", lambda t: t.drop(columns="patient")),
        ("predictions.csv.gz", lambda t: t.assign(any="")),
        ("predictions.csv.gz", lambda t: pd.concat([t, t])),
    ):
        rewritten(name, change)
        refused(f"{name} is missing or damaged")
    rewritten("predictions.csv.gz", lambda t: t[: len(t) // 2])
    refused("do not follow from its predictions")
    write_report(place.out)

    for words, code, said in (
        (["--tiny", "--small"], 2, "several scales"),
        (["--tiny"], 6, "has results of the scale fake, not tiny"),
    ):
        result = CliRunner().invoke(main, ["report", *words, "--out", str(place.out)])
        assert result.exit_code == code
        assert said in result.output


def test_results_of_different_data_are_not_mixed(place):
    reproduce(place, ["2d"], (0, 1), train_run=FakeTraining())
    path = place.result_dir("2d", 1) / RESULT
    write_json(path, read_json(path) | {"cache": "another"})
    with pytest.raises(StaleError, match="2 different caches"):
        load_results(place.out)


def test_an_absent_gpu_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    from experiments.__main__ import main

    monkeypatch.setattr("ich_keras.environment.why_no_cuda", lambda backend: "none here")
    words = ["question", "leak", "--tiny", "--device", "cuda", "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 4
    assert "--device cuda: none here" in result.output
    assert not (tmp_path / "work").exists()


def test_commands_explain_themselves_and_refuse_nonsense():
    from experiments.__main__ import main

    for command in ("all", "table", "question", "list", "report"):
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
    for words, said in (
        (["all"], "no scale"),
        (["all", "--tiny", "--small"], "several scales"),
        (["all", "--labels", __file__], "--dicom and --labels belong together"),
        (["all", "--tiny", "--device", "gpu"], "'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["question", "which", "--tiny"], "expected one of leak"),
        *(
            (["all", "--tiny", "--seeds", seeds], "different whole numbers")
            for seeds in ("0,0", "0,00", ",", "-1", "1.5", str(2**32))
        ),
        (["sheet", "--out", "sheet.xyz"], "expected one that ends in .png"),
        (["table", "5", "--tiny"], "5"),
    ):
        found = CliRunner().invoke(main, words)
        assert found.exit_code == 2
        assert said in found.output


@pytest.mark.slow
def test_the_whole_road_on_the_smallest_scale(tmp_path):
    from experiments.report.page import write_report

    scale = replace(
        FAKE,
        size=32,
        num_series=16,
        other_series=12,
        matrix=64,
        slice_spacing_mm=(12.0, 16.0),
        seeds=(0,),
        fittings={view: Fitting(2, 1, 1e-3) for view in ("slice", "slab", "series")},
    )
    place = Place(tmp_path / "work", tmp_path / "out", scale, device="cpu")
    keys = ["stand-in-2d-18", "2d", "2d-stand-in-thesis", "series"]
    assert reproduce(place, keys, (0,)) == 4
    results = load_results(place.out)
    assert set(results) == set(keys)
    assert results["2d-stand-in-thesis"][0].augmented is not None
    assert results["2d-stand-in-thesis"][0].info["weights"]["record"]["network"]
    info = results["2d"][0].info
    assert info["synthetic"]
    assert info["training_operations"] > 0
    assert not (place.run_dir("2d", 0) / "model.keras").exists()
    split = Split.load(place.work / FOLDER / "patient-s0.json")
    assert len(results["series"][0].predictions) == len(split.members["test"])
    text = write_report(place.out).read_text()
    assert "`series` - `2d`" in text


def test_the_sheet_shows_both_windows():
    hu = np.full((90, 90), 40, np.int16)
    hu[:45] = 2000
    sheet = contact_sheet([("one", [hu]), ("two", [hu, hu])])
    tile, header = 180, 22
    assert sheet.shape == (2 * (header + 2 * tile), 2 * tile)
    brain = sheet[header : header + tile, :tile]
    bone = sheet[header + tile : header + 2 * tile, :tile]
    # By hand: 40 is the middle of 0..80; of -800..2000 it is 0.3; 2000 is the upper end of both.
    assert (brain[5, 5], brain[-5, 5], bone[5, 5], bone[-5, 5]) == (255, 128, 255, 76)
    assert not sheet[header : header + 2 * tile, tile:].any()


def test_the_sheet_of_a_folder(phantom_folder, tmp_path):
    from experiments.__main__ import main

    out = tmp_path / "sheet.png"
    done = CliRunner().invoke(
        main, ["sheet", str(phantom_folder / "images"), "--columns", "2", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    before = out.read_bytes()
    again = CliRunner().invoke(main, ["sheet", str(phantom_folder / "images"), "--out", str(out)])
    assert again.exit_code == 2
    assert f"{out} already exists; nothing is overwritten" in again.output
    assert out.read_bytes() == before


def test_the_committed_results_are_those_of_their_declarations():
    """An option that comes later must not turn them stale: the report could not be made again."""
    found = load_results(Path(reproducing.__file__).parent / "results" / "small")
    assert sum(map(len, found.values())) == len(list(RESULTS_OF_SMALL.glob(f"*/{RESULT}")))
    assert len(found["2d"]) == 3


RESULTS_OF_SMALL = Path(reproducing.__file__).parent / "results" / "small" / "runs"
