"""The loader's worker processes: however one fails, it is noticed, named, and nothing is lost."""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from torch.utils.data import Dataset

from ich_keras import fitting
from ich_keras.cli import train_main
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data import loader
from ich_keras.data.batches import slice_batches
from ich_keras.data.epochs import EpochPlan
from ich_keras.data.loader import WORKER_TIMEOUT_SECONDS, CTLoader, own_errors
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.files import write_json
from ich_keras.models.presets import PRESETS, Preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights_file import read_weights
from ich_keras.run_folder import RunFolder
from ich_keras.training import train

SLOW = pytest.mark.slow
HANG_SECONDS = 300  # far more than any of it takes, far less than the time-out

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs signals"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


# The fork server imports this once, if no other test has started it: each worker starts at once.
multiprocessing.set_forkserver_preload(["ich_keras.data.loader"])

others: set[int] = set()  # processes of other tests


@pytest.fixture(autouse=True)
def no_hang():
    others.update(process.pid for process in multiprocessing.active_children())

    def stop(number, frame):
        raise AssertionError(f"it hung for {HANG_SECONDS} s")

    assert HANG_SECONDS < WORKER_TIMEOUT_SECONDS
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class OddError(Exception):
    """Cannot be made again from what it passes on."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def _fill_shared_memory():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return np.zeros(1_000_000)


def _raise(error):
    raise error


FAULTS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGBUS": lambda: os.kill(os.getpid(), signal.SIGBUS),
    "abort": os.abort,
    "os._exit": lambda: os._exit(3),
    "sys.exit": lambda: sys.exit(5),
    "stale": lambda: _raise(StaleError("shard 3 is damaged.", "Build it again.")),
    "usage": lambda: _raise(UsageError("brighten returned None.", "Return an array.")),
    "value": lambda: _raise(ValueError("not that")),
    "odd": lambda: _raise(OddError(1, 2)),
    "sleep": lambda: time.sleep(3600),
    "shared memory": _fill_shared_memory,
    "unpicklable": lambda: lambda: 1,
}


class Faulty(Dataset):
    """Batches of their own numbers; the second batch of an epoch may have a fault.

    Args:
        faults: of the first epochs; keys of FAULTS.
    """

    def __init__(self, *faults):
        self.faults = faults

    def __getitem__(self, key):
        epoch, indices = key
        if indices[0] == 2 and epoch < len(self.faults):
            fault = FAULTS[self.faults[epoch]]()
            if fault is not None:
                return fault
        return np.array([epoch, *indices], np.float32)


class DiesOnArrival(Faulty):
    def __setstate__(self, state):
        os._exit(1)


def loader_of(dataset, workers=1):
    return CTLoader(dataset, EpochPlan(np.arange(8), np.zeros(8, bool), 2), workers)


def numbers(batches):
    return [batch.tolist() for batch in batches]


def expected(epoch):
    return [[epoch, first, first + 1] for first in range(0, 8, 2)]


def children():
    """The worker processes that this test has, in the order in which they started."""
    found = [child for child in multiprocessing.active_children() if child.pid not in others]
    return sorted(found, key=lambda process: process.pid)


# Not fork: the threads of torch, which these tests have run, may hold a lock that stays locked.
@pytest.mark.parametrize(
    ("method", "workers"), [("spawn", 2), ("forkserver", 2), ("forkserver", 4)]
)
def test_however_workers_start_the_batches_are_the_same(
    phantom_cache, monkeypatch, method, workers
):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    settings = {"batch_size": 4, "seed": 5, "balance": True, "augment": "thesis"}
    wanted = slice_batches(phantom_cache, np.arange(40), **settings)
    monkeypatch.setattr(loader, "START_METHOD", method)
    found = slice_batches(phantom_cache, np.arange(40), workers=workers, **settings)
    for _ in range(2):  # epochs
        pairs = list(zip(wanted, found, strict=True))
        assert len(pairs) > workers
        for (x, y), (other_x, other_y) in pairs:
            np.testing.assert_array_equal(x.numpy(), other_x.numpy())
            np.testing.assert_array_equal(y.numpy(), other_y.numpy())


BATCH = r"batch 2 of 4 in epoch 1 \(samples 2, 3\)"


@pytest.mark.parametrize(
    ("fault", "how", "hint"),
    [
        ("SIGKILL", "was killed by SIGKILL", "ran out of memory"),
        ("os._exit", "ended with exit code 3", "loader_workers 0"),
        pytest.param("SIGTERM", "was killed by SIGTERM", "loader_workers 0", marks=SLOW),
        pytest.param("SIGBUS", "was killed by SIGBUS", "/dev/shm", marks=SLOW),
        pytest.param("abort", "was killed by SIGABRT", "loader_workers 0", marks=SLOW),
        pytest.param("sys.exit", "ended with exit code 5", "loader_workers 0", marks=SLOW),
    ],
)
def test_a_dead_worker_is_named_with_its_batch(fault, how, hint):
    with pytest.raises(EnvironmentProblem, match=rf"{how}, at work on {BATCH}\. ") as caught:
        list(loader_of(Faulty(fault)))
    assert hint in caught.value.hint
    assert caught.value.exit_code == 4
    assert children() == []


@SLOW
def test_a_dead_worker_is_noticed_while_another_is_at_work():
    # Batch 1 is awaited and never comes; the other worker dies making batch 2.
    with pytest.raises(EnvironmentProblem, match=rf"exit code 3, at work on {BATCH}"):
        list(loader_of(TwoFaults(), workers=2))
    assert children() == []


class TwoFaults(Dataset):
    def __getitem__(self, key):
        FAULTS["sleep" if key[1][0] == 0 else "os._exit"]()


def test_a_worker_that_dies_while_starting_points_to_the_guard():
    wanted = r"exit code 1, while it was starting; batch 1 of 4 in epoch 1 .* was awaited"
    with pytest.raises(EnvironmentProblem, match=wanted) as caught:
        list(loader_of(DiesOnArrival()))
    assert "if __name__ == '__main__':" in caught.value.hint


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=SLOW)])
def test_workers_that_die_between_passes_are_noticed_and_the_next_pass_works(workers):
    loader = loader_of(Faulty(), workers)
    assert numbers(loader) == expected(0)
    began = children()
    assert len(began) == workers
    for process in began:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    wanted = r"SIGKILL, between batches; batch 1 of 4 in epoch 2 \(samples 0, 1\) was awaited"
    with pytest.raises(EnvironmentProblem, match=wanted):
        next(iter(loader))
    assert numbers(loader) == expected(1)
    assert not {process.pid for process in began} & {process.pid for process in children()}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_keeps_its_kind_and_names_the_batch(workers):
    loader = loader_of(Faulty("stale", "usage", "value"), workers)
    wanted = [
        (StaleError, "shard 3 is damaged. Build it again."),
        (UsageError, "brighten returned None. Return an array."),
        (ValueError, "not that"),
    ]
    for epoch, (kind, message) in enumerate(wanted):
        loader.epoch = epoch
        batches = iter(loader)
        assert next(batches).tolist() == [epoch, 0, 1]
        with pytest.raises(kind) as caught:
            next(batches)
        assert str(caught.value) == message
        assert type(caught.value) is kind
        [note] = caught.value.__notes__
        assert note.startswith(f"This was batch 2 of 4 in epoch {epoch + 1} (samples 2, 3)")
        assert ("in _raise" in note) == (workers == 1)  # where it was raised
        assert loader.failure is caught.value
    loader.epoch = 3
    assert numbers(loader) == expected(3)
    assert len(children()) == workers


def test_what_cannot_be_sent_is_told():
    loader = loader_of(Faulty("odd", "unpicklable", "shared memory"))
    with pytest.raises(RuntimeError, match="OddError: 1 and 2") as caught:
        list(loader)
    assert "batch 2 of 4" in caught.value.__notes__[0]
    for epoch in (1, 2):
        loader.epoch = epoch
        batch = BATCH.replace("epoch 1", f"epoch {epoch + 1}")
        with pytest.raises(EnvironmentProblem, match=f"could not hand over {batch}: ") as problem:
            list(loader)
        assert "/dev/shm" in problem.value.hint


def test_a_worker_that_hangs_is_given_up():
    loader = loader_of(Faulty("sleep"))
    assert loader.timeout == WORKER_TIMEOUT_SECONDS
    batches = iter(loader)
    next(batches)  # the start takes longer than this test's time-out
    loader.timeout = 1
    with pytest.raises(EnvironmentProblem, match=f"gave no batch for 1 s, at work on {BATCH}"):
        next(batches)
    assert children() == []


def test_a_worker_that_is_stopped_is_given_up_whatever_it_has_finished():
    loader = loader_of(Faulty())
    batches = iter(loader)
    next(batches)
    time.sleep(0.5)  # for the next one to be finished
    loader.timeout = 1
    [process] = children()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(EnvironmentProblem, match="gave no batch for 1 s, at work on batch"):
        list(batches)
    assert children() == []


@pytest.fixture
def ctrl_c():
    """A shell lets its background jobs ignore Ctrl-C; this one does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_workers_and_the_next_pass_works():
    loader = loader_of(Faulty("sleep"))
    batches = iter(loader)
    next(batches)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert children() == []
    loader.epoch = 1
    assert numbers(loader) == expected(1)


def test_passes_that_are_abandoned_or_overlap_do_not_mix():
    loader = loader_of(Faulty(), workers=2)
    abandoned = [next(iter(loader)).tolist() for _ in range(5)]
    assert abandoned == [[0, 0, 1]] * 5
    slow = iter(loader)
    first = next(slow).tolist()
    assert numbers(loader) == expected(0)
    assert numbers(loader) == expected(1)
    assert [first, *numbers(slow)] == expected(0)
    assert len(children()) == 2


def test_workers_end_with_the_loader():
    loader = loader_of(Faulty(), workers=2)
    next(iter(loader))
    del loader
    assert children() == []


ORPHANS = """
import multiprocessing
from test_loader import Faulty, loader_of
if __name__ == "__main__":
    loader = loader_of(Faulty("sleep"), workers=2)
    batches = iter(loader)
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    next(batches)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    paths = [Path(__file__).parent, Path(fitting.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    while any(is_alive(pid) for pid in pids):
        time.sleep(0.05)


def is_alive(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # Without a process that waits for it, a dead one may stay as a zombie.
        state = Path(f"/proc/{pid}/stat")
        return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")
    return False


def exits(windows, seed):
    """An augmentation that ends its process."""
    os._exit(7)


def test_an_augmentation_that_exits_is_named_with_its_samples(phantom_cache):
    loader = slice_batches(
        phantom_cache, np.arange(12), batch_size=12, seed=0, augment=exits, workers=1
    )
    wanted = r"exit code 7, at work on batch 1 of 1 in epoch 1 \(samples (\d+, ){7}\d+ and 4 more\)"
    with pytest.raises(EnvironmentProblem, match=wanted):
        list(loader)


def test_an_error_that_somebody_wraps_is_raised_as_it_was():
    loader = loader_of(Faulty("stale"), workers=0)
    with pytest.raises(StaleError, match="shard 3"), own_errors(loader):
        try:
            list(loader)
        except StaleError as error:
            raise RuntimeError(f"PyFunc: {error}") from None
    with pytest.raises(KeyError), own_errors(loader):
        raise KeyError("somebody else's")


NARROW = "narrow-16"


@pytest.fixture
def narrow_preset(monkeypatch):
    monkeypatch.setitem(
        PRESETS, NARROW, Preset(ModelSpec(input_shape=(16, 16, 3), width=8), "narrow")
    )


def ich_train(*arguments):
    return CliRunner().invoke(train_main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=SLOW)])
def test_a_training_whose_worker_dies_keeps_its_state(
    narrow_preset, phantom_cache, phantom_cache_folder, tmp_path, monkeypatch, victim
):
    """Victim 0 is the worker of the training's loader, which starts first, 1 the validation's."""
    config = RunConfig(
        preset=NARROW,
        data=DataConfig(size=16, balance=True, loader_workers=1),
        fit=FitConfig(batch_size=16, epochs=2, learning_rate=1e-3),
        precision="float32",
        device="cpu",
    )
    write_json(tmp_path / "config.json", config.to_dict())
    alone = replace(config, data=replace(config.data, loader_workers=0))
    whole = train(alone, phantom_cache, tmp_path / "whole")
    run = tmp_path / "run"
    save_state = fitting.save_state

    def save_and_kill(*arguments):
        save_state(*arguments)
        process = children()[victim]
        os.kill(process.pid, signal.SIGKILL)
        process.join()

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "save_state", save_and_kill)
        result = ich_train(
            "--cache", phantom_cache_folder, "--out", run, "--config", tmp_path / "config.json"
        )
    assert result.exit_code == 4, result.output
    told = "Error: a worker process of the loader was killed by SIGKILL, between batches; batch 1"
    assert told in result.stderr
    assert "in epoch 2" in result.stderr
    assert f"To resume: ich-train --resume {run}" in result.stderr
    assert "Traceback" not in result.output
    assert RunFolder(run).is_interrupted
    assert len(pd.read_csv(run / "history.csv")) == 1

    result = ich_train("--resume", run)
    assert result.exit_code == 0, result.output
    best = [read_weights(folder / "best.weights.h5").digest for folder in (run, whole)]
    assert best[0] == best[1]
    same = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (run, whole)]
    pd.testing.assert_frame_equal(*same, check_exact=True)
