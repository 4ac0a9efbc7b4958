"""Atomic writing, locks, errors, configuration, environment, and what importing costs."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ich_keras import disk, errors, files
from ich_keras.config import RunConfig
from ich_keras.ct.rejects import RejectedFile
from ich_keras.environment import choose_backend, choose_device, decoders, versions
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError
from ich_keras.processes import map_ahead
from ich_keras.recipe import DEFAULT_RATES


class Crash(Exception):
    pass


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.atomic_write(path, "one")
    files.atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("moment", ["in the block", "verify", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.txt"
    files.atomic_write(path, "old")

    def crash(*_):
        raise Crash

    if moment == "replace":
        monkeypatch.setattr(files, "replace", crash)
    with (
        pytest.raises(Crash),
        files.atomic_path(path, verify=crash if moment == "verify" else None) as temporary,
    ):
        temporary.write_text("half of the n")
        if moment == "in the block":
            raise Crash
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": None, "y": [1.5, "é"]})
    assert files.read_json(path) == {"x": None, "y": [1.5, "é"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path)["y"] == [1.5, "é"]
    path.write_text('{"x": ')
    with pytest.raises(StaleError, match="not valid JSON"):
        files.read_json(path)
    with pytest.raises(StaleError, match="does not exist"):
        files.read_json(tmp_path / "b.json")


def test_fingerprints_do_not_depend_on_the_order_of_keys():
    assert files.fingerprint({"a": 1, "b": 2}) == files.fingerprint({"b": 2, "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert files.require_absent(tmp_path / "none") == tmp_path / "none"
    (tmp_path / "empty").mkdir()
    files.require_absent(tmp_path / "empty")
    for name in ("full", "full/a", "link"):
        with pytest.raises(UsageError, match="already exists; nothing is overwritten"):
            files.require_absent(tmp_path / name)


def test_free_disk_is_checked(tmp_path):
    disk.require_free(tmp_path / "not" / "yet", 1)
    with pytest.raises(EnvironmentProblem, match="are needed"):
        disk.require_free(tmp_path, 2**60)


def test_a_lock_keeps_other_processes_out_and_ends_with_its_process(tmp_path):
    program = (
        "import sys, time; from ich_keras.files import lock\n"
        "with lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(StaleError, match="locked by another process"),
        files.lock(tmp_path / "lock"),
    ):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with files.lock(tmp_path / "lock"):
        pass


def test_errors_carry_their_exit_codes_and_hints():
    expected = {
        errors.UsageError: 2,
        errors.DataError: 3,
        errors.EnvironmentProblem: 4,
        errors.DivergedError: 5,
        errors.StaleError: 6,
    }
    for kind, code in expected.items():
        assert kind("what", "do").exit_code == code
        assert str(kind("what.", "Do.")) == "what. Do."


def test_a_rejected_file_survives_the_way_back_from_a_worker():
    reject = RejectedFile("TRUNCATED", "8 of 16 bytes", "Copy it again.")
    copy = pickle.loads(pickle.dumps(reject))
    assert (copy.code, copy.detail, copy.hint) == ("TRUNCATED", "8 of 16 bytes", "Copy it again.")
    with pytest.raises(KeyError, match="unknown reject code 'OOPS'"):
        RejectedFile("OOPS", "")


def test_config_round_trip():
    config = RunConfig.from_dict({"seed": 3, "fit": {"epochs": 2, "weight_decay": 1}})
    assert config.fit.weight_decay == 1.0
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("weights", "expected"), [(None, 3e-4), ("a.weights.h5", 1e-5)])
def test_default_learning_rates_are_the_thesis_ones(weights, expected):
    assert DEFAULT_RATES[RunConfig(weights=weights).weights is None] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sede": 1}, "unknown key 'sede'. Did you mean 'seed'"),
        ({"fit": {"epoch": 1}}, "unknown key 'fit.epoch'. Did you mean 'epochs'"),
        ({"seed": "1"}, "seed is '1'; expected int"),
        ({"seed": True}, "seed is True; expected int"),
        ({"data": {"limit_series": 1.5}}, "data.limit_series is 1.5; expected int or null"),
        ({"data": 3}, "data is 3; expected an object"),
        ({"fit": {"batch_size": -3}}, "fit.batch_size is -3; expected at least 1"),
        ({"fit": {"learning_rate": float("inf")}}, "learning_rate is inf"),
        ({"fit": {"loss": "mse"}}, "fit.loss is 'mse'; expected one of bce, rsna"),
        ({"preset": "resnet18"}, "no preset is called 'resnet18'"),
        ([], r"the file is \[\]; expected an object"),
    ],
)
def test_bad_configs_are_refused(content, message):
    with pytest.raises(UsageError, match=message):
        RunConfig.from_dict(content)


def run_python(program: str, **environment) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "ICH_TRACEBACK")}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, **environment},
    )


HEAVY = "[m for m in ('keras', 'torch', 'albumentations', 'sklearn', 'pandas') if m in sys.modules]"


@pytest.mark.parametrize(
    "program",
    [
        "import sys, ich_keras",
        "import sys; from click.testing import CliRunner; from ich_keras.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(main, ['train', '--help']).exit_code == 0",
        "import sys, weights_convert",
        "import sys; from click.testing import CliRunner; from weights_convert.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(main, ['list']).exit_code == 0",
    ],
)
def test_importing_and_help_are_light(program):
    done = run_python(f"{program}\nprint({HEAVY})")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "module", ["ich_keras.data.batches", "ich_keras.data.cache.cache", "ich_keras.ct.series"]
)
def test_what_worker_processes_import_leaves_keras_out(module):
    done = run_python(f"import sys, {module}; print('keras' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_torch_is_the_backend_unless_the_environment_says_otherwise():
    program = "import os, ich_keras; print(os.environ['KERAS_BACKEND'])"
    assert run_python(program).stdout.strip() == "torch"
    assert run_python(program, KERAS_BACKEND="jax").stdout.strip() == "jax"


def test_another_backend_is_refused_once_keras_is_loaded():
    program = "import ich_keras, keras; from ich_keras.environment import *; choose_backend('jax')"
    assert "already loaded with the backend torch; jax was asked for" in run_python(program).stderr


@pytest.mark.parametrize(("name", "message"), [("mxnet", "expected one of torch, jax"), (3, "3;")])
def test_unknown_backends_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        choose_backend(name)


def test_an_absent_backend_names_the_extra():
    program = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'tensorflow' else find(n, *a)\n"
        "from ich_keras.environment import choose_backend; choose_backend('tensorflow')"
    )
    done = run_python(program)
    assert "the backend tensorflow is not installed" in done.stderr
    assert "pip install 'ich_keras[tensorflow]'" in done.stderr


def test_devices(monkeypatch):
    program = "from ich_keras.environment import *; print(choose_device({!r}))"
    assert run_python(program.format("cpu")).stdout.strip() == "cpu"
    with pytest.raises(UsageError, match="device 'gpu'"):
        choose_device("gpu")


@pytest.mark.parametrize(
    ("asked", "variable", "device", "left"),
    [
        ("auto", None, "cuda", None),
        ("auto", "", "cuda", "cuda"),  # Keras fails on an empty one
        ("auto", "cpu", "cpu", "cpu"),
        ("auto", "cuda:0", "cuda", "cuda"),
        ("cuda", "cpu", "cuda", "cuda"),
        ("cpu", "cuda", "cpu", "cpu"),
    ],
)
def test_a_device_that_keras_was_given_already(asked, variable, device, left, monkeypatch):
    """As if there were a GPU: what is said must be where Keras then runs."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.delenv("KERAS_TORCH_DEVICE", raising=False)
    if variable is not None:
        monkeypatch.setenv("KERAS_TORCH_DEVICE", variable)
    program = (
        "import os; from ich_keras import environment as e; e.why_no_cuda = lambda backend: ''\n"
        "e.has_bfloat16 = lambda device: True\n"
        "before = os.environ.get('KERAS_TORCH_DEVICE')\n"
        "print(dict(row[::2] for row in e.doctor())['device'])\n"
        "assert os.environ.get('KERAS_TORCH_DEVICE') == before\n"
        f"print(e.choose_device({asked!r}), os.environ.get('KERAS_TORCH_DEVICE'))"
    )
    told = "cpu (KERAS_TORCH_DEVICE=cpu)" if variable == "cpu" else "cuda"
    assert run_python(program).stdout.splitlines() == [told, f"{device} {left}"]


def test_a_device_of_keras_own_variable_that_is_none(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    program = "from ich_keras import environment as e; e.why_no_cuda = lambda backend: 'none'\n"
    for value, message in (
        ("meta", "UsageError: KERAS_TORCH_DEVICE=meta; expected cpu or cuda."),
        ("cuda:1", "UsageError: KERAS_TORCH_DEVICE=cuda:1; expected cpu or cuda."),
        ("cuda:0", "EnvironmentProblem: KERAS_TORCH_DEVICE=cuda:0: none"),
    ):
        monkeypatch.setenv("KERAS_TORCH_DEVICE", value)
        assert message in run_python(f"{program}e.choose_device()").stderr
        told = run_python(f"{program}print(*[row for row in e.doctor() if not row[1]])").stdout
        assert f"'device', False, 'KERAS_TORCH_DEVICE={value}" in told, told
        if value.startswith("cuda"):
            assert message in run_python(f"{program}e.choose_device('cuda')").stderr
        # Who asks for the processor gets it.
        assert run_python(f"{program}print(e.choose_device('cpu'))").stdout.strip() == "cpu"


def test_threads_follow_the_variable_that_torch_follows(monkeypatch):
    from ich_keras.processes import usable_cores, usable_threads

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_threads() == usable_cores() >= 1
    for value, threads in (("3", 3), ("3, 2", 3), ("0", usable_cores()), ("x", usable_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert usable_threads() == threads


def test_a_new_folder_is_made_before_the_work(tmp_path):
    from ich_keras.files import new_folder

    with new_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        (folder / "c").touch()
    with pytest.raises(UsageError, match="already exists"), new_folder(folder):
        pytest.fail("not reached")
    with pytest.raises(KeyError), new_folder(tmp_path / "d" / "e" / "f"):
        raise KeyError
    assert not (tmp_path / "d").exists()
    with pytest.raises(KeyError), new_folder(tmp_path / "a" / "g" / "h"):
        raise KeyError
    long = tmp_path / "a" / "g" / ("h" * 300)
    with pytest.raises(EnvironmentProblem, match="cannot be created"), new_folder(long):
        pytest.fail("not reached")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(KeyError), new_folder(tmp_path / "e") as kept:
        (kept / "f").touch()
        raise KeyError
    assert (tmp_path / "e" / "f").exists()
    below = folder / "c" / "g"
    with pytest.raises(EnvironmentProblem, match="cannot be created: Not a dir"), new_folder(below):
        pytest.fail("not reached")


def test_cuda_says_why_it_is_not_there():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: nothing to complain about")
    done = run_python("from ich_keras.environment import *; choose_device('cuda')")
    assert "EnvironmentProblem: --device cuda: torch" in done.stderr
    assert "build without CUDA" in done.stderr or "no usable GPU" in done.stderr


def test_the_environment_is_told():
    assert versions()["numpy"]
    assert versions()["pydicom"]
    assert decoders()["RLE Lossless"] is True


def test_hdf5plugin_is_an_extra():
    program = (
        "import importlib.metadata as m; from ich_keras import environment as e\n"
        "find = m.version\n"
        "def version(name):\n"
        "    if name == 'hdf5plugin': raise m.PackageNotFoundError(name)\n"
        "    return find(name)\n"
        "m.version = version\n"
        "print(*[row[1:] for row in e.doctor() if row[0] == 'hdf5plugin'])"
    )
    done = run_python(program)
    assert done.stdout.startswith("(True, "), done.stderr
    assert "not installed (only caches compressed with blosc2 need it" in done.stdout
    assert "pip install 'ich_keras[compression]'" in done.stdout


def test_public_names_exist():
    import ich_keras

    for name in ich_keras.__all__:
        if name.startswith("__"):
            continue
        value = getattr(ich_keras, name)
        assert callable(value) or isinstance(value, (str, tuple)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ich_keras.nothing


@pytest.mark.skipif(os.name == "nt", reason="Windows locks without fcntl")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_holds_none(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_told_of_no_locks", [])
    no_locks = re.escape(f"the file system of {tmp_path} has no locks: make sure that nothing else")
    with pytest.warns(errors.IchWarning, match=no_locks) as told:
        with files.lock(tmp_path / "lock") as one, files.lock(tmp_path / "lock") as other:
            assert (one, other) == (False, False)
        with files.lock(tmp_path / "elsewhere"):
            pass
    assert len(told) == 1  # once in a process
    (tmp_path / "elsewhere").unlink(missing_ok=True)
    # Not the marker of a lock in its place: a crash would leave that behind.
    assert [path.read_bytes() for path in tmp_path.iterdir()] in ([], [b""])
    number = errno.EWOULDBLOCK
    with (
        pytest.raises(StaleError, match="lock is locked by another"),
        files.lock(tmp_path / "lock"),
    ):
        pytest.fail("not reached")
    number = errno.EIO  # neither held nor without locks: told as it is
    with pytest.raises(OSError, match="Input/output error"), files.lock(tmp_path / "lock"):
        pytest.fail("not reached")


def test_a_lock_has_one_holder_in_a_process(tmp_path):
    path = tmp_path / "folder" / "lock"

    def holds() -> bool:
        try:
            with files.lock(path):
                return True
        except StaleError:
            return False

    with ThreadPoolExecutor(1) as other_thread:
        with files.lock(path):
            assert not holds()
            assert not other_thread.submit(holds).result()
        assert holds()
        assert other_thread.submit(holds).result()
    with pytest.raises(KeyError), files.lock(path):
        raise KeyError
    assert holds()


def test_a_lock_survives_the_removal_of_its_file(tmp_path):
    """A build takes its lock file away before it lets go; a failed training its whole folder."""
    path = tmp_path / "folder" / "lock"
    with files.lock(path):
        path.unlink()
        path.parent.rmdir()
    with files.lock(path):
        assert path.exists()


def test_a_folder_that_cannot_be_written_is_not_called_locked(tmp_path):
    (tmp_path / "lock").mkdir()  # root may write anywhere, but no folder is a file
    with pytest.raises(IsADirectoryError), files.lock(tmp_path / "lock"):
        pytest.fail("not reached")


def test_no_more_is_begun_ahead_than_asked_for():
    asked = []

    def items():
        for number in range(20):
            asked.append(number)
            yield number

    with ThreadPoolExecutor(3) as pool:
        found = map_ahead(pool, lambda number: -number, items(), 5)
        for number in range(20):
            assert next(found) == -number
            assert len(asked) <= number + 5
        assert next(found, None) is None


WORK_THAT_WRITES = """
import sys, time
from pathlib import Path
from ich_keras.processes import process_pool

def begin(folder):
    (Path(folder) / "begun").touch()

def work(folder):
    number = 0
    while True:
        number += 1
        (Path(folder) / "number").write_text(str(number))
        time.sleep(0.05)

if __name__ == "__main__":
    pool = process_pool(1, begin, sys.argv[1])
    pool.submit(work, sys.argv[1]).result()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORK_THAT_WRITES)
    number = tmp_path / "number"

    def wait_until(is_so, seconds=60):
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end
            time.sleep(0.05)

    with subprocess.Popen([sys.executable, str(script), str(tmp_path)]) as run:
        wait_until(number.exists)
        run.kill()
    assert (tmp_path / "begun").exists()

    def stands_still():
        before = number.read_text()
        time.sleep(0.5)
        return number.read_text() == before

    wait_until(stands_still, 20)


@pytest.mark.parametrize(
    ("point", "kept"),
    [("before a.txt", "1"), ("after a.txt", "2"), ("before a.txt*2", "2"), ("after b.txt", "3")],
)
def test_a_fail_point_ends_the_process_and_the_file_is_whole(tmp_path, point, kept):
    path = tmp_path / "a.txt"
    path.write_text("1")
    program = (
        "import sys; from ich_keras.files import atomic_write;"
        "atomic_write(sys.argv[1], '2'); atomic_write(sys.argv[1], '3')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, "ICH_FAIL_AT": point},
        check=False,
    )
    assert done.returncode == (0 if kept == "3" else 137)
    assert path.read_text() == kept


def test_a_file_of_the_users_is_never_taken_for_a_lock(tmp_path):
    path = tmp_path / "poetry.lock"
    path.write_text("mine")
    (tmp_path / "linked.lock").symlink_to(path)
    for name in ("poetry.lock", "linked.lock"):
        with (
            pytest.raises(UsageError, match=f"{name} is in the way"),
            files.lock(tmp_path / name, is_kept=False),
        ):
            pytest.fail("not reached")
    assert path.read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has a folder of this kind")
def test_a_folder_that_takes_no_files_is_no_lock_that_is_held():
    with pytest.raises(FileNotFoundError, match="No such file"), files.lock("/proc/ich.lock"):
        pass
