"""The benchmark report: its order and budget, what it counts, its page and its comparison."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import pytest
from click.testing import CliRunner

from ich_keras.errors import DataError, EnvironmentProblem, StaleError

ROOT = Path(__file__).parents[1]
# At the end: the package under test is the installed one, the benchmarks lie beside it.
sys.path.append(str(ROOT))

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.cases import COMPILED, OURS, PLAIN, STOCK  # noqa: E402
from benchmarks.records import Place, write_csv  # noqa: E402
from benchmarks.report import campaign as campaigns  # noqa: E402
from benchmarks.report.campaign import (  # noqa: E402
    Campaign,
    conduct,
    find_unfinished,
    require_same,
    summary,
    with_shares,
)
from benchmarks.report.children import Child  # noqa: E402
from benchmarks.report.comparison import compared  # noqa: E402
from benchmarks.report.jobs import Job, jobs_of  # noqa: E402
from benchmarks.report.measurement import Measurement, Report, read_report  # noqa: E402
from benchmarks.report.networks import NETWORKS, network, num_slices  # noqa: E402

on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the benchmark runs Keras on torch only"
)
PLACE = Place(
    "Chip 1", 2, "3.12.1", "0.2.0", "3.15.1", "2.14.1", "0.29.1", "", "2026-11-30T10:00:00"
)
NAME = "report_chip-1-2t_torch-2.14.1_keras-3.15.1_20261130-100000.csv"


class Clock:
    """A clock that only the jobs move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def campaign(tmp_path, monkeypatch, seconds, rows=(), problems=()):
    """Return a campaign whose jobs take the given seconds, and the list of those that ran."""
    clock, ran = Clock(), []

    def measure(self, job, limit, is_last):
        ran.append((job.name, round(limit)))
        took = seconds.get(job.name, job.seconds)
        clock.now += min(took, limit)
        self._keep(job, {"section": job.task, "case": job.network, "slices_per_s": 1.5})
        if took > limit:
            return ("left out" if is_last else "failed"), f"stopped after {limit:.0f} s"
        return ("failed", "it broke") if job.name in problems else ("done", "")

    monkeypatch.setattr(Campaign, "_measure", measure)
    made = Campaign("cpu", PLACE, tmp_path / NAME, 1, False, lambda line: None, list(rows))
    return made, clock, ran


JOBS = [Job("ceilings", 10), Job("loader", 50), Job("sweep", 500, "slice"), Job("feed", 20, "slab")]


def test_the_order_is_that_of_what_matters_first():
    jobs = jobs_of("gpu", "bfloat16")
    assert len({job.name for job in jobs}) == len(jobs)
    first = jobs[:4]
    assert [(job.task, job.network) for job in first] == [
        ("ceilings", ""),
        ("steps", "slice"),
        ("steps", "slab"),
        ("steps", "series"),
    ]
    assert all(job.variants == (OURS, COMPILED) for job in first[1:])
    assert sum(job.seconds for job in first) < 9 * 60, "they must fit the first nine minutes"
    tasks = list(dict.fromkeys((job.task, job.precision) for job in jobs))
    assert tasks == [
        ("ceilings", ""),
        ("steps", "bfloat16"),
        ("memory", "bfloat16"),
        ("loader", ""),
        ("feed", "bfloat16"),
        ("steps", "float32"),
        ("steps", "TF32"),
        ("sweep", "bfloat16"),
        ("workers", ""),
    ]
    for job in jobs:
        if job.task == "steps":
            assert OURS in job.variants, "ratios are of variants that take turns"
    variants = {variant for job in jobs for variant in job.variants}
    assert variants == {OURS, f"{OURS}, not compiled", PLAIN, COMPILED, STOCK, "MONAI"}


def test_without_bfloat16_nothing_is_measured_twice():
    jobs = jobs_of("cpu", "float32")
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.precision for job in jobs} == {"", "float32"}


def test_a_batch_holds_the_same_voxels_in_every_view():
    for patients in (1, 4):
        slices = {
            network(name, patients).batch * num_slices(network(name, patients)) for name in NETWORKS
        }
        assert slices == {60 * patients}


def test_what_does_not_fit_the_budget_is_left_out_and_listed(tmp_path, monkeypatch):
    made, clock, ran = campaign(tmp_path, monkeypatch, {})
    made.run(JOBS, seconds=100, clock=clock)
    assert [name for name, _ in ran] == ["ceilings", "loader", "feed / slab"]
    report = read_report(made.path)
    assert {name: end.what for name, end in report.ends.items()} == {
        "ceilings": "done",
        "loader": "done",
        "sweep / slice": "left out",
        "feed / slab": "done",
    }
    assert report.ends["sweep / slice"].note == "needs about 500 s; 40 s left"
    assert report.ends["loader"].ms_median == 50_000
    told = summary(report)
    assert "3 of 4 jobs done." in told and "sweep / slice: needs about 500 s" in told


def test_no_time_left_is_0_seconds(tmp_path, monkeypatch):
    made, clock, _ = campaign(tmp_path, monkeypatch, {"loader": 10_000})
    made.run(JOBS[:2], seconds=10, clock=clock)
    clock.now += 1
    made.run(JOBS, seconds=-1, clock=clock)
    assert made.rows[-1].note == "needs about 20 s; 0 s left"


def test_a_report_goes_on_where_it_stopped(tmp_path, monkeypatch):
    made, clock, _ = campaign(tmp_path, monkeypatch, {})
    made.run(JOBS, seconds=100, clock=clock)
    before = made.path.read_text()
    report = read_report(made.path)
    made, clock, ran = campaign(tmp_path, monkeypatch, {}, report.rows)
    made.run(JOBS, seconds=1000, clock=clock)
    assert [name for name, _ in ran] == ["sweep / slice"]
    after = read_report(made.path)
    assert {end.what for end in after.ends.values()} == {"done"}
    assert len(after.rows) == 2 * len(JOBS), "one measurement and one end per job"
    assert set(before.splitlines()) - set(made.path.read_text().splitlines()) == {
        line for line in before.splitlines() if ",left out," in line
    }


def test_what_a_failed_job_measured_stays_until_it_is_measured_again(tmp_path, monkeypatch):
    made, clock, _ = campaign(tmp_path, monkeypatch, {}, problems=["loader"])
    made.run(JOBS[:2], seconds=100, clock=clock)
    rows = read_report(made.path).rows
    made, clock, ran = campaign(tmp_path, monkeypatch, {}, rows)
    made.run(JOBS[:2], seconds=20, clock=clock)
    assert ran == []
    kept = [row for row in read_report(made.path).rows if row.job == "loader"]
    assert [(row.section, row.what) for row in kept] == [("loader", ""), ("job", "left out")]
    made, clock, ran = campaign(tmp_path, monkeypatch, {}, kept)
    made.run(JOBS[1:2], seconds=100, clock=clock)
    kept = [row for row in read_report(made.path).rows if row.job == "loader"]
    assert [(row.section, row.what) for row in kept] == [("loader", ""), ("job", "done")]


def test_a_job_that_hangs_takes_only_its_own_time(tmp_path, monkeypatch):
    made, clock, ran = campaign(tmp_path, monkeypatch, {"loader": 10_000})
    made.run(JOBS, seconds=300, clock=clock)
    assert ran[1] == ("loader", 200), "four times what was expected"
    ends = {name: (end.what, end.note) for name, end in read_report(made.path).ends.items()}
    assert ends["loader"] == ("failed", "stopped after 200 s")
    assert ends["feed / slab"] == ("done", "")


def test_a_job_cut_by_the_budget_is_left_out_not_failed(tmp_path, monkeypatch):
    made, clock, _ = campaign(tmp_path, monkeypatch, {"loader": 10_000})
    made.run(JOBS[:2], seconds=100, clock=clock)
    end = read_report(made.path).ends["loader"]
    assert (end.what, end.note) == ("left out", "stopped after 90 s")


def test_estimates_follow_what_the_machine_needed(tmp_path, monkeypatch):
    jobs = [job for job in jobs_of("cpu", "bfloat16") if job.task == "steps"][:3]
    seconds = {job.name: 3 * job.seconds for job in jobs}
    made, clock, ran = campaign(tmp_path, monkeypatch, seconds)
    made.run(jobs, seconds=3 * sum(job.seconds for job in jobs) - 1, clock=clock)
    assert [name for name, _ in ran] == [job.name for job in jobs[:2]]
    note = made.rows[-1].note
    assert note.startswith(f"needs about {3 * jobs[2].seconds} s; {3 * jobs[2].seconds - 1} s left")


def report_of(tmp_path, rows, place=PLACE, name=NAME) -> Report:
    tmp_path.mkdir(parents=True, exist_ok=True)
    write_csv(tmp_path / name, list(rows), place)
    return read_report(tmp_path / name)


def measured(kind="cpu", scale=1.0) -> list[Measurement]:
    """Return the rows of a report with round numbers."""
    base = Measurement(kind, "job", "ceilings", patients=1)
    rows = [
        replace(base, what="matmul", precision=name, case="n", ms_median=1.0, tflops=flops * scale)
        for name, flops in (("bfloat16", 2.0), ("float32", 1.0))
    ]
    rows.append(replace(base, what="copy", case="n", ms_median=1.0, gb_per_s=100.0 * scale))
    rates = {"slice": 60.0, "slab": 6.0, "series": 3.0}  # samples per second in training
    for what, faster in (("train", 1), ("predict", 2)):
        for case, rate in rates.items():
            for variant, share in ((OURS, 1.0), (PLAIN, 0.5)):
                samples = rate * faster * share * scale
                net = network(case)
                row = replace(
                    base,
                    section="steps",
                    view=case,
                    case=case,
                    variant=variant,
                    precision="bfloat16",
                    what=what,
                    input_shape="x".join(map(str, net.shape)),
                    batch=net.batch,
                    ms_median=net.batch / samples * 1e3,
                    ms_q25=1.0,
                    ms_q75=2.0,
                    samples_per_s=samples,
                    slices_per_s=samples * num_slices(net),
                    tflops=0.5 * share,
                    operations=7,
                )
                rows.append(with_shares(row, rows))
    for case in rates:
        top = 100 * 2**20
        row = replace(base, section="memory", view=case, case=case, variant=OURS, what="train")
        rows.append(replace(row, precision="bfloat16", batch=network(case).batch, peak_bytes=top))
    for view, case, ms in (
        ("", "read the cache", 0.25),
        ("", "three windows", 0.5),
        ("", "one window", 0.125),
        *((view, "batches, augmentation none", 1.0) for view in rates),
        *((view, "batches, augmentation fast", 5.0) for view in rates),
    ):
        row = replace(base, section="loader", view=view, case=case, what="load", ms_median=ms)
        rows.append(replace(row, slices_per_s=1e3 / ms))
    for source, rate in (("ready tensors", 60.0), ("cache", 59.0), ("DICOM files", 15.0)):
        row = replace(base, section="feed", view="slice", case=source, variant=OURS, what="train")
        rows.append(replace(row, slices_per_s=rate, workers=0))
    for batch, rate in ((4, 10.0), (8, 30.0), (16, 20.0)):
        row = replace(base, section="sweep", view="slice", case="slice", variant=OURS, batch=batch)
        rows.append(replace(row, input_shape="256x256x3", slices_per_s=rate, ms_median=1.0))
    rows.append(replace(row, batch=32, note="out of memory"))
    rows.append(replace(base, job="feed / slab", section="job", what="left out", note="no time"))
    return rows


def test_shares_are_of_the_same_precision_and_device():
    rows = measured()
    ours = next(row for row in rows if row.section == "steps" and row.variant == OURS)
    assert ours.matmul_share == 0.25, "0.5 of 2 TFLOP/s in bfloat16"
    other = with_shares(replace(ours, precision="float32", gb_per_s=25.0), rows)
    assert (other.matmul_share, other.copy_share) == (0.5, 0.25)
    assert (
        with_shares(replace(ours, precision="TF32", matmul_share=None), rows).matmul_share is None
    )


def test_rows_come_back_from_the_file(tmp_path):
    rows = [replace(row, date=PLACE.date) for row in measured()]
    report = report_of(tmp_path, rows)
    assert report.place == PLACE and report.kind == "cpu"
    for before, after in zip(rows, report.rows, strict=True):
        for name, value in vars(before).items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert getattr(after, name) == expected, name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no column 'kind'"),
        ("case,variant\na,b\n", "no column 'kind'"),
        (b"\xff\xfe", "is no report"),
        ("HEAD\n", "it has no rows"),
        ("HEAD\ncpu,x\n", "line 2: not as many cells"),
        ("HEAD\nROW,extra\n", "line 2: not as many cells"),
    ],
)
def test_another_file_is_refused(tmp_path, content, words):
    head, row = report_of(tmp_path, measured()).path.read_text().splitlines()[:2]
    path = tmp_path / "other.csv"
    if isinstance(content, str):
        content = content.replace("HEAD", head).replace("ROW", row).encode()
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_report(path)
    result = CliRunner().invoke(main, ["compare", str(path), str(path)])
    assert result.exit_code == 3 and "report_*.csv" in result.output


def test_a_cell_that_is_no_number_is_named(tmp_path):
    path = report_of(tmp_path, measured()).path
    path.write_text(
        path.read_text().replace(",matmul,", ",matmul,,many", 1).replace(",,many,", ",,many", 1)
    )
    with pytest.raises(DataError, match=r"line 2: batch is 'many'; expected a number"):
        read_report(path)


def test_two_reports_are_compared_number_by_number(tmp_path):
    one = report_of(tmp_path, measured())
    rows = [row for row in measured("gpu", scale=4.0) if row.section != "feed"]
    rows.append(replace(rows[3], variant="MONAI"))
    other = report_of(tmp_path, rows, replace(PLACE, device="Card 2"), "report_b.csv")
    lines = compared(one, other).splitlines()
    assert lines[0].startswith(
        "A: Chip 1, 2 threads, torch 2.14.1, Keras 3.15.1, Python 3.12.1, 2026"
    )
    assert lines[1].startswith("B: Card 2, 2 threads")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [
        "steps",
        "series",
        "series",
        OURS,
        "bfloat16",
        "train",
        "1",
        "180",
        "720",
        "slices/s",
        "4.00",
    ] in cells
    assert [
        "memory",
        "slice",
        "slice",
        OURS,
        "bfloat16",
        "train",
        "60",
        "100",
        "100",
        "MiB",
        "1.00",
    ] in cells
    assert ["ceilings", "", "n", "", "", "copy", "", "100", "400", "GB/s", "4.00"] in cells
    assert any(line.startswith("Only in A (3): feed slice DICOM files ours") for line in lines)
    assert "Only in B (1): steps slice slice MONAI bfloat16 train 60" in lines
    result = CliRunner().invoke(main, ["compare", str(one.path), str(other.path)])
    assert result.exit_code == 0 and result.output.strip() == compared(one, other)


def test_reports_without_a_common_number_say_so(tmp_path):
    rows = measured()
    one = report_of(tmp_path, rows[:1])
    other = report_of(tmp_path, rows[2:3], name="report_b.csv")
    assert "They have nothing in common." in compared(one, other)


@on_torch
def test_the_page_says_what_was_measured_and_what_was_not(tmp_path, monkeypatch):
    from benchmarks.report.page import newest, page

    report_of(tmp_path, measured())
    old = replace(PLACE, date="2026-11-29T10:00:00")
    report_of(tmp_path, measured(scale=9.0), old, "report_zzz_20261129-100000.csv")
    report_of(tmp_path, measured(), replace(PLACE, device="Trial"), "report-tiny_a.csv")
    reports = newest(tmp_path)
    assert [report.path.name for report in reports] == [NAME]
    text = page(reports)
    # A series takes 1/3 s, a slice 1/60 s; a slab 1/6 s.
    sentence = "On Chip 1, training on a whole series of 60 slices costs as much as on 20 slices"
    assert f"**{sentence} in 2D.**" in text
    assert "A slab of 5 costs as much as 10.0 slices." in text
    rows = [line for line in text.splitlines() if line.startswith("| train |")]
    # 60 slices/s; a patient is 60 slices or 60 slabs or one series.
    assert "| 60 (1 s, 100 MiB, 25% of the ceiling) | not measured | *" in rows[0]
    assert "| 30 (10 s, 100 MiB, 25% of the ceiling) |" in rows[1]
    assert "| 180 (0.333 s, 100 MiB, 25% of the ceiling) |" in rows[2]
    assert "computed roof" in text
    assert "| `slab` | train | 1.00 | 0.50 |" in text
    assert "| read the cache |  | 4,000 | 3 |" in text
    assert "| slice | 60 | 59 | 15 | 0 | the network, for DICOM files (75 % slower) |" in text
    assert (
        "fastest with a batch of 8 (30 slices/s); the largest measured is 16 (out of memory)"
        in text
    )
    assert "- On a GPU nothing has been measured." in text
    assert text.count("\nOn a GPU: not measured.\n") == 3
    assert "- Chip 1, left out: feed / slab (no time)." in text
    assert "- Chip 1: MONAI was not installed." in text
    assert "- Chip 1, not reached: ceilings; steps / slice / bfloat16 / ours + plain torch;" in text
    for figure in ("throughput", "step", "roofline", "batches"):
        assert f"(results/figures/cpu-{figure}.svg)" in text
    assert "J per 1,000 slices" not in text, "no energy was told"


@on_torch
def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    from benchmarks.report.page import write_page

    results = ROOT / "benchmarks" / "results"
    *figures, page = write_page(results, tmp_path)
    committed = ROOT / "benchmarks" / "README.md"
    message = "run `python -m benchmarks report` and commit what it writes"
    assert page.read_text() == committed.read_text(), message
    for figure in figures:
        assert (committed.parent / figure.relative_to(tmp_path)).is_file(), message


@on_torch
def test_the_page_and_its_figures_are_the_same_bytes_each_time(tmp_path):
    report_of(tmp_path / "results", measured())
    written = []
    for name in ("a", "b"):
        out = tmp_path / name
        command = ["report", "--results", str(tmp_path / "results"), "--out", str(out)]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        written.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert written[0] == written[1]
    assert sorted(path.name for path in written[0]) == [
        "README.md",
        "cpu-batches.svg",
        "cpu-roofline.svg",
        "cpu-step.svg",
        "cpu-throughput.svg",
    ]


def test_the_stages_of_a_step_add_up(tmp_path):
    from benchmarks.report.findings import stacks

    found = {stack.view: stack for stack in stacks(report_of(tmp_path, measured()))}
    assert found["slice"].loading == {
        "read the cache": 0.25,
        "windows, normalise": 0.75,
        "augmentation (fast)": 4.0,
    }
    # 180 slices/s in training and 360 in prediction.
    assert found["series"].network == pytest.approx(
        {"forward": 1e3 / 360, "backward, update": 1e3 / 360}, rel=1e-4
    )
    assert found["slab"].loading == found["slice"].loading


@on_torch
def test_computed_numbers_by_hand():
    from benchmarks.report.roofs import H100, THESIS, Ceilings, Work, work

    # Of ResNet-18 on 256x256 pixels: 2.37 G multiply-adds forward (He et al.: 1.8 G at 224x224).
    forward = work(network("slice"), "bfloat16", "predict")
    assert forward.flop == pytest.approx(2 * 2.37e9, rel=0.01)
    train = work(network("slice"), "bfloat16", "train")
    assert train.flop == 3 * forward.flop
    assert work(network("slice"), "float32", "train").num_bytes > 1.9 * train.num_bytes - 1e7
    # Whichever takes longer: 4 s of computing, 5 s of moving.
    assert Work(8.0, 10.0).samples_per_s(Ceilings("", 2.0, 2.0)) == 0.2
    # The dilated network on a series: 1804 GFLOP a step were counted by hand before.
    series = work(network("series-dilated"), "bfloat16", "train")
    assert series.flop == pytest.approx(1804e9, rel=0.02)
    assert series.samples_per_s(H100) == pytest.approx(424, rel=0.03)
    # 602,242 slices trained on and 150,561 looked at, six times, at 4.4 TFLOP/s.
    flop = 6 * (602_242 * train.flop + 150_561 * forward.flop)
    assert THESIS[0].hours_at(4.4e12) == pytest.approx(flop / 4.4e12 / 3600)


def unfinished(tmp_path, place=PLACE, **ends):
    rows = [Measurement("cpu", name, "job", what=what, patients=1) for name, what in ends.items()]
    return report_of(tmp_path, rows, place)


def test_the_newest_unfinished_report_of_the_machine_is_gone_on_with(tmp_path):
    jobs = [Job("ceilings", 1), Job("loader", 1)]
    assert find_unfinished(tmp_path, NAME, 1, jobs) is None
    new = NAME.replace("20261130", "20261231")
    report = unfinished(tmp_path, ceilings="done", loader="left out")
    assert find_unfinished(tmp_path, new, 1, jobs).path == report.path
    assert find_unfinished(tmp_path, new, 4, jobs) is None, "other batches"
    assert find_unfinished(tmp_path, new.replace("2.14", "2.15"), 1, jobs) is None
    unfinished(tmp_path, ceilings="done")  # killed before it could list the rest
    assert find_unfinished(tmp_path, new, 1, jobs).path == report.path
    unfinished(tmp_path, ceilings="done", loader="failed")
    assert find_unfinished(tmp_path, new, 1, jobs) is None, "nothing is left to do"


@pytest.mark.parametrize(
    ("kind", "change", "patients", "words"),
    [
        ("gpu", {}, 1, "measured with kind 'cpu'; here it is 'gpu'"),
        ("cpu", {"torch": "2.15.0"}, 1, "measured with torch '2.14.1'; here it is '2.15.0'"),
        ("cpu", {"threads": 8}, 1, "measured with threads 2; here it is 8"),
        ("cpu", {}, 4, "measured with patients 1; here it is 4"),
    ],
)
def test_a_report_of_another_machine_is_not_gone_on_with(tmp_path, kind, change, patients, words):
    report = unfinished(tmp_path, ceilings="done")
    require_same(report, "cpu", replace(PLACE, date="2027-01-01T00:00:00"), 1)
    with pytest.raises(StaleError, match=words):
        require_same(report, kind, replace(PLACE, **change), patients)


def test_ratios_are_to_ours_of_the_same_turns(tmp_path):
    from benchmarks.report.tables import ratios_table

    rows = measured()
    ours = next(row for row in rows if row.section == "steps" and row.variant == OURS)
    # In the job of stock Keras the machine was three times as slow.
    slower = replace(ours, job="others", samples_per_s=20.0, slices_per_s=20.0)
    stock = replace(slower, variant=STOCK, samples_per_s=5.0, slices_per_s=5.0)
    exact = replace(ours, job="exact", precision="float32", samples_per_s=30.0)
    table = ratios_table(report_of(tmp_path, [*rows, slower, stock, exact])).splitlines()
    assert table[0] == "| network |  | ours | plain torch | stock Keras | ours, float32 |"
    assert table[2] == "| `slice` | train | 1.00 | 0.50 | 0.25 | 0.50 |"


def test_another_backend_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("ich_keras.environment.loaded_backend", lambda: "jax")
    result = CliRunner().invoke(main, ["cpu", "--out", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert result.output.startswith("Error: backend jax: this benchmark compares with plain torch.")
    assert not (tmp_path / "new").exists()


def test_a_trial_and_a_report_are_not_mixed(tmp_path):
    report = unfinished(tmp_path, ceilings="done")
    require_same(report, "cpu", PLACE, 1, is_tiny=False)
    with pytest.raises(StaleError, match="measured with --tiny False; here it is True"):
        require_same(report, "cpu", PLACE, 1, is_tiny=True)


def test_available_memory_is_at_most_all_of_it():
    import os

    from benchmarks.harness import available_memory

    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**27 < available_memory() <= everything


def test_power_that_is_not_told_is_no_energy():
    from benchmarks.report.energy import mean_watts

    assert mean_watts("[N/A]\nNo devices were found\n") is None
    assert mean_watts("100.0\n[N/A]\n300.5\n") == 200.25


def test_what_a_library_prints_is_no_measurement(tmp_path, monkeypatch):
    class Chatty:
        is_late, problem = False, ""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def lines(self):
            return iter(["Downloading...\n", '{"section": "loader", "slices_per_s": 2.5}\n'])

    monkeypatch.setattr(campaigns, "Child", Chatty)
    made = Campaign("cpu", PLACE, tmp_path / NAME, 1, False, lambda line: None)
    made.run([Job("loader", 1)], 100, Clock())
    assert [(row.section, row.slices_per_s) for row in made.rows] == [
        ("loader", 2.5),
        ("job", None),
    ]


def test_two_reports_into_one_folder_exclude_each_other(tmp_path):
    from ich_keras.files import lock

    arguments = ("cpu", 1.0, 1, 1, tmp_path, None, False, True, print)
    with lock(tmp_path / ".report.lock"), pytest.raises(StaleError, match="locked"):
        conduct(*arguments)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL (out of memory?)"),
        (
            "import sys; print('Error: it broke.\\nDo that.', file=sys.stderr); sys.exit(4)",
            "it broke.",
        ),
        ("raise ValueError('deep')", "ValueError: deep"),
    ],
)
def test_a_child_that_fails_leaves_its_reason(monkeypatch, code, words):
    with fake_child(
        monkeypatch, f"print('1'); import sys; sys.stdout.flush(); {code}", 60
    ) as child:
        assert [line.strip() for line in child.lines()] == ["1"]
    assert child.problem == words and not child.is_late


def fake_child(monkeypatch, code, limit):
    start = subprocess.Popen
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start(command, **options))
    return Child([], limit)


def test_a_child_that_hangs_is_ended_with_its_workers(monkeypatch):
    code = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(90)']);"
        "print('1', flush=True); time.sleep(90)"
    )
    begun = time.monotonic()
    with fake_child(monkeypatch, code, 2) as child:
        assert len(list(child.lines())) == 1
    assert child.is_late
    assert time.monotonic() - begun < 80, "the worker holds the same pipe: it must end, too"


def test_an_unusable_device_is_told_in_one_line(tmp_path, monkeypatch):
    class Broken:
        problem = "--device cuda: no usable GPU."

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def lines(self):
            return iter(())

    monkeypatch.setattr(campaigns, "Child", Broken)
    result = CliRunner().invoke(main, ["gpu", "--out", str(tmp_path)])
    assert result.exit_code == 4
    assert result.output.startswith("Error: --device cuda: no usable GPU.")
    assert list(tmp_path.iterdir()) == []


def tiny_job(name):
    """Run a tiny job in this process: its rows."""
    from benchmarks.report.perform import Conditions, perform

    conditions = Conditions("cpu", 1, 1, True, time.monotonic() + 600)
    found = list(perform(name, "float32", conditions))
    json.dumps(found)
    return [Measurement(kind="cpu", job=name, **columns) for columns in found]


@on_torch
def test_ceilings_by_hand():
    *products, copy = tiny_job("ceilings")
    assert [row.precision for row in products] == ["float32", "bfloat16"]
    for row in products:
        assert row.tflops == pytest.approx(2 * 256**3 / (row.ms_median / 1e3) / 1e12)
    # Read and written: 2 x 65,536 values of four bytes.
    assert copy.gb_per_s == pytest.approx(2 * 65_536 * 4 / (copy.ms_median / 1e3) / 1e9)


@on_torch
def test_a_job_measures_steps():
    from benchmarks.report.roofs import work

    rows = tiny_job("steps / series / float32 / ours + plain torch")
    assert [(row.variant, row.what) for row in rows] == [
        (OURS, "train"),
        (PLAIN, "train"),
        (OURS, "predict"),
        (PLAIN, "predict"),
    ]
    case = network("series", is_tiny=True)
    for row in rows:
        assert row.samples_per_s == pytest.approx(case.batch / row.ms_median * 1e3)
        assert row.slices_per_s == pytest.approx(17 * row.samples_per_s)
        needed = work(case, "float32", row.what)
        assert row.tflops == pytest.approx(needed.flop * row.samples_per_s / 1e12)
        assert row.operations > 0
        assert (row.kept_bytes_per_sample is not None) == (row.what == "train")
    assert rows[0].kept_bytes_per_sample <= 1.05 * rows[1].kept_bytes_per_sample


@on_torch
def test_the_sweep_ends_and_says_why(monkeypatch):
    from benchmarks.report import tasks

    monkeypatch.setattr(tasks, "_fits", lambda case, precision: case.batch < 4)
    rows = tiny_job("sweep / series / float32 / ours")
    assert [(row.batch, row.note) for row in rows] == [
        (1, ""),
        (2, ""),
        (4, "stopped before batch 4: half of the available memory"),
    ]


@on_torch
def test_the_sweep_goes_half_way_back_when_memory_runs_out(monkeypatch):
    import torch

    from benchmarks.report import tasks

    def swept(job, case, build, conditions):
        if case.batch > 3:
            raise torch.cuda.OutOfMemoryError("full")
        yield {"section": "sweep", "batch": case.batch}

    monkeypatch.setattr(tasks, "_swept", swept)
    rows = tiny_job("sweep / series / float32 / ours")
    assert [(row.batch, row.note) for row in rows] == [
        (1, ""),
        (2, ""),
        (4, "out of memory"),
        (3, ""),
    ]


@on_torch
def test_a_variant_that_does_not_fit_leaves_the_others(monkeypatch):
    import torch

    from benchmarks.report import tasks

    class Full:
        def train(self, steps):
            raise torch.cuda.OutOfMemoryError("full")

    class Fine:
        def train(self, steps):
            pass

        predict = train

        def tensors(self):
            return []

    monkeypatch.setattr(tasks, "builders", lambda *_: {OURS: Full, PLAIN: Fine})
    rows = tiny_job("steps / slab / float32 / ours + plain torch")
    assert [(row.variant, row.what, row.note) for row in rows] == [
        (OURS, "train", "out of memory"),
        (PLAIN, "train", ""),
        (PLAIN, "predict", ""),
    ]


@on_torch
def test_without_shared_memory_training_is_fed_without_workers(monkeypatch):
    from benchmarks.report import loading

    def refuse(loader):
        raise EnvironmentProblem("too little shared memory")

    monkeypatch.setattr(loading, "_exhaust", refuse)
    rows = tiny_job("feed / slab / float32 / ours")
    assert [row.workers for row in rows] == [0, 0, 0]


@on_torch
def test_peak_names_the_cases_and_variants_that_there_are():
    command = ["peak", "--tiny", "--case"]
    result = CliRunner().invoke(main, [*command, "2d"])
    assert result.exit_code == 2 and "'2d-b8'" in result.output
    result = CliRunner().invoke(main, [*command, "narrow", "--variant", "our"])
    assert result.exit_code == 2
    assert "variant 'our' of narrow; expected one of 'ours', 'plain torch'" in result.output
    told = CliRunner().invoke(main, ["peak", "--help"]).output
    assert "whole-dilated" in told and "stock Keras" in " ".join(told.split())


@on_torch
def test_the_loader_tells_every_stage_and_augmentation():
    from ich_keras.data.augment import AUGMENTATIONS

    rows = tiny_job("loader")
    for view in ("slice", "slab", "series"):
        cases = [row.case for row in rows if row.view == view]
        assert cases == [
            f"{what}, augmentation {name}"
            for name in ("none", *AUGMENTATIONS)
            for what in ("batches", "HU for a device")
            if (what, name) != ("HU for a device", "thesis")
        ]
    stages = {row.case: row for row in rows if not row.view}
    assert {"read a DICOM file: pydicom", "read a DICOM file: read_hu", "read the cache"} <= set(
        stages
    )
    for row in rows:
        assert row.slices_per_s == pytest.approx(1e3 / row.ms_median)


@on_torch
def test_worker_processes_are_timed_on_the_same_batches():
    from ich_keras.data.augment import AUGMENTATIONS
    from ich_keras.processes import usable_cores

    rows = tiny_job("workers")
    assert [(row.view, row.case, row.workers) for row in rows] == [
        (view, f"batches, augmentation {name}", workers)
        for view in ("slice", "slab", "series")
        for name in ("none", *AUGMENTATIONS)
        for workers in (0, min(usable_cores(), 8))
    ]
    for row in rows:
        assert row.slices_per_s == pytest.approx(1e3 / row.ms_median)
    alone, together = rows[:2]
    assert alone.steps == together.steps
    assert alone.key != together.key, "`compare` must not mix them up"


def test_the_table_of_workers_has_one_process_and_all(tmp_path):
    from benchmarks.report.tables import loader_table, workers_table

    rows = measured()
    (loaded,) = (r for r in rows if r.section == "loader" and "fast" in r.case and r.view == "slab")
    both = replace(loaded, section="workers", workers=3, slices_per_s=550.0)
    alone = replace(both, workers=0, slices_per_s=220.0)
    report = report_of(tmp_path / "all", [*rows, alone, both])
    lines = workers_table(report).splitlines()
    assert lines[0] == "| stage | view | one process | 3 worker processes | ratio |"
    assert lines[2:] == ["| batches, augmentation fast | slab | 220 | 550 | 2.50 |"]
    assert "| batches, augmentation fast | slab | 200 | 60 |" in loader_table(report).splitlines()
    older = workers_table(report_of(tmp_path / "older", [*rows, both]))
    assert older.splitlines()[2:] == ["| batches, augmentation fast | slab |  | 550 |  |"]


@on_torch
def test_a_row_keeps_the_date_of_its_measurement(tmp_path, monkeypatch):
    from benchmarks.report.page import page

    rows = [replace(row, date="2026-11-30T10:00:00") for row in measured()]
    later = replace(rows[-1], section="workers", workers=2, date="2026-12-01T09:00:00")
    report = report_of(tmp_path, [*rows, later])
    assert report.place.date == "2026-11-30T10:00:00"
    assert report.rows[-1].date == "2026-12-01T09:00:00"
    assert report.later_days == {"2026-12-01": ["workers"]}
    assert "(workers: 2026-12-01)" in page([report])
    made, clock, _ = campaign(tmp_path, monkeypatch, {})
    monkeypatch.setattr(campaigns, "now", lambda: "2026-12-02T00:00:00")
    made.run(JOBS, seconds=100, clock=clock)
    assert {row.date for row in read_report(made.path).rows} == {"2026-12-02T00:00:00"}


@on_torch
def test_a_report_of_the_loader_alone_has_its_own_table_and_no_empty_column(tmp_path):
    from benchmarks.report.page import page

    full = report_of(tmp_path / "full", measured())
    loaded = [r for r in measured() if r.section in ("loader", "workers")]
    alone = report_of(tmp_path / "alone", loaded)
    alone = replace(alone, place=replace(alone.place, device="Another CPU"))
    text = page([alone, full])
    glance, _, rest = text.partition("## Beside others")
    assert "Another CPU" not in glance and "One core each, Another CPU" in rest


def test_only_the_wanted_part_is_measured(tmp_path, monkeypatch):
    ran = []

    def run(self, jobs, seconds, clock):
        ran.extend(job.task for job in jobs)
        self.rows = measured()
        self._write()

    monkeypatch.setattr(campaigns.Campaign, "run", run)
    monkeypatch.setattr(campaigns, "examine", lambda *_: campaigns.Machine(PLACE, "float32"))
    conduct("cpu", 1, 1, 2, tmp_path, None, True, True, lambda _: None, ("workers", "loader"))
    assert ran == ["loader", "workers"]


@on_torch
def test_training_is_fed_from_each_source():
    rows = tiny_job("feed / slab / float32 / ours")
    assert [row.case for row in rows] == ["ready tensors", "cache", "DICOM files"]
    assert {row.batch for row in rows} == {2}
    assert all(row.slices_per_s == pytest.approx(5 * row.samples_per_s) for row in rows)


@on_torch
def test_files_give_the_batches_that_the_cache_gives(phantom_folder):
    import numpy as np

    from benchmarks.report import loading
    from ich_keras.workflow import prepare_index

    index = prepare_index(phantom_folder / "images", phantom_folder / "stage_2_train.csv")
    paths = index.slices["container"].tolist()[:3]
    hu = loading.DicomSlices(paths, 64).slices_hu(np.array([2, 0]))
    assert hu.shape == (2, 64, 64) and hu.dtype == np.int16
    assert (hu[1] == loading.read_hu(paths[0])).all()


@on_torch
@pytest.mark.slow
def test_the_command_stops_at_its_budget_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "cpu", "--tiny", "--out", str(tmp_path)]
    command += ["--threads", "1", "--minutes"]

    def run(minutes):
        done = subprocess.run(
            [*command, str(minutes)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob("*.csv")
        return read_report(path), done.stdout

    first, told = run(0.7)
    assert first.path.name.startswith("report-tiny_")
    jobs = {name: end.what for name, end in first.ends.items()}
    assert jobs["ceilings"] == "done" and "left out" in jobs.values()
    assert "The same command goes on with what was left out." in told
    second, told = run(0.7)
    assert told.startswith(f"Going on with {first.path}")
    before, after = (
        {n for n, end in r.ends.items() if end.what == "done"} for r in (first, second)
    )
    assert before < after
    assert (
        set(first.ends)
        == set(second.ends)
        == {job.name for job in jobs_of("cpu", second.find(section="steps")[0].precision)}
    )


@on_torch
@pytest.mark.slow
def test_memory_of_a_report_is_that_of_training_alone():
    command = [sys.executable, "-m", "benchmarks", "job", "--tiny", "--device", "cpu"]
    command += ["--threads", "1", "--seconds", "500", "--name"]
    for precision in ("bfloat16", "float32"):  # which jobs there are depends on the processor
        name = f"memory / slice / {precision} / {OURS}"
        done = subprocess.run(
            [*command, name], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            break
    (row,) = map(json.loads, done.stdout.splitlines())
    # Gradients and Adam's state of 11 M weights are 128 MiB; Python and torch are not counted.
    assert 100 * 2**20 < row["peak_bytes"] < 2**29
