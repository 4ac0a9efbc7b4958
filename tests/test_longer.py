"""More epochs for a finished run, and averages of the weights: EMA over steps, SWA over epochs."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from interrupted import interrupted_training
from narrow import history_of, preset_of, without_evaluation

from ich_keras import averaging, fitting, planning, recipe, report
from ich_keras.checkpoints import averages_of
from ich_keras.cli import main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.errors import StaleError, UsageError
from ich_keras.extension import extend, train_more
from ich_keras.inference import load_run
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import read_weights
from ich_keras.run_folder import RunFolder
from ich_keras.training import resume, train
from ich_keras.verification import verify

NARROW, SIZE = "narrow-longer", 32


@pytest.fixture(scope="module", autouse=True)
def narrow_preset():
    with preset_of(NARROW, ModelSpec((SIZE, SIZE, 3), depth=10, width=8)):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_evaluation():
    with without_evaluation():
        yield


def config_of(**fit) -> RunConfig:
    fit = {"batch_size": 16, "epochs": 3, "learning_rate": 3e-3} | fit
    data = DataConfig(size=SIZE, augment="flip", limit_series=14)
    return RunConfig(
        preset=NARROW, precision="float32", device="cpu", data=data, fit=FitConfig(**fit)
    )


def digests_of(run: Path) -> list[str]:
    """Of the best weights and of those of the last state, and the optimiser's part of it."""
    last = sorted((run / "state").glob("epoch-*"))[-1]
    with np.load(last / "variables.npz") as arrays:
        slots = [arrays[name].tobytes() for name in sorted(arrays.files)]
    files = (run / "best.weights.h5", last / "model.weights.h5")
    return [last.name, *(read_weights(path).digest for path in files), *slots]


@pytest.fixture(scope="module")
def long_run(phantom_cache, tmp_path_factory, narrow_preset, no_evaluation) -> Path:
    return train(config_of(), phantom_cache, tmp_path_factory.mktemp("long") / "run")


@pytest.fixture(scope="module")
def short_run(phantom_cache, tmp_path_factory, narrow_preset, no_evaluation) -> Path:
    return train(config_of(epochs=2), phantom_cache, tmp_path_factory.mktemp("short") / "run")


# --- More epochs ----------------------------------------------------------------------------


def test_more_epochs_are_those_of_a_longer_training(long_run, short_run, phantom_cache, tmp_path):
    before = {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()}
    told = []
    out = train_more(short_run, phantom_cache, tmp_path / "more", 1, tell=told.append)
    assert told[0] == f"2 epochs are done in {short_run}, 1 more make 3 in {out}."
    assert "Resuming after epoch 2 of 3" in told[1]
    assert history_of(out) == history_of(long_run)
    assert digests_of(out) == digests_of(long_run)
    new, old = RunFolder(out), RunFolder(long_run)
    assert new.is_finished and verify(out)
    assert new.config() == old.config() and new.recipe() == old.recipe()
    assert new.data()["plan"] == old.data()["plan"]
    assert new.seen_file.read_bytes() == old.seen_file.read_bytes()
    extended = [{"run": str(short_run.absolute()), "epoch": 2}]
    assert new.environment()["extended"] == extended
    assert f"Goes on after epoch 2 of the finished run {short_run}." in new.report_file.read_text()
    # The old run stays as it is, and the new one can be made longer, too.
    assert {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()} == before
    again = extend(out, tmp_path / "again", 2)
    assert [entry["epoch"] for entry in again.environment()["extended"]] == [2, 3]
    assert again.recipe().training.epochs == 5
    # The best weights so far are its own, too: their record names the new recipe.
    assert load_run(again, unfinished=True)[0].training.epochs == 5


def test_by_command_and_after_an_interruption(
    long_run, short_run, phantom_cache, tmp_path, monkeypatch
):
    def die(*_):
        raise KeyboardInterrupt

    out = tmp_path / "new"
    command = ["train", "--resume", str(short_run), "--more-epochs", "1", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_state", die)
        done = CliRunner().invoke(main, command)
    assert done.exit_code == 130, done.output
    assert f"To resume: ich-train --resume {out}" in done.output
    monkeypatch.setattr("ich_keras.summary.run_summary", lambda *_: "")  # nothing was evaluated
    done = CliRunner().invoke(main, ["train", "--resume", str(out)])
    assert done.exit_code == 0, done.output
    assert digests_of(out) == digests_of(long_run)
    assert history_of(out) == history_of(long_run)


def test_a_cosine_goes_up_again_and_patience_is_left_out(phantom_cache, tmp_path):
    config = config_of(epochs=2, schedule="cosine", patience=2)
    run = train(config, phantom_cache, tmp_path / "run")
    told = []
    out = train_more(run, phantom_cache, tmp_path / "more", 2, tell=told.append)
    rates = [float(row["learning_rate"]) for row in history_of(out)]
    assert rates == pytest.approx([1.5e-3, 0, 1.5e-3 * (1 + np.cos(0.75 * np.pi)), 0], abs=1e-9)
    assert told[1] == (
        "The learning rate follows the cosine of 4 epochs from here on: it goes up again. Until"
        " epoch 2 it was that of 2."
    )
    assert told[2] == "Patience is left out."
    assert RunFolder(out).recipe().training.patience is None
    assert RunFolder(run).recipe().training.patience == 2


def test_a_run_without_its_last_state_says_the_way_out(short_run, phantom_cache, tmp_path):
    run = shutil.copytree(short_run, tmp_path / "run")
    shutil.rmtree(run / "state" / "epoch-0002")
    with pytest.raises(StaleError, match="has no state of epoch 2, the last one") as caught:
        train_more(run, phantom_cache, tmp_path / "new", 1)
    assert f"--weights {run / 'best.weights.h5'} --config" in caught.value.hint
    changed = shutil.copytree(short_run, tmp_path / "changed")
    (changed / "history.csv").write_text((changed / "history.csv").read_text() + "\n")
    with pytest.raises(StaleError, match="changed since it finished: history.csv"):
        extend(changed, tmp_path / "new", 1)
    damaged = shutil.copytree(short_run, tmp_path / "damaged")
    (damaged / "state" / "epoch-0002" / "variables.npz").write_bytes(b"")
    with pytest.raises(StaleError, match="variables.npz is lost or does not match"):
        extend(damaged, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()


def test_bad_input_to_more_epochs(short_run, phantom_cache_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    more = ["--resume", short_run, "--more-epochs"]
    new = ["--out", tmp_path / "new"]
    for code, message, *options in (
        (2, "0 is not in the range", *more, 0, *new),
        (2, "-1 is not in the range", *more, -1, *new),
        (2, "'nan' is not a valid", *more, "nan", *new),
        (2, "'two' is not a valid", *more, "two", *new),
        (2, "--out is missing", *more, 1),
        (2, "already exists", *more, 1, "--out", tmp_path / "full"),
        (2, "--more-epochs given without --resume", "--more-epochs", 1, *new),
        (2, "--more-epochs begins in one process", *more, 1, *new, "--gpus", 2),
        (2, "--epochs given with --resume", *more, 1, *new, "--epochs", 3),
        (6, "is not a run folder", "--resume", tmp_path, "--more-epochs", 1, *new),
    ):
        done = CliRunner().invoke(main, ["train", *map(str, options)])
        assert done.exit_code == code, (options, done.output)
        line = next(line for line in done.output.splitlines() if line.startswith("Error: "))
        assert message in line
        assert sorted(tmp_path.rglob("*")) == before
    for epochs in (0, -1, True, 1.5, "2", 10**7):
        with pytest.raises(UsageError, match="expected at least 1"):
            extend(short_run, tmp_path / "new", epochs)


def test_an_unfinished_run_is_resumed_instead(phantom_cache, tmp_path):
    run = interrupted_training(phantom_cache, tmp_path / "run", config_of(epochs=2), 1)
    with pytest.raises(StaleError, match="is not finished"):
        train_more(run, phantom_cache, tmp_path / "new", 1)


def test_a_refusal_leaves_no_new_run(short_run, phantom_cache, tmp_path, monkeypatch):
    stop = keras.callbacks.TerminateOnNaN()
    for options, message in (
        ({"callbacks": stop}, "the callbacks differ"),
        ({"augment": lambda *_: None}, "the augmentation differs"),
        ({"device": "tpu"}, "tpu"),
    ):
        with pytest.raises(UsageError, match=message):
            train_more(short_run, phantom_cache, tmp_path / "new", 1, **options)
    command = ["train", "--resume", str(short_run), "--more-epochs", "1", "--device", "tpu"]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "new")])
    assert done.exit_code == 2 and "tpu" in done.output and "To resume" not in done.output
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="more epochs in 2 processes: they begin in one"):
        train_more(short_run, phantom_cache, tmp_path / "new", 1)
    assert list(tmp_path.iterdir()) == []


# --- Averages of the weights ----------------------------------------------------------------


def weights_of(path: Path) -> dict[str, np.ndarray]:
    layers = read_weights(path).layers
    return {f"{name}/{n}": array for name in layers for n, array in enumerate(layers[name])}


def watched_steps(monkeypatch) -> list[list[np.ndarray]]:
    """Let the optimiser note the trainable weights after each of its batches."""
    from ich_keras.models.optimizer import Adam

    apply, seen = Adam.apply, []

    def noting(self, grads, variables=None):
        apply(self, grads, variables)
        arrays = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
        seen.append((arrays, [v.path for v in variables]))

    monkeypatch.setattr(Adam, "apply", noting)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", ["fast", "stock"])
def test_ema_is_the_average_over_steps(phantom_cache, tmp_path, monkeypatch, step, accumulate):
    """The kept weights against the average by its definition, over the weights that were seen."""
    seen = watched_steps(monkeypatch)
    decay = 0.7
    config = config_of(epochs=1, ema=decay, step=step, accumulate=accumulate)
    run = train(config, phantom_cache, tmp_path / "run")
    assert len(seen) > 3
    momentum, average = decay ** (1 / accumulate), None
    for number, (arrays, _) in enumerate(seen):
        if number < accumulate:  # it begins with the weights after the first step
            average = [array.astype(float) for array in arrays]
            continue
        pairs = zip(average, arrays, strict=True)
        average = [momentum * mean + (1 - momentum) * array for mean, array in pairs]
    kept, last = (
        weights_of(path)
        for path in (run / "best.weights.h5", run / "state" / "epoch-0001" / "model.weights.h5")
    )
    for mean, array, path in zip(average, seen[-1][0], seen[-1][1], strict=True):
        layer, name = path.rsplit("/", 1)
        place = {"kernel": 0, "gamma": 0, "bias": 1, "beta": 1}[name]
        np.testing.assert_allclose(kept[f"{layer}/{place}"], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(last[f"{layer}/{place}"], array)  # training goes on with it
    assert any((kept[name] != last[name]).any() for name in kept)
    report = (run / "report.md").read_text()
    assert "Judged and kept: the moving average of the weights (0.7)." in report


def test_swa_is_the_average_of_the_last_epochs(phantom_cache, tmp_path, monkeypatch):
    """Batch normalisation's statistics included; before, the weights themselves are judged."""
    after, keep, kept = {}, fitting._keep_best, {}
    average = fitting.average_epoch

    def noting(model, settings, epoch):
        after[epoch] = [np.array(keras.ops.convert_to_numpy(v)) for v in model.weights]
        average(model, settings, epoch)

    def keeping(fit, course):
        model = fit.model
        kept[course.best_epoch] = [np.array(keras.ops.convert_to_numpy(v)) for v in model.weights]
        keep(fit, course)

    monkeypatch.setattr(fitting, "average_epoch", noting)
    monkeypatch.setattr(fitting, "_keep_best", keeping)
    # Every epoch is the best: what is kept shows what was judged.
    losses = iter([0.9, 0.8, 0.7, 0.6])
    judge = fitting.binary_metrics
    monkeypatch.setattr(
        fitting, "binary_metrics", lambda *a, **k: judge(*a, **k) | {"log_loss": next(losses)}
    )
    train(config_of(epochs=4, swa=3), phantom_cache, tmp_path / "run")
    for epoch, of in {1: [1], 2: [2], 3: [2, 3], 4: [2, 3, 4]}.items():
        for place, array in enumerate(kept[epoch]):
            mean = np.mean([after[number][place].astype(float) for number in of], axis=0)
            np.testing.assert_allclose(array, mean, rtol=1e-5, atol=1e-7)
    assert any((one != two).any() for one, two in zip(kept[4], after[4], strict=True))


@pytest.mark.parametrize("fit", [{"ema": 0.8, "accumulate": 2}, {"swa": 2}], ids=["ema", "swa"])
def test_averages_are_resumed_bit_for_bit(phantom_cache, tmp_path, fit):
    whole = train(config_of(**fit), phantom_cache, tmp_path / "whole")
    run = interrupted_training(phantom_cache, tmp_path / "run", config_of(**fit), 2)
    resume(run, phantom_cache)
    assert history_of(run) == history_of(whole)
    assert digests_of(run) == digests_of(whole)


def test_averages_do_not_change_the_training(long_run, phantom_cache, tmp_path):
    for fit in ({"ema": 0.5}, {"swa": 3}):
        run = train(config_of(**fit), phantom_cache, tmp_path / next(iter(fit)))
        found, plain = history_of(run), history_of(long_run)
        assert [row["train_loss"] for row in found] == [row["train_loss"] for row in plain]
        assert found[-1]["valid_log_loss"] != plain[-1]["valid_log_loss"]
        last = "state/epoch-0003/model.weights.h5"
        assert read_weights(run / last).digest == read_weights(long_run / last).digest


def test_float16_averages_too(phantom_cache, tmp_path):
    import dataclasses

    config = dataclasses.replace(config_of(epochs=1, ema=0.9), precision="float16")
    run = train(config, phantom_cache, tmp_path / "run")
    kept = weights_of(run / "best.weights.h5")
    last = weights_of(run / "state" / "epoch-0001" / "model.weights.h5")
    assert any((kept[name] != last[name]).any() for name in kept)


BAD = [
    (["--ema", "0"], "fit.ema is 0.0; expected above 0"),
    (["--ema", "1"], "fit.ema is 1.0; expected above 0, at most 0.999999"),
    (["--ema", "-0.5"], "fit.ema is -0.5"),
    (["--ema", "nan"], "fit.ema is nan"),
    (["--ema", "much"], "'much' is not a valid float"),
    (["--swa", "0"], "fit.swa is 0; expected at least 2"),
    (["--swa", "1"], "fit.swa is 1; expected at least 2"),
    (["--swa", "-3"], "fit.swa is -3"),
    (["--swa", "nan"], "'nan' is not a valid int"),
    (["--swa", "5", "--epochs", "4"], "fit.swa is 5; expected at least 2, at most 4"),
    (["--swa", "2", "--ema", "0.9"], "fit.swa with fit.ema: both average"),
    (["--swa", "2", "--patience", "2"], "fit.swa with fit.patience: the last epochs are not known"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_averages_are_one_clear_line(phantom_cache_folder, tmp_path, options, message):
    command = ["train", "--cache", str(phantom_cache_folder), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 2
    assert message in next(line for line in done.output.splitlines() if line.startswith("Error: "))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fit", [{"ema": 0.9}, {"swa": 2}], ids=["ema", "swa"])
def test_other_backends_refuse_averages(monkeypatch, fit):
    """On jax, `predict` within a training takes the arrays that an average shares with it."""
    monkeypatch.setattr(recipe, "choose_backend", lambda asked: "jax")
    with pytest.raises(UsageError, match=r"\(ema, swa\) on the backend jax; they need torch"):
        recipe.Recipe.of(config_of(**fit))
    assert recipe.Recipe.of(config_of()).backend == "jax"


def test_too_few_epochs_for_an_average_are_refused(phantom_cache, tmp_path):
    run = train(config_of(epochs=2, swa=2), phantom_cache, tmp_path / "run")
    with pytest.raises(UsageError, match="1 more epochs of a run that averages its last 2"):
        extend(run, tmp_path / "new", 1)
    out = train_more(run, phantom_cache, tmp_path / "new", 2)
    assert len(history_of(out)) == 4


def test_the_first_average_is_the_weights_bit_for_bit():
    """Whatever stands in the average: more epochs bring that of the run before."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    settings = recipe.Recipe.of(config_of(epochs=4, swa=2)).training
    averaging.add_averages(model, settings)
    for average in averages_of(model):
        average.assign(np.full(average.shape, 1e4, np.float32))
    averaging.average_epoch(model, settings, 3)
    for average, weight in zip(averages_of(model), model.weights, strict=True):
        found, wanted = (keras.ops.convert_to_numpy(one) for one in (average, weight))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("best", "extended", "kept"),
    [
        (2, [], "the weights after epoch 2, no average."),
        (4, [], "the weights after epoch 4, the first of the epochs that are averaged."),
        (5, [], "the average of the weights after epochs 4 to 5."),
        (6, [], "the average of the weights after epochs 4 to 6."),
        (3, [{"epoch": 3}], "the average of the weights after epochs 1 to 3."),
        (3, [{"epoch": 3, "of": 5}], "the weights after epoch 3, the first of the epochs"),
        (2, [{"epoch": 3, "of": 5}], "the weights after epoch 2, no average."),
    ],
)
def test_the_report_says_which_weights_were_kept(best, extended, kept):
    settings = recipe.Recipe.of(config_of(epochs=6, swa=3)).training
    line = report._average_line(best, settings, {"extended": extended})
    assert line.startswith(f"Kept: {kept}")


def test_the_report_of_a_run_that_kept_no_average(phantom_cache, tmp_path, monkeypatch):
    losses, judge = iter([0.5, 0.8, 0.7]), fitting.binary_metrics
    monkeypatch.setattr(
        fitting, "binary_metrics", lambda *a, **k: judge(*a, **k) | {"log_loss": next(losses)}
    )
    run = train(config_of(swa=2), phantom_cache, tmp_path / "run")
    text = (run / "report.md").read_text()
    assert "Kept: the weights after epoch 1, no average." in text
    assert "average of the last" not in text


@pytest.mark.parametrize(("ema", "is_told"), [(0.999, True), (0.5, False)])
def test_a_moving_average_of_mostly_first_weights_is_told(phantom_cache, ema, is_told):
    """.999 to the power of few steps is near 1, .5 to that of 12 is not."""
    config = config_of(epochs=6, ema=ema, accumulate=2)
    plan = planning.plan_training(phantom_cache, config)
    steps = plan.total_steps // 2
    lines = planning.start_lines(recipe.Recipe.of(config, phantom_cache.size), plan)
    found = [line for line in lines if "moving average" in line]
    if not is_told:
        assert 0.5**steps < 0.1 and found == []
        return
    (line,) = found
    assert f"After all {steps} optimiser steps" in line
    assert f"(--ema 0.999) still has {0.999**steps:.0%} of those after the first step." in line
