"""The benchmarks: what they count, by hand; and that their command runs."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ich_keras.ct.series import index_folder
from ich_keras.data.cache.cache import build_cache
from ich_keras.errors import UsageError
from ich_keras.phantom.dicom import write_phantoms

ROOT = Path(__file__).parents[1]
# At the end: the package under test is the installed one, the benchmarks lie beside it.
sys.path.append(str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.building import BY_PYDICOM, read_resized  # noqa: E402
from benchmarks.cases import CASES, OURS, Setting, choose_cases, tiny  # noqa: E402
from benchmarks.records import Place, file_name, slug, table  # noqa: E402
from benchmarks.sequence import ALONE, CHUNKED, IN_ONE, WITH_HEAD  # noqa: E402

# Of those tests that build or run Keras models; counting, naming and refusing need no backend.
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the benchmark runs Keras on torch only"
)


def test_variants_take_turns_and_report_the_median_per_step():
    order, now = [], [0.0]
    lengths = {"a": iter([9, 1, 2, 30, 4, 5]), "b": iter([9, 10, 20, 30, 40, 50])}

    def run(name):
        order.append(name)
        now[0] += next(lengths[name])

    timings = harness.alternate(
        {name: lambda name=name: run(name) for name in lengths},
        repeats=5,
        steps=2,
        clock=lambda: now[0],
    )
    assert order == ["a", "b"] * 6
    # 1 2 4 5 30 seconds for two steps each; the warm-up of 9 does not count.
    assert timings["a"] == harness.Timing(2000, 1000, 2500, 500, 15000)
    assert timings["b"].median == 15000


def test_saved_bytes_of_a_network_counted_by_hand():
    net = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    x = torch.randn(5, 10)

    def train(steps):
        for _ in range(steps):
            net(x).square().sum().backward()

    ignored = [*net.parameters(), x]
    # The ReLU's result (which the second layer reads) and the output that is squared.
    assert harness.saved_bytes(train, ignored) == 4 * (5 * 7 + 5 * 3)


def test_what_is_kept_at_once_is_counted_by_hand():
    net = torch.nn.Sequential(torch.nn.Linear(10, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
    x = torch.randn(5, 10)

    def step(*parts):
        for part in parts:
            net(part).square().sum().backward()

    ignored = [*net.parameters(), x]
    of_one = 4 * (7 + 3)  # see above
    assert harness.most_saved_bytes(lambda: step(x), ignored) == 5 * of_one
    # One after the other: only the largest part is ever there.
    assert harness.most_saved_bytes(lambda: step(x[:2], x[2:]), ignored) == 3 * of_one


def test_operations_are_counted_per_step():
    a = torch.ones(3)

    def run(steps):
        a.neg()  # once, not per step
        for _ in range(steps):
            (a + a).mul(2).sum()

    counted = harness.dispatches(run)
    assert (counted.operations, counted.uploads) == (3, 0)


def test_graph_breaks_are_counted():
    def broken(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert harness.graph_breaks(lambda x: x * 2 + 1, torch.ones(2)) == 0
    assert harness.graph_breaks(broken, torch.ones(2)) == 1


def test_cases_by_name():
    assert [case.name for case in choose_cases("2d-b8, adam")] == ["2d-b8", "adam"]
    assert {case.name for case in CASES} - {c.name for c in choose_cases()} == {
        "whole-dilated",
        "whole-strided",
    }
    with pytest.raises(UsageError, match="case '2d-b9'; expected some of"):
        choose_cases("2d-b9")
    assert slug("NVIDIA H100 80GB (HBM3)") == "nvidia-h100-80gb-hbm3"
    assert table(("a", "b"), [("1", "long")]).splitlines()[1:] == ["|---|------|", "| 1 | long |"]


class Device:
    """A device that works off its queue only when somebody waits for it."""

    def __init__(self):
        self.now, self.queued = 0.0, 0.0

    def variant(self, *seconds: float):
        durations = iter(seconds)

        def run():
            self.queued += next(durations)

        return run

    def wait(self):
        self.now += self.queued
        self.queued = 0.0


def test_the_device_is_waited_for():
    device = Device()
    variants = {"a": device.variant(50, 1, 2, 4), "b": device.variant(90, 3, 3, 5)}
    found = harness.alternate(
        variants, repeats=3, sync=device.wait, steps=2, clock=lambda: device.now
    )
    assert found["a"] == harness.Timing(1000, q25=750, q75=1500, lowest=500, highest=2000)
    assert found["b"] == harness.Timing(1500, q25=1500, q75=2000, lowest=1500, highest=2500)


def test_one_repeat_has_no_spread():
    assert harness.Timing.of([7.0]) == harness.Timing(7.0, 7.0, 7.0, 7.0, 7.0)


def test_a_view_counts_its_whole_storage_once():
    x, weight = torch.ones(6, 4), torch.ones(2, requires_grad=True)

    def run(steps):
        whole = x + 1
        ((whole[:, :2] * weight).sum() + (whole[:, 2:] * weight).sum()).backward()

    assert harness.saved_bytes(run, [x, weight]) == 6 * 4 * 4


def test_backward_operations_are_counted():
    x = torch.ones(3, requires_grad=True)

    def run(steps):
        for _ in range(steps):
            torch.autograd.grad(x.mul(x), x, torch.ones(3))

    # mul and ones; backward two mul, their sum.
    assert harness.dispatches(run).operations == 5


def test_uploads_are_single_numbers_from_the_cpu():
    there = torch.zeros((), device="meta")

    def run(steps):
        for _ in range(steps):
            torch.tensor(3.0).to("meta")
            there.copy_(torch.tensor(1.0))
            torch.ones(4).to("meta")  # a batch
            there.to(torch.float64)  # already there
            torch.tensor(1.0).to(torch.float64)  # stays here

    assert harness.dispatches(run).uploads == 2


def test_peak_is_that_of_the_process_itself():
    held = bytearray(300 * 2**20)
    assert harness.peak_of_process() >= len(held)
    code = "from benchmarks.harness import peak_of_process; print(peak_of_process())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 2**20 < int(done.stdout) < len(held), "the child's own, not this process's"


def test_tiny_cases_exercise_each_network_once():
    cases = choose_cases(is_tiny=True)
    assert len(cases) < len(CASES)
    assert {case.preset for case in cases} == {case.preset for case in CASES}
    assert {mode for case in cases for mode in case.modes} == {"train", "predict", "update"}
    assert all(tiny(case) == case for case in cases)


@on_torch
@pytest.mark.parametrize("case", choose_cases(is_tiny=True), ids=lambda case: case.name)
def test_both_sides_have_the_same_parameters(case):
    from benchmarks.plain import plain_network
    from ich_keras.models.classifier import classifier

    ours = classifier(case.spec, output="logits").trainable_variables
    plain = plain_network(case.spec).parameters()
    assert sorted(v.value.numel() for v in ours) == sorted(p.numel() for p in plain)


@pytest.mark.parametrize("name", ["series-dilated", "series-strided", "slab-flat-b2", "narrow"])
def test_plain_network_computes_what_the_reference_does(name):
    from benchmarks.plain import plain_network

    case = choose_cases(name, is_tiny=True)[0]
    torch.manual_seed(0)
    network = plain_network(case.spec).double().train()
    layout = torch.channels_last if case.spec.rank == 2 else torch.channels_last_3d
    network = network.to(memory_format=layout)
    images = torch.rand(2, *case.shape, dtype=torch.float64).movedim(-1, 1)
    answers = []
    for forward in (network, lambda x: network.network(x)["fc"]):
        network.zero_grad()
        logits = forward(images)
        (logits * torch.linspace(-1, 1, 6)).sum().backward()
        answers.append([logits.detach(), *(p.grad.clone() for p in network.parameters())])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@on_torch
def test_saved_bytes_agree_with_the_librarys_own_count():
    from benchmarks.variants import variants_of
    from ich_keras.models.torch.function import FlatFunction
    from ich_keras.models.torch.memory import activation_bytes

    case = choose_cases("narrow", is_tiny=True)[0]
    ours = variants_of(case, Setting("cpu", 1, "float32"))[OURS]()
    ours.train(1)
    counted = harness.saved_bytes(ours.train, ours.tensors())
    expected = activation_bytes(FlatFunction(ours.model, True), case.shape, case.batch)
    logits = case.batch * 6 * 4  # kept for the loss, which is no part of the function
    assert counted == expected + logits


def test_ratios_are_to_plain_torch_of_the_same_case_and_mode():
    from benchmarks.model import Row, with_ratios

    row = Row("one", "plain torch", "train", "float32", (8, 8, 3), 2, 1, 1, 6.0, 6, 6, 6, 6)
    rows = [
        replace(row, saved_bytes_per_sample=100.0),
        replace(row, variant="ours", ms_median=4.0, saved_bytes_per_sample=50.0),
        replace(row, mode="predict", ms_median=1.0),
        replace(row, variant="ours", mode="predict", ms_median=2.0),
        replace(row, case="other", variant="ours"),
    ]
    found = [(r.speed_ratio, r.saved_ratio) for r in with_ratios(rows)]
    assert found == [(1.0, 1.0), (1.5, 0.5), (1.0, None), (0.5, None), (None, None)]


def test_files_are_named_by_where_they_were_made():
    place = Place(
        device="AMD EPYC 9V74 (80-Core)",
        threads=2,
        python="3.11.7",
        ich_keras="0.1.0",
        keras="3.15.1",
        torch="2.14.1",
        torchvision="0.29.1",
        monai="",
        date="2026-11-23T08:52:23",
    )
    assert file_name("model", place, "bfloat16") == (
        "model_amd-epyc-9v74-80-core-2t_torch-2.14.1_keras-3.15.1_bfloat16_20261123-085223.csv"
    )


@on_torch
@pytest.mark.slow
def test_the_command_runs_and_its_ratios_are_those_of_its_times(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "model", "--tiny", "--out", str(tmp_path)]
    # One thread: on a busy machine two wait for each other at every operation.
    command += ["--threads", "1", "--precision", "float32"]
    command += ["--cases", "2d-b8,slab-dilated-b2,series-strided,adam"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert (
        path.name.startswith("model-tiny_") and f"_keras-{keras.__version__}_float32" in path.name
    )
    rows = list(csv.DictReader(path.read_text().splitlines()))
    plain = {(r["case"], r["mode"]): r for r in rows if r["variant"] == "plain torch"}
    assert {mode for _, mode in plain} == {"train", "predict", "update"}
    for row in rows:
        beside = plain[row["case"], row["mode"]]
        ratio = float(beside["ms_median"]) / float(row["ms_median"])
        assert float(row["speed_ratio"]) == pytest.approx(ratio, rel=1e-4)
        assert int(row["dispatches_per_step"]) > 0
        if row["variant"] == "ours" and row["mode"] == "train":
            assert row["graph_breaks"] == "0"
            # Not the times, which depend on the machine; the memory does not.
            assert float(row["saved_ratio"]) <= 1.05, row["case"]
    variants = {row["variant"] for row in rows if row["mode"] == "train"}
    assert {"ours", "plain torch", "stock Keras", "ours, recompute stage"} <= variants


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr("ich_keras.environment.loaded_backend", lambda: "jax")
    with pytest.raises(UsageError, match="jax"):
        harness.require_torch()


def test_another_backend_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "model", "--tiny"],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: backend jax: this benchmark compares with plain torch.")


@on_torch
@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "model", "--tiny", "--out", str(tmp_path)]
    command += ["--threads", "1", "--cases", "narrow", "--no-stock", "--memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    peaks = {(row["variant"], row["mode"]): row["peak_bytes"] for row in rows}
    for variant in ("ours", "plain torch"):
        assert 0 < int(peaks[variant, "train"]) < 2**30
        assert peaks[variant, "predict"] == ""


@on_torch
@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole-dilated", "whole-strided"])
def test_a_step_on_a_whole_series_takes_no_more_than_the_readme_says(case):
    """One series of 60x256x256 in float32, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "peak", "--case", case, "--variant", "ours"]
    command += ["--steps", "2", "--precision", "float32", "--threads", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The activations alone are several hundred MiB: less would not be this step.
    assert 2**30 < int(done.stdout.split()[-1]) < 3 * 2**30


def test_the_cost_of_the_checks_is_told_for_each_kind_of_file(tmp_path):
    command = ["checks", "--tiny", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    works = {
        kind: {r["work"] for r in rows if r["files"] == kind} for kind in {r["files"] for r in rows}
    }
    assert {"uncompressed", "uncompressed, padding declared", "RLE"} <= set(works)
    assert "check: declared padding" in works["uncompressed, padding declared"]
    assert "check: code stream" in works["RLE"]
    for row in rows:
        beside = next(
            r for r in rows if r["files"] == row["files"] and r["work"] == "a slice into the cache"
        )
        share = 100 * float(row["us_median"]) / float(beside["us_median"])
        assert float(row["percent"]) == pytest.approx(share, rel=1e-4)
        assert int(row["slices"]) >= 5


def test_ways_to_build_a_cache_are_told_beside_pydicom_and_a_process_pool(tmp_path):
    command = ["building", "--tiny", "--workers", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    ways = {(row["what"], row["way"]): row for row in rows}
    for way in ("folder", "zip", "folder, dask"):
        assert ways["index", way]["speed_ratio"] == ""
        assert float(ways["cache", way]["speed_ratio"]) > 0
    assert {"folder, gzip", "folder, blosc2", BY_PYDICOM} < {way for _, way in ways}
    assert float(ways["cache", BY_PYDICOM]["speed_ratio"]) == 1
    few, many = (
        int(ways["cache", f"folder{of}"]["slices"]) for of in ("", " of ten times as many slices")
    )
    assert 5 <= few < many / 5
    for row in rows:
        assert float(row["slices_per_s"]) == pytest.approx(1e6 / float(row["us_median"]), rel=1e-4)


@on_torch
def test_a_sequence_head_is_measured_beside_its_slice_network(tmp_path):
    command = ["sequence", "--tiny", "--threads", "1", "--precision", "float32"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["head"] for row in rows} == {"gru", "transformer"}
    ways = {(row["mode"], row["way"]): row for row in rows if row["head"] == "gru"}
    for mode in ("predict", "train"):
        assert float(ways[mode, ALONE]["time_ratio"]) == 1
    assert ways["predict", WITH_HEAD]["saved_bytes"] == ""
    kept = {way: int(ways["train", way]["saved_bytes"]) for way in (ALONE, CHUNKED, IN_ONE)}
    # Six slices, in chunks of two.
    assert kept[CHUNKED] < 1.1 * kept[ALONE] and 2.5 < kept[IN_ONE] / kept[CHUNKED] < 3.5
    for row in rows:
        per_second = 1e3 * int(row["slices"]) / float(row["ms_median"])
        assert float(row["slices_per_s"]) == pytest.approx(per_second, rel=1e-4)


def test_pydicom_and_a_cache_give_the_same_pixels(tmp_path):
    index = index_folder(write_phantoms(tmp_path / "dicom", 1, seed=1, matrix=64))
    cache = build_cache(index, tmp_path / "cache", 32)
    paths = index.slices["container"]
    by_pydicom = np.stack([read_resized(path, 32) for path in paths])
    assert by_pydicom.std() > 300
    np.testing.assert_array_equal(cache.slices_hu(range(len(paths))), by_pydicom)
