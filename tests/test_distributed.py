"""Several processes that train one network, against one process with the whole batches."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from one_fails import one_fails
from train_across import DUMP, TINY, in_float64

from ich_keras import environment
from ich_keras.cli import train_main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.epochs import EpochPlan
from ich_keras.data.loader import CTLoader
from ich_keras.distribution import (
    distribution_lines,
    require_agreement,
    require_distributable,
    require_same_statistics,
    samples_per_statistics,
)
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.keras_private import num_graph_breaks
from ich_keras.launching import run_ranks
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.presets import PRESETS
from ich_keras.models.spec import ModelSpec
from ich_keras.models.torch.distributed import Group, Share
from ich_keras.models.torch.function import FlatFunction
from ich_keras.models.torch.operations import Across
from ich_keras.models.torch.step import distribute
from ich_keras.models.torch.synchronised import synchronised_batch_norm
from ich_keras.ranks import Rank, this_rank
from ich_keras.recipe import Recipe
from ich_keras.training import train

HERE = Path(__file__).parent
PROGRAM = HERE / "train_across.py"
SECONDS = 300  # only against hanging
RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
OPTIONS = ["--preset", "tiny", "--epochs", "2", "--batch-size", "8", "--size", "32", "--balance"]
OPTIONS += ["--precision", "float32", "--device", "cpu"]


def a_recipe(batch_size: int = 8, norm: str = "batch", **fit) -> Recipe:
    data, fit = DataConfig(size=32), FitConfig(batch_size=batch_size, **fit)
    return Recipe.of(RunConfig(preset="resnet10_2d", norm=norm, device="cpu", data=data, fit=fit))


def start(*command, **variables: str) -> subprocess.Popen:
    """Start a program that takes part in, or starts, a training by several processes."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), **variables}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    output, errors = process.communicate(timeout=SECONDS)
    return process.returncode, output, errors


def run_two(*options, **variables: str) -> tuple[int, str, str]:
    return end(start(PROGRAM, *OPTIONS, *options, "--gpus", "2", **variables))


# Which process this is


def test_a_process_is_alone_unless_the_environment_says_otherwise():
    assert this_rank({}) == Rank() == this_rank({"WORLD_SIZE": "1", "RANK": "7"})
    assert this_rank(RANK | {"LOCAL_RANK": "0"}) == Rank(1, 2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is '2', but RANK is not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "but MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "2"}, "RANK is '2'; expected a whole number from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'; expected"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a whole number from 1 to"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK is '1.0'; expected"),
    ],
)
def test_half_an_environment_is_refused(change, message):
    with pytest.raises(UsageError, match=message) as refused:
        this_rank(RANK | change)
    assert "torchrun" in refused.value.hint


@pytest.mark.parametrize("of", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 30])
def test_parts_are_the_whole_in_order_and_nearly_equal(of, count):
    parts = [list(range(count))[Rank(number, of).part(count)] for number in range(of)]
    assert [number for part in parts for number in part] == list(range(count))
    sizes = list(map(len, parts))
    assert max(sizes) - min(sizes) <= 1


# What each process is given


class Numbers(torch.utils.data.Dataset):
    """Batches that are the numbers of their samples; never an empty one."""

    def __getitem__(self, key):
        epoch, indices = key
        assert len(indices)
        return np.asarray(indices) + 100 * epoch, np.asarray(indices)


@pytest.mark.parametrize("seed", [None, 4])
def test_the_loaders_of_all_processes_give_the_batches_of_one(seed):
    plan = EpochPlan(np.arange(13), np.zeros(13, bool), batch_size=6, seed=seed)

    def batches(rank: Rank, workers: int = 0) -> list:
        loader = CTLoader(Numbers(), plan, workers)
        loader.rank = rank
        loader.epoch = 1
        return [[part.tolist() for part in batch] for batch in loader]

    whole = batches(Rank())
    parts = [batches(Rank(number, 2)) for number in (0, 1)]
    assert [len(batch[0]) for batch in parts[0]] == [3, 3, 0]
    assert [len(batch[1]) for batch in parts[1]] == [3, 3, 1]
    for batch, one, two in zip(whole, *parts, strict=True):
        assert [one[0] + two[0], one[1] + two[1]] == batch
    if seed is not None:
        assert batches(Rank(0, 2), workers=1) == parts[0]


# What is refused, and what is said


@pytest.mark.parametrize(
    ("recipe", "of", "message", "hint"),
    [
        ({}, 3, "a batch of 8 cannot be cut into equal parts for 3", "take 9, for instance"),
        (
            {"batch_size": 1, "accumulate": 8},
            4,
            "a batch of 1 cannot be cut",
            "take 4 --accumulate 2, for instance",
        ),
        ({"step": "stock"}, 2, "step 'stock' with 2 processes", "Leave out --step"),
    ],
)
def test_what_several_processes_cannot_train_is_refused(recipe, of, message, hint):
    recipe = a_recipe(**recipe)
    require_distributable(recipe, Rank())
    with pytest.raises(UsageError, match=message) as refused:
        require_distributable(recipe, Rank(0, of))
    assert hint in refused.value.hint


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_other_backends_are_refused(backend):
    recipe = replace(a_recipe(), backend=backend)
    with pytest.raises(UsageError, match=f"2 processes on the backend {backend}; several train on"):
        require_distributable(recipe, Rank(0, 2))


def test_the_whole_batch_and_the_statistics_are_said():
    assert distribution_lines(a_recipe(), Rank()) == []
    first, second = distribution_lines(a_recipe(learning_rate=1e-3), Rank(0, 4))
    assert "each batch of 8 is cut into parts of 2; the learning rate 0.001" in first
    assert "each process's 2 samples" in second and "--batch-norm synchronised" in second
    *_, second = distribution_lines(a_recipe(batch_norm="synchronised"), Rank(0, 4))
    assert "statistics of the whole batch" in second
    assert len(distribution_lines(a_recipe(norm="group"), Rank(0, 4))) == 1


def test_batch_normalisation_needs_samples_in_each_process():
    assert samples_per_statistics(a_recipe(), Rank(0, 4)) == 2
    assert samples_per_statistics(a_recipe(batch_norm="synchronised"), Rank(0, 4)) == 8
    assert samples_per_statistics(a_recipe(norm="group"), Rank(0, 4)) == 8


def test_another_number_of_processes_resumes_only_where_it_changes_nothing():
    for before, now in ((2, 1), (1, 2), (2, 4)):
        require_same_statistics({"processes": before}, a_recipe(norm="group"), Rank(0, now))
        synchronised = a_recipe(batch_norm="synchronised")
        require_same_statistics({"processes": before}, synchronised, Rank(0, now))
        with pytest.raises(StaleError, match=f"began in {before} process.*now there"):
            require_same_statistics({"processes": before}, a_recipe(), Rank(0, now))
    require_same_statistics({}, a_recipe(), Rank())  # of an older version
    with pytest.raises(StaleError) as refused:
        require_same_statistics({}, a_recipe(), Rank(0, 2))
    assert refused.value.hint == "Resume it in one process, without --gpus."


def test_processes_with_other_settings_are_refused_by_name():
    group = SimpleNamespace(gather=lambda facts: [facts, facts, facts | {"labels": "other"}])
    with pytest.raises(UsageError, match="process 2 of the training has another labels than"):
        require_agreement(group, {"recipe": {}, "labels": "same"})
    require_agreement(SimpleNamespace(gather=lambda facts: [facts] * 3), {"labels": "same"})


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--gpus", "2"], 2, "the demo runs in one process"),
        (["--gpus", "2", "--cache", "CACHE", "--plan"], 2, "--plan runs in one process"),
        (["--gpus", "2", "--cache", "CACHE", "--backend", "jax"], 2, "on the backend jax; several"),
        (["--gpus", "0", "--cache", "CACHE"], 2, "--gpus"),
        (["--cache", "CACHE", "--batch-norm", "global"], 2, "expected one of per-process, sync"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(options, code, message):
    result = CliRunner().invoke(train_main, options)
    assert result.exit_code == code
    assert message in result.output


@pytest.mark.parametrize(
    ("found", "message", "hint"),
    [
        (0, "--gpus 2: torch finds 0.", "Leave it out, or use --device cpu for 2 processes"),
        (1, "--gpus 2: torch finds 1.", "Leave it out, or use --device cpu for 2 processes"),
    ],
)
def test_more_processes_than_gpus_are_refused(monkeypatch, found, message, hint):
    monkeypatch.delenv("KERAS_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(environment, "choose_device", lambda name: "cuda" if found else "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    result = CliRunner().invoke(train_main, ["--gpus", "2", "--cache", "CACHE"])
    assert result.exit_code == 4
    assert message in result.output and hint in result.output


def test_gpus_and_torchrun_must_agree(monkeypatch):
    for name, value in (RANK | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(train_main, ["--gpus", "4", "--cache", "CACHE"])
    assert result.exit_code == 2
    assert "--gpus 4 in one of 2 processes that were started already." in result.output


@pytest.mark.parametrize(
    ("count", "visible", "taken"),
    [(4, None, "1"), (2, "3,5", "5"), (2, "GPU-a, GPU-b", " GPU-b"), (1, "7", "7"), (0, "", "")],
)
def test_each_process_sees_its_own_gpu(monkeypatch, count, visible, taken):
    monkeypatch.setattr(environment, "_has_own_gpu", False)
    monkeypatch.setattr(environment, "loaded_backend", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for _ in range(2):  # the second time there is nothing left to take
        environment._take_own_gpu(Rank(1, 2, 1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(environment, "_has_own_gpu", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(EnvironmentProblem, match="process 4 of this machine has no GPU: torch fin"):
        environment._take_own_gpu(Rank(4, 8, 4))
    monkeypatch.setattr(environment, "loaded_backend", lambda: "torch")
    with pytest.raises(EnvironmentProblem, match="Keras was imported before this process took"):
        environment._take_own_gpu(Rank(1, 8, 1))


# The processes themselves


def test_the_steps_of_two_processes_are_those_of_one():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = [RANK | {"RANK": n, "LOCAL_RANK": n, "MASTER_PORT": port} for n in "01"]
    started = [start(HERE / "steps_across.py", **variables) for variables in ranks]
    ended = [end(process) for process in started]
    assert [code for code, _, _ in ended] == [0, 0], ended
    told = json.loads(ended[0][1])
    # Batch statistics of its own samples alone make it another training.
    assert told.pop("batch, per process")["weights"] > 1e-3
    assert len(told) == 7
    for case, differences in told.items():
        assert differences["weights"] < 1e-9, case
        assert differences["loss"] < 1e-6, case  # Keras keeps it in float32
        assert differences["alike"], case


@pytest.fixture
def oracle(phantom_cache, tmp_path, monkeypatch) -> dict[str, np.ndarray]:
    """The weights that one process trains, in float64."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    in_float64(str(tmp_path / "one.npz"), monkeypatch.setattr)
    config = RunConfig(
        preset="tiny",
        device="cpu",
        precision="float32",
        data=DataConfig(size=32, balance=True),
        fit=FitConfig(batch_size=8, epochs=2, batch_norm="synchronised"),
    )
    train(config, phantom_cache, tmp_path / "one")
    return dict(np.load(tmp_path / "one.npz"))


def test_a_training_in_two_processes_is_that_of_one(phantom_cache_folder, oracle, tmp_path):
    options = ["--cache", phantom_cache_folder, "--out", tmp_path / "two"]
    options += ["--batch-norm", "synchronised"]
    run_two(*options, **{DUMP: str(tmp_path / "two.npz")})
    together = np.load(tmp_path / "two.npz")
    assert set(together) == set(oracle)
    assert max(np.abs(together[name] - oracle[name]).max() for name in oracle) < 1e-9


def states(run: Path) -> dict[str, dict[str, np.ndarray]]:
    """The last state: weights, and what the optimiser remembers."""
    import h5py

    weights: dict[str, np.ndarray] = {}
    with h5py.File(run / "state" / "epoch-0002" / "model.weights.h5") as file:
        file.visititems(
            lambda name, thing: (
                weights.update({name: thing[()]}) if isinstance(thing, h5py.Dataset) else None
            )
        )
    return {"weights": weights, "optimiser": dict(np.load(run / "state/epoch-0002/variables.npz"))}


def test_a_killed_process_ends_all_and_the_training_resumes(phantom_cache_folder, tmp_path):
    # Uninterrupted, as torchrun starts it.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--cache", phantom_cache_folder, "--seed", "3"]
    whole = start(*torchrun, PROGRAM, *OPTIONS, *options, "--out", tmp_path / "whole")
    # At the same time: process 1 is killed at the end of its second epoch.
    killed = start(
        PROGRAM, *OPTIONS, *options, "--out", tmp_path / "run", "--gpus", "2", FAIL="kill"
    )
    code, output, errors = end(killed)
    assert code == 4
    assert "Error: process 1 of the 2 that train was killed by SIGKILL." in errors
    assert f"To resume: ich-train --resume {tmp_path / 'run'} --gpus 2" in errors
    assert "Traceback" not in errors
    assert output.count("epoch 1/2") == 1 and "epoch 2/2" not in output
    code, output, errors = end(whole)
    assert code == 0, errors
    # One process writes, and one speaks.
    assert output.count("2 processes: each batch of 8 is cut into parts of 4") == 1
    assert [output.count(f"epoch {n}/2: training loss") for n in (1, 2)] == [1, 1]
    assert output.count("Run folder:") == 1

    alone = CliRunner().invoke(train_main, ["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert alone.exit_code == 6
    assert "the training began in 2 processes, now there is 1" in alone.output
    assert "Resume it with --gpus 2." in alone.output

    resume = ["--resume", tmp_path / "run", "--gpus", "2"]
    code, output, errors = end(start(PROGRAM, *resume))
    assert code == 0, errors
    assert "Resuming after epoch 1 of 2" in output
    assert "Different from the original environment" not in output
    resumed, uninterrupted = states(tmp_path / "run"), states(tmp_path / "whole")
    for kind, arrays in uninterrupted.items():
        assert set(resumed[kind]) == set(arrays) and arrays
        for name, array in arrays.items():
            assert np.array_equal(resumed[kind][name], array), (kind, name)
    one, two = (pd.read_csv(tmp_path / name / "history.csv") for name in ("run", "whole"))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    assert not list(tmp_path.rglob("*.partial-*"))


@pytest.mark.slow
def test_an_error_of_one_process_is_told_once_and_ends_all(phantom_cache_folder, tmp_path):
    options = ["--cache", phantom_cache_folder, "--out", tmp_path / "run"]
    code, _, errors = run_two(*options, FAIL="raise")
    assert code == 4
    assert errors.count("Error: ") == 1
    assert "Error: process 1 of 2: the disk is on fire.\nHint: Put it out." in errors


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_by_the_first(phantom_cache_folder, tmp_path):
    options = ["--cache", phantom_cache_folder, "--out", tmp_path / "run"]
    code, _, errors = run_two(*options, "--learning-rate", "1e30")
    assert code == 5
    assert errors.count("Error: ") == 1 and "process" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_ends_all_when_one_is_killed(phantom_cache_folder, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*OPTIONS, "--cache", phantom_cache_folder, "--out", tmp_path / "run"]
    code, output, errors = end(start(*torchrun, PROGRAM, *options, FAIL="kill"))
    assert code == 1  # torchrun's own
    assert "SIGKILL" in errors and f"To resume: ich-train --resume {tmp_path / 'run'}" in errors
    assert "epoch 2/2" not in output


@pytest.mark.slow
def test_the_others_wait_while_the_first_indexes_and_caches(phantom_folder, tmp_path):
    files = ["--dicom", phantom_folder / "images", "--labels", phantom_folder / "stage_2_train.csv"]
    out = tmp_path / "run"
    command = ["-m", "ich_keras.cli.train", *files, "--out", out, "--gpus", "2"]
    options = ["--preset", "resnet10_2d", "--epochs", "1", "--batch-size", "8", "--size", "32"]
    options += ["--device", "cpu", "--limit-series", "12", "--workers", "1"]
    code, output, errors = end(start(*command, *options))
    assert code == 0, errors
    assert output.count("Found ") == 1 and output.count("Run folder: ") == 1
    assert "RuntimeWarning" not in errors
    assert (out / "report.md").is_file() and (tmp_path / "run-cache").is_dir()


def test_the_exit_code_is_that_of_the_process_that_failed():
    assert run_ranks(2, int, "0") == 0
    assert run_ranks(2, one_fails, 3) == 3
    assert not multiprocessing.active_children()  # the other one has been ended


# Batch normalisation over processes, in one


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("shape", [(6, 8, 5, 5), (6, 8, 3, 5, 5)])
def test_synchronised_normalisation_is_that_of_torch(shape, dtype, rounding):
    group = SimpleNamespace(rank=Rank(), share=Share(0, 6, 6), add_up=lambda sums: sums)
    wide = torch.promote_types(dtype, torch.float32)
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=torch.float64).mul(2).add(3).to(dtype)
    direction = torch.arange(values.numel()).reshape(shape).sin()

    def results(normalise) -> list[torch.Tensor]:
        x = values.clone().requires_grad_()
        scale = torch.linspace(0.5, 2, 8, dtype=wide).requires_grad_()
        shift = torch.linspace(-1, 1, 8, dtype=wide).requires_grad_()
        running = torch.zeros(8, dtype=wide), torch.ones(8, dtype=wide)
        y = normalise(x, running, scale, shift)
        (y.to(torch.float64) * direction).sum().backward()
        return [y.detach(), x.grad, scale.grad, shift.grad, *running]

    ours = results(lambda x, r, *both: synchronised_batch_norm(x, r, *both, 0.1, 1e-5, group))
    torchs = results(lambda x, r, *both: F.batch_norm(x, *r, *both, True, 0.1, 1e-5))
    for one, two in zip(ours, torchs, strict=True):
        assert one.dtype is two.dtype and one.stride() == two.stride()
        torch.testing.assert_close(one, two, rtol=rounding, atol=rounding)


def test_a_channel_far_from_zero_keeps_its_variance():
    group = SimpleNamespace(rank=Rank(), share=Share(0, 64, 64), add_up=lambda sums: sums)
    x = torch.randn((64, 1, 8, 8), generator=torch.Generator().manual_seed(0)) + 1e4
    mean, variance = torch.zeros(1), torch.zeros(1)
    scale, shift = torch.ones(1), torch.zeros(1)
    synchronised_batch_norm(x, (mean, variance), scale, shift, 1.0, 1e-5, group)
    # As a mean of squares less a squared mean it would be off by whole numbers.
    torch.testing.assert_close(variance, x.double().var().float().reshape(1), rtol=1e-3, atol=0)


def test_a_compiled_training_function_has_no_breaks():
    group = Group(Rank(1, 2, 1), None)
    group.share = Share(4, 4, 8)
    model = classifier(ModelSpec((32, 32, 3), depth=10, width=8), output="logits")
    function = FlatFunction(model, True, across=Across(group, synchronised=False))
    assert num_graph_breaks(function, torch.zeros(4, 32, 32, 3), function.tensors()) == 0


def test_what_the_steps_of_several_processes_do_not_cover_is_refused():
    group = Group(Rank(0, 2), None)
    model = classifier(ModelSpec((32, 32, 3), depth=10, width=8), output="logits")
    model.compile("adam", "mse")
    with pytest.raises(UsageError, match="only on the fast steps, with the mean of"):
        distribute(model, group, False)
    compile_classifier(model, step="stock")
    with pytest.raises(UsageError, match="only on the fast steps"):
        distribute(model, group, False)
    compile_classifier(model)
    distribute(model, group, False)
    x, y = np.zeros((4, 32, 32, 3), np.float32), np.zeros((4, 6), np.float32)
    with pytest.raises(UsageError, match="no sample weights and no class weights"):
        model.train_on_batch(x, y, sample_weight=np.ones(4))
    model.run_eagerly = True
    with pytest.raises(UsageError, match="run_eagerly=True: several processes train on the fast"):
        model.fit(x, y, verbose=0)


# What is judged and when a training ends, in all processes alike


def history_of(run: Path) -> pd.DataFrame:
    return pd.read_csv(run / "history.csv").drop(columns="seconds")


@pytest.mark.parametrize(
    "options",
    [
        ["--patience", "1", "--learning-rate", "0.3", "--ema", "0.5"],
        ["--swa", "2", "--loss", "focal", "--positive-weight", "any=3"],
    ],
    ids=["patience and ema", "swa and focal"],
)
def test_two_processes_judge_and_stop_as_one(phantom_cache_folder, tmp_path, monkeypatch, options):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    command = ["--cache", str(phantom_cache_folder), *OPTIONS, "--epochs", "4", *options]
    command += ["--limit-series", "14", "--augment", "none", "--batch-norm", "synchronised"]
    done = CliRunner().invoke(train_main, [*command, "--out", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    code, output, errors = end(start(PROGRAM, *command, "--out", tmp_path / "two", "--gpus", "2"))
    assert code == 0, errors
    one, two = history_of(tmp_path / "one"), history_of(tmp_path / "two")
    assert ("Stopped after epoch" in output) == ("Stopped after epoch" in done.output)
    assert ("Stopped after epoch" in output) == ("--patience" in options)
    assert list(one["epoch"]) == list(two["epoch"])
    if "--patience" not in options:  # at such a learning rate, rounding grows
        np.testing.assert_allclose(one, two, rtol=0.02)
