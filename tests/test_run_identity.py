"""Which data, states and weights a run is made of: others are refused by name, the same go on."""

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from interrupted import interrupted_training
from narrow import preset_of
from older_files import cache_of_schema_1, state_without_checksums, weights_without_checksums

from ich_keras import checkpoints, files, training
from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.ct.series import SeriesIndex
from ich_keras.data.cache.cache import CTCache
from ich_keras.data.labels import join_labels
from ich_keras.data.pixels import NO_HASHES, OTHER_READING, notices_of
from ich_keras.data.rsna_labels import read_rsna_labels
from ich_keras.errors import DataError, LostState, StaleError
from ich_keras.evaluation import evaluate
from ich_keras.inference import load_run
from ich_keras.models.classifier import classifier
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import save_weights
from ich_keras.models.weights_file import read_record, read_weights
from ich_keras.planning import plan_training
from ich_keras.prediction import predict_folder
from ich_keras.report import report_text
from ich_keras.run_folder import RunFolder
from ich_keras.summary import run_summary
from ich_keras.training import resume, train
from ich_keras.verification import verify
from ich_keras.workflow import make_cache, prepare_index

NARROW = "narrow-identity"
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of(NARROW, ModelSpec(input_shape=(SIZE, SIZE, 3), width=8)):
        yield


def config_of(epochs: int = 3, **changes) -> RunConfig:
    data = DataConfig(size=SIZE, balance=True, augment="none")
    fit = FitConfig(batch_size=16, epochs=epochs, learning_rate=1e-3)
    return RunConfig(preset=NARROW, data=data, fit=fit, precision="float32", **changes)


@pytest.fixture(scope="module")
def dicom(phantom_folder, tmp_path_factory) -> Path:
    """The phantoms, to be changed: the files of a copy, and its labels."""
    folder = tmp_path_factory.mktemp("dicom") / "data"
    shutil.copytree(phantom_folder, folder)
    return folder


def index_of(dicom: Path) -> SeriesIndex:
    return prepare_index(dicom / "images", dicom / "stage_2_train.csv")


@pytest.fixture(scope="module")
def cache(dicom, tmp_path_factory) -> CTCache:
    return make_cache(index_of(dicom), tmp_path_factory.mktemp("cache") / "cache", SIZE)


def changed_cache(dicom: Path, out: Path, uids: set[str]) -> CTCache:
    """Cache a copy of the phantoms in which some slices have one pixel that differs, by 64."""
    copy = out.with_name(f"{out.name}-dicom")
    shutil.copytree(dicom, copy)
    slices = index_of(copy).slices
    for path in slices.loc[slices["sop_instance_uid"].isin(uids), "container"]:
        raw = bytearray(Path(path).read_bytes())
        raw[-2 * 64 * 32 - 64] ^= 64  # in the middle of the image, which ends the file
        Path(path).write_bytes(raw)
    return make_cache(index_of(copy), out, SIZE)


@pytest.fixture(scope="module")
def other(dicom, cache, tmp_path_factory) -> CTCache:
    """A cache of the same slices; every twentieth has other pixels."""
    uids = set(cache.slices["sop_instance_uid"][::20])
    return changed_cache(dicom, tmp_path_factory.mktemp("other") / "cache", uids)


@pytest.fixture(scope="module")
def began(cache, tmp_path_factory) -> Path:
    return interrupted_training(
        cache, tmp_path_factory.mktemp("began") / "run", config_of(), epoch=2
    )


@pytest.fixture(scope="module")
def ended(cache, tmp_path_factory) -> Path:
    return train(config_of(2), cache, tmp_path_factory.mktemp("ended") / "run")


@pytest.fixture
def interrupted(began, tmp_path) -> Path:
    return Path(shutil.copytree(began, tmp_path / "interrupted"))


@pytest.fixture
def finished(ended, tmp_path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "finished"))


@pytest.fixture
def quick(monkeypatch):
    """Trainings end after their last epoch: nothing is evaluated."""
    monkeypatch.setattr(training, "finish", lambda *_: None)


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def lose_blocks(path: Path, count: int = 1) -> None:
    """Fill 4 KB blocks in the middle of a file with zeros."""
    raw = bytearray(path.read_bytes())
    start = len(raw) // 8192 * 4096
    raw[start : start + 4096 * count] = bytes(4096 * count)
    path.write_bytes(raw)


# --- The cache of a run ---------------------------------------------------------------------


def test_a_run_a_state_and_the_best_weights_record_the_pixels(interrupted, cache):
    digest = cache.pixels_digest
    assert RunFolder(interrupted).data()["pixels"] == digest
    assert read_record(interrupted / "best.weights.h5")["pixels"] == digest
    state = files.read_json(interrupted / "state" / "epoch-0002" / "state.json")
    assert state["run"]["pixels"] == digest
    assert state["run"]["cache"] == cache.fingerprint


def test_a_training_does_not_go_on_with_other_pixels(interrupted, cache, other):
    assert other.fingerprint == cache.fingerprint
    with pytest.raises(StaleError) as caught:
        resume(interrupted, other)
    assert f"{other.path} holds other pixels" in caught.value.message
    for digest in (cache.pixels_digest, other.pixels_digest):
        assert digest[:12] in caught.value.message
    assert RunFolder(interrupted).is_interrupted


def test_a_training_goes_on_with_the_same_pixels_rebuilt(interrupted, dicom, tmp_path):
    from ich_keras.data.cache.cache import build_cache

    index = index_of(dicom).usable()
    rebuilt = build_cache(index, tmp_path / "again", SIZE, compression="gzip", shard_bytes=10**6)
    told = []
    resume(interrupted, rebuilt, tell=told.append)
    assert any(line.startswith("Resuming after epoch 2 of 3") for line in told)
    assert RunFolder(interrupted).is_finished
    assert "files match their checksums" in verify(interrupted)[1]


def test_a_run_is_not_evaluated_on_other_pixels(finished, cache, other, dicom, tmp_path):
    before = (finished / "metrics-valid.json").read_bytes()
    with pytest.raises(
        StaleError, match=r"the valid split have other pixels in .*digest"
    ) as caught:
        evaluate(finished, other, "valid")
    assert "ich predict" in caught.value.hint
    assert (finished / "metrics-valid.json").read_bytes() == before
    # Other pixels elsewhere do not matter.
    split = RunFolder(finished).split()
    rows = cache.slices["series_uid"].isin(split.members["test"])
    elsewhere = set(cache.slices.loc[rows, "sop_instance_uid"].iloc[[3]])
    changed = changed_cache(dicom, tmp_path / "elsewhere", elsewhere)
    evaluate(finished, changed, "valid")
    assert json.loads((finished / "metrics-valid.json").read_bytes()) == json.loads(before)
    with pytest.raises(StaleError, match="the test split have other pixels"):
        evaluate(finished, changed)


def test_the_neighbours_of_slabs_count_as_pixels_of_their_split(cache):
    """A split by slices: the other slices of its series enter its slabs."""
    from ich_keras.data.pixels import part_digests
    from ich_keras.data.split_record import Split

    uids = cache.slices["sop_instance_uid"]
    members = {"train": (uids[0],), "valid": (uids[100],), "test": (uids[200],)}
    split = Split("file:a", None, "sop_instance_uid", members)
    before = part_digests(cache, split)

    class Changed:
        slices = cache.slices.copy()

    Changed.slices.loc[1, "pixel_hash"] = "0" * 32
    after = part_digests(Changed(), split)
    assert cache.slices["series_uid"][0] == cache.slices["series_uid"][1]
    assert after["train"] != before["train"]
    assert (after["valid"], after["test"]) == (before["valid"], before["test"])


# --- Equal pixels in two splits -------------------------------------------------------------


@pytest.fixture(scope="module")
def twice(dicom, cache, tmp_path_factory) -> tuple[CTCache, str, str]:
    """A cache in which a slice of a patient in valid has the pixels of one in train."""
    plan = config_of()
    split = training.split_indices(cache.slices, training.Recipe.of(plan, SIZE))[1]
    uids = cache.slices["sop_instance_uid"]
    heads = [row for row in split["train"] if (cache.slice_hu(row) > -500).mean() > 0.1]
    one, other = uids[heads[0]], uids[split["valid"][0]]
    copy = tmp_path_factory.mktemp("twice") / "dicom"
    shutil.copytree(dicom, copy)
    paths = index_of(copy).slices.set_index("sop_instance_uid")["container"]
    pixels = Path(paths[one]).read_bytes()[-2 * 64 * 64 :]
    header = Path(paths[other]).read_bytes()[: -2 * 64 * 64]
    Path(paths[other]).write_bytes(header + pixels)
    made = make_cache(index_of(copy), copy.with_name("cache"), SIZE)
    row = {uid: number for number, uid in enumerate(made.slices["sop_instance_uid"])}
    np.testing.assert_array_equal(made.slice_hu(row[one]), made.slice_hu(row[other]))
    return made, one, other


def test_training_refuses_equal_pixels_in_two_splits_before_it_trains(twice, tmp_path, monkeypatch):
    cache, one, other = twice
    monkeypatch.setattr(training, "compiled_network", None)
    message = f"train and valid share 1 images of equal pixels: {one} .train. and {other} .valid."
    with pytest.raises(DataError, match=message):
        train(config_of(), cache, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=message):
        plan_training(cache, config_of())
    done = CliRunner().invoke(
        main,
        ["train", "--cache", str(cache.path), "--out", str(tmp_path / "run"), "--plan"],
    )
    assert done.exit_code == 3
    assert "images of equal pixels" in " ".join(done.output.split())


@pytest.mark.parametrize("column", ["patient_id", "series_instance_uid", "sop_instance_uid"])
def test_equal_pixels_in_a_split_of_ones_own_are_refused_by_the_command(twice, tmp_path, column):
    """The list itself keeps patients, series and slices apart."""
    cache, one, other = twice
    slices = cache.slices.set_index("sop_instance_uid", drop=False)
    parts = {slices["patient_id"][one]: "train", slices["patient_id"][other]: "valid"}
    patients = slices["patient_id"].unique().tolist()
    parts |= {
        name: ("train", "test")[n % 2] for n, name in enumerate(patients) if name not in parts
    }
    names = {"series_instance_uid": "series_uid"}.get(column, column)
    table = pd.DataFrame({column: slices[names], "split": slices["patient_id"].map(parts)})
    table.drop_duplicates().to_csv(tmp_path / "split.csv", index=False)
    options = ["--split", str(tmp_path / "split.csv"), "--preset", NARROW, "--size", str(SIZE)]
    done = CliRunner().invoke(
        main, ["train", "--cache", str(cache.path), "--out", str(tmp_path / "run"), *options]
    )
    said = " ".join(done.output.split())
    assert done.exit_code == 3, said
    assert f"train and valid share 1 images of equal pixels: {one} (train) and {other}" in said
    assert not (tmp_path / "run").exists()


# --- States ---------------------------------------------------------------------------------


def test_states_of_another_run_are_refused_by_name(interrupted, cache, tmp_path):
    foreign = interrupted_training(cache, tmp_path / "foreign", config_of(seed=1), epoch=1)
    shutil.rmtree(interrupted / "state")
    shutil.copytree(foreign / "state", interrupted / "state")
    with pytest.raises(
        LostState, match=r"state/epoch-0001 belongs to another run \(different: recipe, start\)"
    ):
        resume(interrupted, cache)
    with pytest.raises(StaleError, match="epoch-0001 (is a state of|belongs to) another run"):
        verify(interrupted)


def test_one_foreign_state_is_skipped_and_the_run_goes_on_before_it(
    interrupted, cache, tmp_path, quick
):
    foreign = interrupted_training(cache, tmp_path / "foreign", config_of(seed=1), epoch=2)
    shutil.rmtree(interrupted / "state" / "epoch-0002")
    shutil.copytree(foreign / "state" / "epoch-0002", interrupted / "state" / "epoch-0002")
    told = []
    resume(interrupted, cache, tell=told.append)
    assert "Skipping a damaged state: " in told[0] and "to another run" in told[0]
    assert any(line.startswith("Resuming after epoch 1 of 3") for line in told)


def test_states_that_changed_places_are_refused_by_name(interrupted, cache):
    one, two = (interrupted / "state" / f"epoch-000{epoch}" for epoch in (1, 2))
    one.rename(interrupted / "aside")
    two.rename(one)
    (interrupted / "aside").rename(two)
    with pytest.raises(LostState, match=r"epoch-0002 holds the state of epoch 1"):
        resume(interrupted, cache)


@pytest.mark.parametrize("name", ["model.weights.h5", "variables.npz"])
def test_files_of_another_state_are_refused_by_name(interrupted, name):
    one, two = (interrupted / "state" / f"epoch-000{epoch}" for epoch in (1, 2))
    shutil.copy(one / name, two / name)
    with pytest.raises(StaleError, match=rf"epoch-0002/{name} is lost or does not match its chec"):
        checkpoints.read_state(two, 2)
    checkpoints.read_state(one, 1)


def test_every_flipped_bit_of_a_state_is_seen(interrupted):
    folder = interrupted / "state" / "epoch-0002"
    random = np.random.default_rng(0)
    checkpoints.read_state(folder, 2)
    seen = 0
    for name in ("state.json", "variables.npz", "model.weights.h5"):
        path = folder / name
        whole = path.read_bytes()
        for offset in random.integers(0, len(whole), 60).tolist():
            changed = bytearray(whole)
            changed[offset] ^= 1 << int(random.integers(0, 8))
            path.write_bytes(changed)
            with pytest.raises(StaleError, match=r"epoch-0002"):
                checkpoints.read_state(folder, 2)
            seen += 1
        path.write_bytes(whole)
    assert seen == 180
    checkpoints.read_state(folder, 2)


def test_states_of_older_versions_load_and_say_what_they_lack(interrupted, cache, quick):
    for epoch in (1, 2):
        state_without_checksums(interrupted / "state" / f"epoch-000{epoch}")
    told = []
    resume(interrupted, cache, tell=told.append)
    assert "epoch-0002 has no checksums (an older version saved it)" in told[0]
    assert any(line.startswith("Resuming after epoch 2 of 3") for line in told)
    checkpoints.read_state(interrupted / "state" / "epoch-0003", 3)


def test_a_history_that_was_changed_is_that_of_the_state_again(interrupted, cache, quick):
    path = interrupted / "history.csv"
    before = path.read_text().splitlines()
    path.write_text("epoch,valid_log_loss\n1,0.001\n")
    resume(interrupted, cache)
    assert path.read_text().splitlines()[:3] == before
    state = checkpoints.read_state(interrupted / "state" / "epoch-0003", 3)[0]
    pd.testing.assert_frame_equal(pd.read_csv(path), pd.DataFrame(state["history"]))
    # Even where no epoch is left to be trained.
    whole = path.read_bytes()
    path.write_text("epoch,valid_log_loss\n1,0.001\n")
    resume(interrupted, cache)
    assert path.read_bytes() == whole


# --- Best weights ---------------------------------------------------------------------------


def test_lost_blocks_in_the_weights_of_a_run_are_refused(finished, cache, phantom_folder):
    best = finished / "best.weights.h5"
    lose_blocks(best, 3)
    message = r"best\.weights\.h5: \d+ of 41 layers are not as they were saved"
    for use in (
        lambda: evaluate(finished, cache),
        lambda: predict_folder(finished, phantom_folder / "images"),
        lambda: load_run(finished),
        lambda: train(config_of(1, weights=str(best)), cache, finished / "new"),
    ):
        with pytest.raises(DataError, match=message):
            use()
    done = CliRunner().invoke(main, ["verify", str(best)])
    assert done.exit_code == 6
    assert "are not as they were saved" in " ".join(done.output.split())


def test_weights_of_another_epoch_are_refused(finished, cache):
    """Of the same run, by its own hand: record and checksums are right."""
    _, model = load_run(finished)
    best = finished / "best.weights.h5"
    record = read_record(best)
    kept = best.read_bytes()
    layer = model.get_layer("fc")
    layer.set_weights([array * 1.01 for array in layer.get_weights()])
    save_weights(model, best, record | {"epoch": 1})
    for use in (lambda: evaluate(finished, cache), lambda: load_run(finished)):
        with pytest.raises(StaleError, match=r"best\.weights\.h5 is not what the training ended"):
            use()
    with pytest.raises(StaleError, match=r"best\.weights\.h5 changed or lost since"):
        verify(finished)
    best.write_bytes(kept)
    load_run(finished)


def test_the_weights_of_a_state_are_no_best_weights(finished, cache):
    shutil.copy(
        finished / "state" / "epoch-0002" / "model.weights.h5", finished / "best.weights.h5"
    )
    with pytest.raises(StaleError, match=r"recipe\.json is not the recipe that best\.weights\.h5"):
        evaluate(finished, cache)


@pytest.mark.parametrize("best_epoch", [1, 2])
@pytest.mark.parametrize("damage", ["none", "blocks", "others"])
def test_best_weights_that_are_not_the_best_are_noticed_when_a_training_goes_on(
    interrupted, cache, damage, best_epoch, quick, monkeypatch
):
    """Those of the last epoch are in its state; those of earlier ones are lost, and told so."""
    from ich_keras.models.classifier import classifier

    monkeypatch.setattr(training, "fit", lambda *_: None)
    best, folder = interrupted / "best.weights.h5", interrupted / "state" / "epoch-0002"
    record = read_record(best) | {"epoch": best_epoch}
    shutil.copy(folder.with_name(f"epoch-000{best_epoch}") / "model.weights.h5", best)
    digest = read_weights(best).digest
    model = classifier(PRESETS[NARROW].spec)
    model.load_weights(best)
    assert save_weights(model, best, record) == digest
    state, _ = checkpoints.read_state(folder, 2)
    kept = {"best_epoch": best_epoch, "best_weights": digest, "best_loss": 0.1}
    checkpoints.write_state(folder, state | kept)
    if damage == "blocks":
        lose_blocks(best)
    elif damage == "others":  # of the same epoch by their record
        save_weights(classifier(PRESETS[NARROW].spec), best, record)
    told = []
    resume(interrupted, cache, tell=told.append)
    lost = f"The best weights so far (epoch {best_epoch}) are lost"
    is_lost = damage != "none" and best_epoch == 1
    assert any(line.startswith(lost) for line in told) == is_lost
    if not is_lost:
        assert read_weights(best).digest == digest


def test_best_weights_lost_after_the_last_epoch_end_the_training(ended, cache, tmp_path):
    """All epochs are done, only the evaluation is not: no later epoch can take over."""
    run = RunFolder(shutil.copytree(ended, tmp_path / "run"))
    run.report_file.unlink()
    best, epoch = run.best_weights, run.best_epoch()
    state, _ = checkpoints.read_state(run.state_folder / "epoch-0002", 2)
    if epoch == 2:  # of an epoch before the last
        record = read_record(best) | {"epoch": 1}
        model = classifier(PRESETS[NARROW].spec)
        model.load_weights(best)
        save_weights(model, best, record)
        checkpoints.write_state(run.state_folder / "epoch-0002", state | {"best_epoch": 1})
    other = shutil.copy(run.state_folder / "epoch-0001" / "model.weights.h5", tmp_path)
    shutil.copy(other, best)
    for _ in range(2):  # another file, and none
        with pytest.raises(LostState, match="no epoch is left to train"):
            resume(run, cache)
        assert not run.is_finished
        best.unlink(missing_ok=True)


def test_the_report_names_the_epoch_of_the_weights_not_of_the_lowest_loss(finished):
    run = RunFolder(finished)
    history = pd.read_csv(run.history_file)
    worst = int(history.loc[history["valid_log_loss"].idxmax(), "epoch"])
    model = classifier(PRESETS[NARROW].spec)
    model.load_weights(run.best_weights)
    save_weights(model, run.best_weights, read_record(run.best_weights) | {"epoch": worst})
    loss = history["valid_log_loss"].max()
    said = f"Best epoch: {worst} of 2 (validation log loss {loss:.4f})."
    assert said in report_text(run)
    assert said in run_summary(run, 200)


# --- The files of a finished run ------------------------------------------------------------


def verified(path: Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["verify", str(path)])
    return done.exit_code, " ".join(done.output.split())


def test_every_file_of_a_finished_run_has_a_checksum(finished):
    code, said = verified(finished)
    assert code == 0
    listed = set(files.read_json(finished / "checksums.json")["files"])
    there = {path.name for path in finished.iterdir() if path.is_file()}
    assert listed == there - {"checksums.json"}
    assert f"a finished run {len(listed)} files match their checksums" in said
    assert "best.weights.h5: 41 layers" in said
    assert "model.keras: the model's parts match" in said
    assert "state of epoch 2: its files match" in said and "state of epoch 1:" in said
    for name in sorted(listed):
        whole = (finished / name).read_bytes()
        flip(finished / name, len(whole) // 2)
        code, said = verified(finished)
        assert (code, f"{name} changed or lost since" in said) == (6, True), name
        (finished / name).unlink()
        assert verified(finished)[0] == 6
        (finished / name).write_bytes(whole)
    for name in ("state.json", "variables.npz", "model.weights.h5"):
        path = finished / "state" / "epoch-0001" / name
        whole = path.read_bytes()
        flip(path, len(whole) // 2)
        code, said = verified(finished)
        assert code == 6 and f"epoch-0001/{name}" in said
        path.write_bytes(whole)
    (finished / "checksums.json").write_text("{}")
    assert verified(finished)[0] == 6


@pytest.mark.parametrize("name", ["recipe.json", "data.json", "split.json", "choices.json"])
def test_what_says_how_a_run_is_used_is_not_used_when_changed(finished, cache, name):
    content = files.read_json(finished / name)
    files.write_json(finished / name, {**content, "note": "mine"})
    if name in ("split.json", "recipe.json"):  # else their own readers refuse the new entry
        text = (finished / name).read_text().replace("mine", "")
        changed = json.loads(text)
        del changed["note"]
        (finished / name).write_text(json.dumps(changed))
    with pytest.raises(StaleError, match=rf"{name} was changed after the training"):
        evaluate(finished, cache)


def test_evaluating_again_keeps_a_run_verified(finished, cache):
    evaluate(finished, cache, "train")
    evaluate(finished, cache, "valid")
    code, said = verified(finished)
    assert code == 0, said
    listed = files.read_json(finished / "checksums.json")["files"]
    assert {"metrics-train.json", "predictions-train.csv"} <= set(listed)


def test_lost_choices_are_made_again(finished, cache):
    before = (finished / "choices.json").read_bytes()
    (finished / "choices.json").unlink()
    assert verified(finished)[0] == 6
    evaluate(finished, cache, "valid")
    assert (finished / "choices.json").read_bytes() == before
    assert verified(finished)[0] == 0


def test_a_damaged_model_file_is_refused(finished):
    from ich_keras.model_file import read_recipe

    path = finished / "model.keras"
    whole = path.read_bytes()
    read_recipe(path)
    lose_blocks(path)
    with pytest.raises(StaleError, match=r"model\.keras is (damaged: .*h5|not a \.keras file)"):
        read_recipe(path)
    code, said = verified(path)
    assert code == 6 and "model.keras" in said
    path.write_bytes(whole)
    assert verified(path)[0] == 0


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999, "random", "random with a head"])
def test_a_cut_or_random_model_file_is_refused_with_the_true_reason(finished, cache, share):
    from ich_keras.model_file import read_recipe

    path = finished / "model.keras"
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(10_000)
    contents = {"random": noise, "random with a head": b"PK\3\4" + noise}
    path.write_bytes(contents.get(share) or whole[: int(len(whole) * share)])
    with pytest.raises(StaleError, match=r"model\.keras is (damaged|not a \.keras file)") as caught:
        read_recipe(path)
    code, said = verified(path)
    assert code == 6 and "model.keras is" in said
    for words in (caught.value.message, said):
        assert not re.search("not found|No such file|does not exist", words)
    named = shutil.copy(path, finished / "x.weights.h5")
    with pytest.raises(DataError, match=r"x\.weights\.h5 is not"):
        train(config_of(1, weights=str(named)), cache, finished / "new")


def test_runs_of_older_versions_are_used_and_say_what_they_lack(finished, cache):
    (finished / "checksums.json").unlink()
    weights_without_checksums(finished / "best.weights.h5")
    with h5py.File(finished / "best.weights.h5", "r+") as file:
        record = json.loads(file.attrs["ich_keras"])
        del record["pixels"]
        file.attrs["ich_keras"] = json.dumps(record)
    data = files.read_json(finished / "data.json")
    del data["pixels"], data["pixels_of"]
    files.write_json(finished / "data.json", data)
    for epoch in (1, 2):
        state_without_checksums(finished / "state" / f"epoch-000{epoch}")
    evaluate(finished, cache)
    code, said = verified(finished)
    assert code == 0
    assert said.count("no checksums (an older version wrote it)") == 4
    assert not (finished / "checksums.json").exists()


def test_checksums_that_are_lost_are_missed(finished, interrupted, cache):
    (finished / "checksums.json").unlink()
    for use in (verify, load_run, lambda run: evaluate(run, cache)):
        with pytest.raises(StaleError, match=r"has lost its checksums\.json"):
            use(finished)
    state = interrupted / "state" / "epoch-0002" / "state.json"
    content = files.read_json(state)
    files.write_json(state, {k: v for k, v in content.items() if k not in ("checksum", "files")})
    with pytest.raises(StaleError, match="does not match its checksum"):
        verify(interrupted)


def test_other_labels_do_not_overwrite_what_a_run_was_scored_with(finished, cache, dicom):
    labels = cache.slices.set_index("sop_instance_uid")
    test_rows = pd.read_csv(finished / "predictions-test.csv")["sop_instance_uid"]
    lines = (dicom / "stage_2_train.csv").read_text().splitlines()
    wrong = dicom.with_name("wrong.csv")
    changed = f"{test_rows[0]}_any,{1 - labels.loc[test_rows[0], 'any']}"
    kept = [line for line in lines if not line.startswith(f"{test_rows[0]}_any,")]
    subtypes = [k if not k.startswith(test_rows[0]) else k[:-1] + "0" for k in kept]
    wrong.write_text("\n".join([*subtypes, changed]) + "\n")
    before = (finished / "metrics-test.json").read_bytes()
    other = CTCache.open(cache.path, labels=read_rsna_labels(wrong))
    with pytest.raises(StaleError, match=r"1 of \d+ rows of .*-test\.csv have other labels"):
        evaluate(finished, other)
    assert (finished / "metrics-test.json").read_bytes() == before
    evaluate(finished, cache)
    verify(finished)


def test_two_evaluations_at_once_are_refused(finished, cache):
    with files.lock(RunFolder(finished).lock_file), pytest.raises(StaleError, match="is locked"):
        evaluate(finished, cache)
    evaluate(finished, cache)
    assert not RunFolder(finished).lock_file.exists()


def test_an_unfinished_run_is_verified_as_far_as_it_goes(interrupted):
    code, said = verified(interrupted)
    assert code == 0
    assert "an unfinished run" in said and "state of epoch 2: its files match" in said
    flip(interrupted / "state" / "epoch-0002" / "variables.npz", 5000)
    code, said = verified(interrupted)
    assert code == 6 and "epoch-0002/variables.npz" in said


def test_verify_says_what_it_does_not_know(tmp_path):
    assert verified(tmp_path)[0] == 2
    assert verified(tmp_path / "none")[0] == 2
    (tmp_path / "a.txt").touch()
    code, said = verified(tmp_path / "a.txt")
    assert code == 2 and "is neither a .weights.h5 file nor a .keras file" in said


def test_files_exchanged_while_a_folder_is_predicted_are_rejects(
    ended, dicom, tmp_path, monkeypatch
):
    from ich_keras import prediction

    copy = Path(shutil.copytree(dicom / "images", tmp_path / "images"))
    index_folder = prediction.index_folder

    def then_exchange(*arguments, **options):
        index = index_folder(*arguments, **options)
        equal = index.slices["file_size"] == index.slices["file_size"].mode()[0]
        one, other = map(Path, index.slices.loc[equal, "container"].iloc[[0, -1]])
        content = one.read_bytes(), other.read_bytes()
        one.write_bytes(content[1])
        other.write_bytes(content[0])
        return index

    monkeypatch.setattr(prediction, "index_folder", then_exchange)
    result = predict_folder(ended, copy)
    assert result.rejects["code"].tolist() == ["CHANGED", "CHANGED"]
    before = index_folder(copy).slices
    assert len(result.slices) == len(before) - 2
    exchanged = before.loc[before["container"].isin(result.rejects["path"]), "sop_instance_uid"]
    assert not set(exchanged) & set(result.slices["sop_instance_uid"])


def test_an_index_of_an_older_version_with_other_columns_is_refused(dicom, tmp_path):
    index = prepare_index(dicom / "images")
    index.save(tmp_path / "index")
    content = files.read_json(tmp_path / "index" / "index.json")
    del content["checksum"]
    files.write_json(tmp_path / "index" / "index.json", content)
    assert len(SeriesIndex.load(tmp_path / "index").slices) == len(index.slices)
    columns = content["tables"]["slices"]["columns"]
    renamed = {("height" if name == "rows" else name): kind for name, kind in columns.items()}
    content["tables"]["slices"]["columns"] = renamed
    files.write_json(tmp_path / "index" / "index.json", content)
    with pytest.raises(StaleError, match=r"slices\.csv has other columns than its record says"):
        SeriesIndex.load(tmp_path / "index")


def test_an_index_is_verified(dicom, tmp_path):
    copy = Path(shutil.copytree(dicom, tmp_path / "data"))
    index = prepare_index(copy / "images")
    index.save(tmp_path / "index")
    code, said = verified(tmp_path / "index")
    assert code == 0
    assert f"{len(index.slices)} files are in their places" in said
    for name in ("slices.csv", "series.csv", "rejects.csv", "index.json"):
        whole = (tmp_path / "index" / name).read_bytes()
        flip(tmp_path / "index" / name, len(whole) // 2)
        code, said = verified(tmp_path / "index")
        assert code == 6 and name in said
        (tmp_path / "index" / name).write_bytes(whole)
    first = Path(index.slices["container"].iloc[0])
    first.write_bytes(first.read_bytes() + b"\0")
    code, said = verified(tmp_path / "index")
    assert code == 6 and "have another size" in said and first.name in said.replace(" ", "")


def test_a_cache_is_verified(cache, tmp_path):
    copy = Path(shutil.copytree(cache.path, tmp_path / "cache"))
    code, said = verified(copy)
    assert code == 0 and f"pixels {cache.pixels_digest}" in said
    flip(copy / "shard-0000.h5", (copy / "shard-0000.h5").stat().st_size - 100)
    code, said = verified(copy)
    assert code == 6 and "shard-0000.h5: slice" in said


# --- Caches of older versions ---------------------------------------------------------------


def test_training_on_an_older_cache_says_what_is_not_checked(cache, tmp_path):
    old = cache_of_schema_1(Path(shutil.copytree(cache.path, tmp_path / "old")))
    told = []
    run = train(config_of(1), old, tmp_path / "run", tell=told.append)
    assert NO_HASHES in told
    assert RunFolder(run).data()["pixels"] is None
    assert evaluate(run, old) == evaluate(run, cache)


def test_a_run_with_digests_does_not_go_on_with_an_older_cache(interrupted, cache, tmp_path):
    old = cache_of_schema_1(Path(shutil.copytree(cache.path, tmp_path / "old")))
    with pytest.raises(StaleError, match="holds other pixels .* digest none, expected"):
        resume(interrupted, old)


def test_labels_given_anew_do_not_change_the_digest(finished, cache, dicom):
    """Slices that lost their label are still slices of their series."""
    table = read_rsna_labels(dicom / "stage_2_train.csv")
    index, _ = join_labels(index_of(dicom).usable(), table)
    assert len(index.slices) == len(cache)
    again = CTCache.open(cache.path, labels=table)
    slices = again.slices.copy()
    rows = np.flatnonzero(slices["series_uid"].isin(RunFolder(finished).split().members["valid"]))
    slices.loc[rows[:3], ["any"]] = -1
    again.slices = slices
    with pytest.raises(StaleError, match=r"3 of \d+ rows .* have other labels"):
        evaluate(finished, again, "valid")


def test_choices_that_are_lost_are_missed_and_can_be_made_again(
    finished, cache, phantom_folder, tmp_path
):
    choices = finished / "choices.json"
    before = choices.read_bytes()
    choices.unlink()
    with pytest.raises(StaleError, match=r"has lost its choices\.json") as caught:
        predict_folder(finished, phantom_folder / "images", tmp_path / "out")
    assert "ich evaluate" in caught.value.hint
    evaluate(finished, cache, "valid")
    assert choices.read_bytes() == before
    verify(finished)


def test_a_model_of_keras_alone_is_verified_and_said_to_lack_a_recipe(tmp_path):
    classifier(PRESETS[NARROW].spec).save(tmp_path / "mine.keras")
    code, said = verified(tmp_path / "mine.keras")
    assert code == 0
    assert "parts match their checksums; it carries no recipe" in said
    lose_blocks(tmp_path / "mine.keras")
    assert verified(tmp_path / "mine.keras")[0] == 6


def test_a_cache_that_was_read_otherwise_is_reported(interrupted, cache, quick, monkeypatch):
    told = []
    monkeypatch.setitem(cache.manifest["versions"], "reading", "another rule")
    resume(interrupted, cache, tell=told.append)
    assert OTHER_READING in told
    monkeypatch.undo()
    assert notices_of(cache) == []
