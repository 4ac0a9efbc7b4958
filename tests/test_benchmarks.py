"""The benchmarks: what they count, by hand; and that their command runs."""

import csv
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import torch

from ich_keras.errors import UsageError

ROOT = Path(__file__).parents[1]
# At the end: the package under test is the installed one, the benchmarks lie beside it.
sys.path.append(str(ROOT))

from benchmarks import harness  # noqa: E402
from benchmarks.cases import CASES, choose_cases  # noqa: E402
from benchmarks.records import slug, table  # noqa: E402

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the benchmarks measure the torch backend"
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


@pytest.mark.slow
def test_the_command_runs_and_its_ratios_are_those_of_its_times(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "model", "--tiny", "--out", str(tmp_path)]
    command += ["--precision", "float32", "--cases", "2d-b8,slab-dilated-b2,series-strided,adam"]
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
