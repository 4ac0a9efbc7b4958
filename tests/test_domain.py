"""The out-of-domain score: its numbers, what it flags, and files of it that are refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
from narrow import preset_of
from scipy.stats import t
from sklearn.covariance import LedoitWolf
from untrained_runs import untrained_run

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.cache.cache import CTCache
from ich_keras.domain import Domain, fit_domain
from ich_keras.errors import StaleError
from ich_keras.external import evaluate_external
from ich_keras.external_summary import external_summary
from ich_keras.inference import load_run, network_digest, tapped
from ich_keras.models.resnet import feature_model
from ich_keras.models.spec import ModelSpec
from ich_keras.phantom.dicom import write_phantoms
from ich_keras.prediction import predict_folder
from ich_keras.prediction_journal import PredictionJournal
from ich_keras.run_checksums import update_checksums
from ich_keras.run_folder import RunFolder
from ich_keras.training import train
from ich_keras.workflow import make_cache, prepare_index

SIZE = 32


def fitted(random, per_series=6, series=30, patients=120, width=5):
    """A domain of made-up features, with what it was made of."""
    owners = np.repeat(np.arange(series), per_series)
    training = random.normal(size=(len(owners), width)) @ random.normal(size=(width, width))
    training += random.normal(size=(series, width))[owners]
    whose = np.repeat(np.arange(patients), 2)  # two series each
    valid = [random.normal(1, 1, (1 + n % 7, width)) for n in range(len(whose))]

    def validation(distances):
        found = [distances(one) for one in valid]
        return np.array([x.mean() for x in found]), np.array([len(x) for x in found]), whose

    return fit_domain(training, owners, "n", validation), training, owners, valid, whose


def expected_scores(training, owners, new):
    """The scores by scikit-learn and plain sums."""
    covariance = LedoitWolf().fit(training)
    distances = np.sqrt(covariance.mahalanobis(training))
    each = [distances[owners == n] for n in np.unique(owners)]
    means = np.array([x.mean() for x in each])
    within = sum(((x - x.mean()) ** 2).sum() for x in each) / (len(owners) - len(each))
    between = means.var(ddof=1) - within * np.mean([1 / len(x) for x in each])
    between = max(between, 0.1 * means.var(ddof=1))
    return np.array(
        [
            (np.sqrt(covariance.mahalanobis(x)).mean() - means.mean())
            / np.sqrt(between + within / len(x))
            for x in new
        ]
    )


def test_scores_are_those_of_scikit_learn():
    domain, training, owners, valid, _ = fitted(np.random.default_rng(0))
    expected = expected_scores(training, owners, valid)
    np.testing.assert_allclose(domain.scores, np.sort(expected), rtol=1e-4, atol=1e-4)
    found = [domain.distance(one) for one in valid]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert all(float(np.float32(one)) == one for one in found)  # JSON brings it back


def test_p_values_count_each_patient_once():
    domain, training, owners, valid, whose = fitted(np.random.default_rng(1))
    scores = expected_scores(training, owners, valid)
    for limit in (-10, np.median(scores) + 1e-3, 1e6):
        share = sum((scores[whose == n] >= limit).mean() for n in range(120))
        assert domain.p_value(limit) == pytest.approx((1 + share) / 121, abs=1e-6)
    assert domain.has_rate and domain.verdict(None) == ""
    # 1 / 121 is below .01; with one series of a patient above it, 1.5 / 121 is not.
    assert domain.verdict(float(domain.scores[-1]) + 1) == "outside"
    assert domain.verdict(float(domain.scores[-1])) == "inside"


def test_few_patients_take_student_s_interval():
    domain, *_ = fitted(np.random.default_rng(2), patients=7)
    assert not domain.has_rate
    scores = domain.scores.astype(float)
    mean = scores.mean()  # two series each: the weights are equal
    deviation = max(1, np.sqrt(((scores - mean) ** 2).sum() / 2 / 6))
    limit = mean + t.ppf(0.99, 6) * deviation * np.sqrt(8 / 7)
    assert domain.student_limit() == pytest.approx(limit, rel=1e-6)
    assert [domain.verdict(limit + x) for x in (-1e-3, 1e-3)] == ["inside", "outside"]


def test_a_rate_is_kept_where_series_are_alike():
    """Of series drawn like those of validation, about 1 % are outside."""
    domain, *_ = fitted(np.random.default_rng(3), patients=2000)
    random = np.random.default_rng(4)
    found = [
        domain.verdict(domain.distance(random.normal(1, 1, (1 + n % 7, 5)))) for n in range(4000)
    ]
    assert 0.004 < np.mean(np.array(found) == "outside") < 0.018


@pytest.mark.parametrize("what", ["one series", "one patient", "equal", "infinite"])
def test_without_spread_there_is_no_domain(what):
    training = np.random.default_rng(0).normal(size=(12, 4))
    owners = np.zeros(12, int) if what == "one series" else np.arange(12) // 3
    if what in ("equal", "infinite"):
        training[:] = np.inf if what == "infinite" else 1.0
    whose = np.zeros(3, int) if what == "one patient" else np.arange(3)
    found = fit_domain(
        training, owners, "n", lambda distances: (distances(training[:3]), np.ones(3), whose)
    )
    assert found is None


def test_what_overflows_is_far():
    domain, *_ = fitted(np.random.default_rng(0))
    for value in (np.inf, np.nan, 1e200):
        found = domain.distance(np.full((2, 5), value))
        assert np.isfinite(found) and domain.verdict(found) == "outside"


# --- A network that was trained on phantoms ---------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A narrow network on slices, trained on 100 phantoms of 48 pixels."""
    folder = tmp_path_factory.mktemp("domain")
    write_phantoms(folder / "data", 100, seed=1, matrix=48)
    index = prepare_index(folder / "data" / "images", folder / "data" / "stage_2_train.csv")
    make_cache(index, folder / "cache", size=SIZE)
    with preset_of("tiny", ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        config = RunConfig(
            preset="tiny",
            device="cpu",
            precision="float32",
            data=DataConfig(size=SIZE),
            fit=FitConfig(batch_size=32, epochs=3, learning_rate=1e-3),
        )
        return train(config, CTCache.open(folder / "cache"), folder / "run")


@pytest.fixture(scope="module")
def new_phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "data"
    return write_phantoms(folder, 30, seed=99, matrix=48)


def test_new_phantoms_are_inside(trained, new_phantoms, tmp_path):
    found = predict_folder(trained, new_phantoms / "images", tmp_path / "out", device="cpu")
    assert (found.series["domain"] == "outside").sum() <= 1
    assert set(found.series["domain"]) <= {"inside", "outside"}
    table = pd.read_csv(tmp_path / "out" / "series.csv")
    assert table["domain"].tolist() == found.series["domain"].tolist()
    distances = table["domain_distance"].to_numpy(np.float32)
    np.testing.assert_array_equal(distances, found.series["domain_distance"])
    # The probabilities are those of the network without the second output.
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "domain.npz").unlink()
    record = json.loads((copy / "checksums.json").read_text())
    del record["files"]["domain.npz"]
    (copy / "checksums.json").write_text(json.dumps(record))
    older = predict_folder(copy, new_phantoms / "images", device="cpu")
    assert (older.series["domain"] == "").all() and older.series["domain_distance"].isna().all()
    assert older.notice.splitlines()[-1].endswith("the run has no domain.npz.")
    pd.testing.assert_frame_equal(older.slices, found.slices)


def test_a_real_head_is_outside(trained, real_ge_series, tmp_path):
    found = predict_folder(trained, real_ge_series, tmp_path / "out", device="cpu")
    assert found.series["domain"].tolist() == ["outside"]
    last = (tmp_path / "out" / "notice.txt").read_text().splitlines()[-1]
    assert last.startswith("Domain: 1 of 1 series outside, unlike those of the training")
    assert "decisions and groups promise nothing" in last


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_noise_is_outside(trained, new_phantoms, tmp_path):
    """Slices whose pixels are shuffled: the same values, and no head."""
    random = np.random.default_rng(0)
    files = sorted((new_phantoms / "images").rglob("*.dcm"))
    uid = pydicom.dcmread(files[0]).SeriesInstanceUID
    for number, file in enumerate(files):
        header = pydicom.dcmread(file)
        if header.SeriesInstanceUID == uid:
            pixels = header.pixel_array.copy().ravel()
            header.PixelData = random.permutation(pixels).tobytes()
            header.save_as(tmp_path / f"{number}.dcm")
    found = predict_folder(trained, tmp_path, device="cpu")
    assert found.series["domain"].tolist() == ["outside"]


def test_external_data_say_how_much_is_outside(trained, new_phantoms, tmp_path):
    index = prepare_index(new_phantoms / "images", new_phantoms / "stage_2_train.csv")
    make_cache(index, tmp_path / "cache", size=SIZE)
    result = evaluate_external(trained, CTCache.open(tmp_path / "cache"), tmp_path / "out", "cpu")
    outside = int((result.series["domain"] == "outside").sum())
    share = outside / len(result.series)
    expected = {"series": len(result.series), "outside": outside, "share": share}
    assert result.metrics["domain"] == expected
    text = " ".join(external_summary(result.metrics, 100).split())
    assert f"{outside} of {len(result.series)} series ({100 * share:.1f} %)" in text
    predicted = predict_folder(trained, new_phantoms / "images", device="cpu").series
    predicted = predicted.set_index("series_instance_uid").loc[result.series["series_uid"]]
    # Other batches: the last digits differ.
    np.testing.assert_allclose(
        result.series["domain_distance"], predicted["domain_distance"], rtol=1e-3, atol=1e-3
    )


def test_a_resumed_prediction_has_the_same_distances(trained, new_phantoms, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    predict_folder(trained, new_phantoms / "images", whole, device="cpu")
    add, calls = PredictionJournal.add, []

    def add_two(journal, results):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(results)
        add(journal, results)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PredictionJournal, "add", add_two)
        predict_folder(trained, new_phantoms / "images", parts, device="cpu")
    told = []
    predict_folder(trained, new_phantoms / "images", parts, device="cpu", tell=told.append)
    assert told and told[0].startswith("Resuming after ")
    for name in ("series.csv", "predictions.csv", "notice.txt"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


# --- Slabs, series, bfloat16 -------------------------------------------------------------------

VIEWS = {
    "slab": {"view": "slab", "slices": 3},
    "series": {"view": "series", "slices": 9},
}


@pytest.mark.parametrize("kind", VIEWS)
def test_slabs_and_series_are_scored_by_their_own_features(
    kind, phantom_folder, phantom_cache, tmp_path
):
    spec = ModelSpec((VIEWS[kind]["slices"], 16, 16, 1), depth=10, width=8, strides=(1, 1, 1, 1))
    run = RunFolder(untrained_run(tmp_path / "run", "tiny", spec, 48, **VIEWS[kind]))
    recipe, model = load_run(run, "cpu")
    samples = phantom_cache.samples(recipe.inputs.view)
    from ich_keras.data.batches import view_batches

    taps = feature_model(model, ("avgpool",))
    batches = view_batches(
        phantom_cache, recipe.inputs.view, None, 16, recipe.inputs.size, samples=samples
    )
    features = np.concatenate([taps.predict_on_batch(x)["avgpool"] for x, _ in batches])
    uids = (phantom_cache.series if kind == "series" else phantom_cache.slices)["series_uid"]
    owners, names = pd.factorize(uids)
    domain = fit_domain(
        features,
        owners,
        network_digest(model),
        lambda distances: (
            np.bincount(owners, distances(features)) / np.bincount(owners),
            np.bincount(owners),
            names,
        ),
    )
    domain.save(run.domain_file)
    found = predict_folder(run, phantom_folder / "images", device="cpu").series
    expected = {uid: domain.distance(features[owners == n]) for n, uid in enumerate(names)}
    np.testing.assert_allclose(
        found["domain_distance"],
        [expected[uid] for uid in found["series_instance_uid"]],
        rtol=1e-3,
        atol=1e-3,
    )
    np.testing.assert_allclose(np.sort(found["domain_distance"]), domain.scores, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_second_output_changes_no_answer(trained, precision):
    _, model = load_run(trained, "cpu", precision)
    inputs = np.random.default_rng(0).normal(size=(4, SIZE, SIZE, 3)).astype(np.float32)
    answer, features = tapped(model).answer(inputs)
    np.testing.assert_array_equal(answer, np.asarray(model.predict_on_batch(inputs)))
    assert features.dtype == np.float32 and features.shape == (4, 64)
    kernel, bias = (np.asarray(w) for w in model.get_layer("fc").get_weights())
    logits = features @ kernel + bias
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), answer, rtol=1e-4, atol=1e-5)


# --- Files that are refused --------------------------------------------------------------------


@pytest.fixture
def copy(trained, tmp_path):
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


def load(run):
    return Domain.load(run, network_digest(load_run(run, "cpu")[1]))


def rewrite(run, **changes):
    """Write the file with other arrays, and record it as the run's own."""
    with np.load(run.domain_file) as content:
        arrays = {name: content[name] for name in content.files} | changes
    np.savez(run.domain_file, **{k: v for k, v in arrays.items() if v is not None})
    update_checksums(run, [run.domain_file.name])


def test_a_changed_or_lost_file_is_refused(copy):
    assert load(copy).num_patients >= 2
    content = copy.domain_file.read_bytes()
    copy.domain_file.write_bytes(content[:-1] + b"x")
    with pytest.raises(StaleError, match="domain.npz was changed after the training"):
        predict_folder(copy, copy.path, device="cpu")
    copy.domain_file.unlink()
    with pytest.raises(StaleError, match="domain.npz was changed after the training"):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged", "half", "bits"])
def test_a_damaged_file_is_refused(copy, content):
    whole = bytearray(copy.domain_file.read_bytes())
    if content == "bits":
        whole[len(whole) // 2] ^= 255
    copy.domain_file.write_bytes(
        content if isinstance(content, bytes) else whole[: len(whole) // (1 + (content == "half"))]
    )
    update_checksums(copy, ["domain.npz"])
    with pytest.raises(StaleError, match="domain.npz (cannot be read|is damaged)"):
        load(copy)


FLOATS = np.float32
BAD = {
    "cannot be read": {"scores": None},
    "mean does not hold finite float32": {"mean": np.full(64, np.nan, FLOATS)},
    "spread does not hold finite float32": {"spread": np.ones(3)},
    "do not belong together": {"mean": np.zeros(63, FLOATS)},
    "not the lower factor": {"cholesky": np.ones((64, 64), FLOATS)},
    "not a mean and two variances": {"spread": np.array([1, 0, 1], FLOATS)},
    "not ascending": {"scores": np.array([2, 1], FLOATS), "patients": np.array([0, 1], np.int32)},
    "at least two": {"scores": np.array([1], FLOATS), "patients": np.zeros(1, np.int32)},
    "not numbered": {"scores": np.array([1, 2], FLOATS), "patients": np.array([0, 9], np.int32)},
    "which network": {"network": np.array(3)},
    "of another network": {"network": np.array("0" * 64)},
}


@pytest.mark.parametrize("message", BAD)
def test_arrays_that_make_no_domain_are_refused(copy, message):
    rewrite(copy, **BAD[message])
    with pytest.raises(StaleError, match=message):
        load(copy)
    rewrite(copy)


def test_arrays_of_objects_are_never_unpickled(copy):
    rewrite(copy, scores=np.array([{}], object))
    with pytest.raises(StaleError, match="cannot be read"):
        load(copy)


def test_an_unfinished_run_has_no_domain(copy):
    digest = network_digest(load_run(copy, "cpu")[1])
    copy.report_file.unlink()
    assert Domain.load(copy, digest) is None
    copy.forget_evaluations()
    assert not copy.domain_file.exists()
