"""Index and cache on executors of others, and caches built in parts: the same bytes as here."""

import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_dicom import tiny_file, tiny_head

from ich_keras import executors, files
from ich_keras.cli import main
from ich_keras.ct import body, walk
from ich_keras.ct.rejects import RejectedFile
from ich_keras.ct.series import SeriesIndex, index_folder
from ich_keras.data.cache import fill as cache_fill
from ich_keras.data.cache.cache import CTCache, build_cache
from ich_keras.data.cache.parts import Part, build_part, join_parts
from ich_keras.errors import EnvironmentProblem, StaleError, UsageError

SIZE = 16
SERIES, SLICES = 6, 4
# A shard for each series.
OPTIONS = {"size": SIZE, "shard_bytes": SLICES * SIZE * SIZE * 2}


def write_series(folder: Path) -> Path:
    folder.mkdir()
    for series in range(1, SERIES + 1):
        for number in range(SLICES):
            content = tiny_file(
                tiny_head(10 * series + number, 24),
                SOPInstanceUID=f"1.2.{series}.{number}",
                SeriesInstanceUID=f"1.2.{series}",
                StudyInstanceUID=f"1.{series}",
                PatientID=f"P{series}",
                ImagePositionPatient=[-125, -125, 5 * number],
            )
            (folder / f"{series}-{number}.dcm").write_bytes(content)
    (folder / "torn.dcm").write_bytes(content[:-100])
    (folder / "a.txt").write_text("no DICOM")
    return folder


@pytest.fixture(scope="module")
def dicom(tmp_path_factory) -> Path:
    return write_series(tmp_path_factory.mktemp("dicom") / "images")


@pytest.fixture(scope="module")
def index(dicom) -> SeriesIndex:
    return index_folder(dicom)


@pytest.fixture(scope="module")
def local(index, tmp_path_factory) -> Path:
    return build_cache(index, tmp_path_factory.mktemp("local") / "cache", **OPTIONS).path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Here(Executor):
    """An executor that works at once, in this process."""

    def submit(self, function, /, *args, **settings):
        future = Future()
        try:
            future.set_result(self.work(function, *args, **settings))
        except Exception as error:  # noqa: BLE001 (as every executor does)
            future.set_exception(error)
        return future

    def work(self, function, *args, **settings):
        return function(*args, **settings)


# --- Executors ------------------------------------------------------------------------------


def test_an_executor_gives_the_same(dicom, index, local, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert index_folder(dicom, executor=pool).equals(index)
        cache = build_cache(index, tmp_path / "cache", executor=pool, **OPTIONS)
    assert content(cache.path) == content(local)


def test_a_task_that_runs_twice_does_no_harm(index, local, tmp_path):
    class Twice(Here):
        def work(self, function, *args, **settings):
            function(*args, **settings)
            return function(*args, **settings)

    cache = build_cache(index, tmp_path / "cache", executor=Twice(), **OPTIONS)
    assert content(cache.path) == content(local)


def test_what_a_machine_does_not_see_is_read_here(dicom, index, local, tmp_path, monkeypatch):
    """A node without the mount, or without the decoders, must not make rejects of good files."""

    def unseen(*args, **settings):
        raise RejectedFile("UNREADABLE", "No such file or directory")

    class Blind(Here):
        def work(self, function, *args, **settings):
            with monkeypatch.context() as patched:
                patched.setattr(walk, "read_headers", unseen)
                patched.setattr(body, "read_slice", unseen)
                patched.setattr(cache_fill, "read_indexed", unseen)
                return function(*args, **settings)

    assert index_folder(dicom, executor=Blind()).equals(index)
    cache = build_cache(index, tmp_path / "cache", executor=Blind(), **OPTIONS)
    assert content(cache.path) == content(local)


def test_a_machine_that_does_not_see_the_cache_is_named(index, tmp_path, monkeypatch):
    class Elsewhere(Here):
        def work(self, function, *args, **settings):
            raw = next((tmp_path / "cache.partial").glob(".partial-raw-*"))
            raw.rename(tmp_path / "hidden")
            try:
                return function(*args, **settings)
            finally:
                (tmp_path / "hidden").rename(raw)

    with pytest.raises(EnvironmentProblem, match="raw-shard-0000.h5 is not there for a worker"):
        build_cache(index, tmp_path / "cache", executor=Elsewhere(), **OPTIONS)
    assert not (tmp_path / "cache").exists()


def test_a_machine_with_other_versions_is_refused(index, tmp_path, monkeypatch):
    versions = cache_fill.pixel_versions()

    class Other(Here):
        def work(self, function, *args, **settings):
            with monkeypatch.context() as patched:
                other = {**versions, "opencv": "4.0"}
                patched.setattr(cache_fill, "pixel_versions", lambda: other)
                return function(*args, **settings)

    told = f"has opencv 4.0, not {versions['opencv']}"
    with pytest.raises(EnvironmentProblem, match=told):
        build_cache(index, tmp_path / "cache", executor=Other(), **OPTIONS)


def test_a_broken_executor_is_an_error_of_the_environment(dicom, index, local, tmp_path):
    class Broken(Here):
        left = 3

        def work(self, function, *args, **settings):
            self.left -= 1
            if self.left < 0:
                raise BrokenExecutor("a process died")
            return function(*args, **settings)

    with pytest.raises(EnvironmentProblem, match="reading headers has died"):
        index_folder(dicom, executor=Broken())
    with pytest.raises(EnvironmentProblem, match="died while reading slices") as caught:
        build_cache(index, tmp_path / "cache", executor=Broken(), **OPTIONS)
    assert "Finished shards are kept" in caught.value.hint
    assert len(list((tmp_path / "cache.partial").glob("shard-*.h5"))) >= 1
    assert content(build_cache(index, tmp_path / "cache", **OPTIONS).path) == content(local)


def test_only_so_many_tasks_are_under_way(monkeypatch):
    monkeypatch.setattr(executors, "AHEAD", 3)
    taken = []

    def items():
        for number in range(10):
            taken.append(number)
            yield number

    results = executors.map_on(Here(), abs, items())
    assert taken == [0, 1, 2]  # begun before the first result is asked for
    assert next(results) == 0
    assert taken == [0, 1, 2, 3]
    assert list(results) == list(range(1, 10))


def ich(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def test_options_that_do_not_go_together(index, dicom, tmp_path):
    index.save(tmp_path / "index")
    into = ("--index", tmp_path / "index", "--out", tmp_path / "cache")
    for options, told in (
        (("--scheduler", "tcp://x:1"), "--scheduler given without --executor"),
        (("--executor", "dask"), "--scheduler is missing"),
        (("--executor", "dask", "--scheduler", "x", "--workers", 2), "--workers given with"),
        (("--shard", "1/2", "--join"), "Build the parts first, then --join alone."),
        (("--shard", "1/2", "--max-rejects", 1), "--max-rejects given with --shard"),
        (("--shard", "1/2", "--max-rejects", 1), "It is for --join, when all parts are there."),
        (("--join", "--restart"), "--restart given with --join"),
        (("--shard", "3/2"), "'3/2' is not a part"),
        (("--verify", "--shard", "1/2", "--compression", "gzip"), "--shard, --compression given"),
    ):
        code, said = ich("cache", *into, *options)
        assert (code, told in said) == (2, True), said
    code, said = ich("index", "--dicom", dicom, "--out", tmp_path / "i", "--scheduler", "x")
    assert (code, "--scheduler given without" in said) == (2, True)


def test_no_scheduler_answers(index, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 1)
    index.save(tmp_path / "index")
    code, said = ich(
        *("cache", "--index", tmp_path / "index", "--out", tmp_path / "cache"),
        *("--executor", "dask", "--scheduler", "tcp://127.0.0.1:9"),
    )
    assert (code, "no Dask scheduler answers at tcp://127.0.0.1:9" in said) == (4, True), said
    assert list(tmp_path.glob("cache*")) == []


def test_dask_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(EnvironmentProblem, match="distributed, which are not installed") as caught,
        executors.dask_executor("tcp://x:1"),
    ):
        pass
    assert "ich_keras[dask]" in caught.value.hint


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_of_which_a_worker_is_killed(dicom, index, local, tmp_path, monkeypatch):
    import distributed

    monkeypatch.setattr(cache_fill, "BLOCK_SLICES", 1)
    root = str(Path(executors.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", root)  # for the workers
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(processes=True, **settings) as cluster:
        with distributed.Client(cluster, set_as_default=False) as client:
            found = client.run(os.getpid).values()
        pids, killed = list(found), []

        def kill(step: str, done: int, total: int) -> None:
            if pids and done >= 3:
                killed.append(pids.pop())
                os.kill(killed[-1], signal.SIGKILL)

        with executors.dask_executor(cluster.scheduler_address) as executor:
            assert index_folder(dicom, executor=executor, progress=kill).equals(index)
            cache = build_cache(
                index, tmp_path / "cache", executor=executor, progress=kill, **OPTIONS
            )
        assert content(cache.path) == content(local)
        assert len(killed) == 2
        # And by the command line.
        index.save(tmp_path / "index")
        code, said = ich(
            *("cache", "--index", tmp_path / "index", "--out", tmp_path / "by-command"),
            *("--size", SIZE, "--executor", "dask", "--scheduler", cluster.scheduler_address),
        )
        assert code == 0, said
        code, said = ich(
            *("index", "--dicom", dicom, "--out", tmp_path / "by-command-index"),
            *("--executor", "dask", "--scheduler", cluster.scheduler_address),
        )
        assert code == 0, said
    expected = build_cache(index, tmp_path / "expected", SIZE)
    assert content(tmp_path / "by-command") == content(expected.path)
    assert SeriesIndex.load(tmp_path / "by-command-index").equals(index)


# --- Parts ----------------------------------------------------------------------------------


def build_parts(index, out, numbers, count=4, **settings):
    return [build_part(index, out, part=Part(n, count), **OPTIONS, **settings) for n in numbers]


def test_parts_in_any_order_give_the_same_cache(index, local, tmp_path):
    out = tmp_path / "cache"
    built = build_parts(index, out, [3, 1, 4, 2])
    assert [one.num_shards for one in built] == [1, 2, 1, 2]
    assert sum(one.num_slices for one in built) == SERIES * SLICES
    assert not out.exists()
    cache = join_parts(index, out, **OPTIONS)
    assert content(cache.path) == content(local)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("compression", ["gzip", "blosc2"])
def test_compressed_parts(index, tmp_path, compression):
    build_parts(index, tmp_path / "cache", range(1, 5), compression=compression)
    cache = join_parts(index, tmp_path / "cache", compression=compression, **OPTIONS)
    expected = build_cache(index, tmp_path / "other", compression=compression, **OPTIONS)
    assert content(cache.path) == content(expected.path)


def test_missing_parts_are_named_with_their_commands(index, local, tmp_path):
    out = tmp_path / "cache"
    with pytest.raises(UsageError, match="no parts of .*cache beside it"):
        join_parts(index, out, **OPTIONS)
    build_parts(index, out, [1, 3])
    with pytest.raises(StaleError, match="3 of 6 shards .* not finished: of part 2/4, 4/4") as e:
        join_parts(index, out, **OPTIONS)
    assert f"ich cache --index INDEX --out {out} --shard 2/4" in e.value.hint
    assert len(list(tmp_path.glob("cache.part-*/shard-*.h5"))) == 3  # nothing was moved
    # A shard of a part that was interrupted.
    build_parts(index, out, [2, 4])
    folder = Part(2, 4).folder(out)
    (folder / "shard-0005.json").unlink()
    with pytest.raises(StaleError, match="1 of 6 shards .* of part 2/4"):
        join_parts(index, out, **OPTIONS)
    build_parts(index, out, [2])
    assert content(join_parts(index, out, **OPTIONS).path) == content(local)


def test_more_parts_than_shards(index, local, tmp_path):
    built = build_parts(index, tmp_path / "cache", range(1, 10), count=9)
    assert [one.num_shards for one in built] == [1] * SERIES + [0] * 3
    assert content(join_parts(index, tmp_path / "cache", **OPTIONS).path) == content(local)


def test_a_finished_part_is_not_built_again(index, tmp_path, monkeypatch):
    build_parts(index, tmp_path / "cache", [1])
    read = []
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    monkeypatch.setattr(cache_fill, "read_indexed", lambda *a: read.append(a))
    (again,) = build_parts(index, tmp_path / "cache", [1])
    assert (again.num_slices, read) == (2 * SLICES, [])


def test_two_jobs_with_one_part(index, tmp_path):
    out = tmp_path / "cache"
    with (
        files.lock(tmp_path / "cache.part-1-of-4.lock"),
        pytest.raises(StaleError, match=r"part-1-of-4\.lock is locked"),
    ):
        build_parts(index, out, [1])
    build_parts(index, out, range(1, 5))
    with (
        files.lock(tmp_path / "cache.part-3-of-4.lock"),
        pytest.raises(StaleError, match=r"part-3-of-4\.lock is locked"),
    ):
        join_parts(index, out, **OPTIONS)
    assert len(list(tmp_path.glob("cache.part-*/shard-*.h5"))) == SERIES


def test_parts_of_other_settings_or_slices_are_refused(dicom, index, tmp_path):
    out = tmp_path / "cache"
    build_parts(index, out, range(1, 4))
    build_part(index, out, part=Part(4, 4), **{**OPTIONS, "size": 24})
    with pytest.raises(StaleError, match="part-4-of-4 holds .* size 24, not 16"):
        join_parts(index, out, **OPTIONS)
    with pytest.raises(StaleError, match="size 16, not 24"):
        join_parts(index, out, **{**OPTIONS, "size": 24})
    assert not out.exists()


def test_a_damaged_shard_of_a_part_is_named(index, tmp_path):
    out = tmp_path / "cache"
    build_parts(index, out, range(1, 5))
    with open(Part(3, 4).folder(out) / "shard-0002.h5", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(StaleError, match=r"shard-0002\.h5: the shard has .* bytes"):
        join_parts(index, out, **OPTIONS)
    assert not out.exists()


def test_a_part_of_which_nothing_can_be_read(index, tmp_path, monkeypatch):
    read = cache_fill.read_indexed

    def refuse_some(source, size):
        if source.series_instance_uid == "1.2.2":
            raise RejectedFile("NO_DECODER", "x")
        return read(source, size)

    monkeypatch.setattr(cache_fill, "read_indexed", refuse_some)
    monkeypatch.setattr(cache_fill, "REREAD_SLICES", 0)
    out = tmp_path / "cache"
    built = build_parts(index, out, range(1, SERIES + 1), count=SERIES)
    assert [one.num_slices for one in built] == [4, 0, 4, 4, 4, 4]
    cache = join_parts(index, out, **OPTIONS)
    assert len(cache) == (SERIES - 1) * SLICES
    expected = build_cache(index, tmp_path / "other", **OPTIONS)
    assert content(cache.path) == content(expected.path)


@pytest.mark.parametrize("moved", ["shard-0000.h5", "shard-0003.json", "shard-0005.json"])
def test_a_join_that_was_killed_goes_on(index, local, tmp_path, moved):
    out = tmp_path / "cache"
    build_parts(index, out, range(1, 5))
    index.save(tmp_path / "index")
    program = (
        "from ich_keras.ct.series import SeriesIndex\n"
        "from ich_keras.data.cache.parts import join_parts\n"
        f"join_parts(SeriesIndex.load({str(tmp_path / 'index')!r}), {str(out)!r}, **{OPTIONS!r})\n"
    )
    environment = {**os.environ, "ICH_FAIL_AT": f"moved {moved}"}
    died = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert died.returncode == 137
    assert content(join_parts(index, out, **OPTIONS).path) == content(local)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "index"]


def test_parts_by_the_command_line(index, tmp_path):
    index.save(tmp_path / "index")
    into = ("--index", tmp_path / "index", "--out", tmp_path / "cache")
    for number in (1, 2):
        code, said = ich(
            *("cache", *into, "--shard", f"{number}/2", "--size", 24, "--workers", 0),
            *("--compression", "gzip"),
        )
        assert (code, f"Part {number}/2: " in said, "--join" in said) == (0, True, True), said
    code, said = ich("cache", *into, "--join", "--workers", 0)  # the parts say the size
    assert code == 0, said
    cache = CTCache.open(tmp_path / "cache")
    assert (cache.size, cache.manifest["compression"], len(cache)) == (24, "gzip", SERIES * SLICES)
