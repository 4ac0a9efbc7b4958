"""What is left on a real terminal: every line that matters, whole and once, at any width."""

import json
import os
import re
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import h5py
import numpy as np
import pandas as pd
import pyte
import pytest
from click.testing import CliRunner

from ich_keras.errors import IchWarning
from ich_keras.files import write_json
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import binary_metrics
from ich_keras.models.weights_file import RECORD
from ich_keras.run_folder import CACHE, SYNTHETIC
from ich_keras.summary import (
    evaluation_summary,
    prediction_table,
    run_summary,
    shorten_middle,
)
from ich_keras.terminal import Command, open_terminal

pty = pytest.importorskip("pty", reason="pseudo-terminals are a matter of Unix")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

ROWS = 24
NEXT = b"\x1b]0;next\x07"  # between two commands of one process; sets a window's title
BAR = "━"


class Screen(pyte.HistoryScreen):
    """A terminal that remembers which rows it wrapped itself, as real ones do for copying."""

    def __init__(self, columns: int):
        super().__init__(columns, ROWS, history=10000)

    def draw(self, data: str) -> None:
        for char in data:
            if self.cursor.x == self.columns:
                self.buffer[self.cursor.y].is_wrapped = True
            super().draw(char)

    def erase_in_line(self, *arguments, **options) -> None:
        self.buffer[self.cursor.y].is_wrapped = False
        super().erase_in_line(*arguments, **options)

    def text(self) -> list[str]:
        """Return scrollback and screen, rows that were wrapped joined again."""
        lines, open_line = [], ""
        for row in [*self.history.top, *(self.buffer[y] for y in range(self.lines))]:
            text = open_line + "".join(row[x].data for x in range(self.columns))
            if getattr(row, "is_wrapped", False):
                open_line = text
            else:
                lines.append(text.rstrip())
                open_line = ""
        return lines


def screens(output: bytes, columns: int) -> list[Screen]:
    """Return the terminal after each command of a process."""
    made = []
    for part in output.split(NEXT):
        screen = Screen(columns)
        pyte.ByteStream(screen).feed(part)
        made.append(screen)
    return made


def on_terminal(script: str, columns: int, *arguments, stdout=None) -> bytes:
    """Run a Python script on a pseudo-terminal and return what it sent there.

    With `stdout`, an open file, only standard error is the terminal.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=slave,
        stdout=stdout or slave,
        stderr=slave,
        cwd=Path(__file__).parents[1],
        env=clean | {"TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    parts = []
    # On Linux reading fails when the last process has closed its end.
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    output = b"".join(parts)
    assert process.wait() == 0, output.decode(errors="replace")
    return output


COMMANDS = """
import sys
from ich_keras import demo
from ich_keras.cli import main
demo.PLANS["light"] = demo.DemoSettings(
    preset="resnet10_2d", num_series=24, matrix=64, size=32, epochs=2
)
first = True
for command in sys.argv[1:]:
    if not first:
        print("\\x1b]0;next\\x07", end="", flush=True)
    first = False
    main(command.split("|"), standalone_mode=False)
"""


def command(*words) -> str:
    return "|".join(map(str, words))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    # With a bracket, which rich would take for markup, and longer than any of the widths.
    return tmp_path_factory.mktemp("a-folder-with-a-long-name-[red]-so-that-paths-are-wrapped")


@pytest.fixture(scope="module")
def shown(work) -> dict[str, Screen]:
    """Demo, train, evaluate and predict, on 80 columns."""
    out = work / "demo"
    images = out / "phantoms" / "images"
    cached = ("--cache", out / "cache")
    output = on_terminal(
        COMMANDS,
        80,
        command("train", "--demo-plan", "light", "--out", out, "--workers", 0, "--seed", 4),
        command(
            *("train", *cached, "--out", work / "run", "--split", "thesis-slices"),
            *("--preset", "resnet10_2d", "--size", 32, "--epochs", 1, "--workers", 0),
        ),
        command("evaluate", "--run", out / "run", *cached, "--split", "valid"),
        command("predict", "--run", out / "run", "--dicom", images, "--out", work / "p", *ONE),
    )
    names = ("demo", "train", "evaluate", "predict")
    return dict(zip(names, screens(output, 80), strict=True))


ONE = ("--workers", 0)


def epoch_lines(run: Path) -> list[str]:
    history = pd.read_csv(run / "history.csv")
    return [
        f"epoch {row.epoch}/{len(history)}: training loss {row.train_loss:.4f}, validation log loss"
        f" {row.valid_log_loss:.4f}, AUROC(any) {row.valid_auroc_any:.4f}"
        for row in history.itertuples()
    ]


def assert_once(screen: Screen, *wanted: str) -> None:
    """Every wanted line is there, whole (after it only what `(best so far)` adds), once."""
    lines = screen.text()
    for line in wanted:
        found = [one for one in lines if one.removesuffix(" (best so far)") == line.rstrip()]
        assert len(found) == 1, f"{len(found)} times: {line}\n" + "\n".join(lines)
    assert not any(BAR in line for line in lines), "a bar is left"


@pytest.mark.slow
def test_the_demo_leaves_its_lines(shown, work):
    screen, run = shown["demo"], work / "demo" / "run"
    assert_once(
        screen,
        *epoch_lines(run),
        "Plan light: 24 series, resnet10_2d at 32x32 pixels, 2 epochs.",
        "Held-out patients (synthetic), slice level:",
        f"Report: {run / 'report.html'}",
    )
    lines = screen.text()
    for label in LABELS:
        row = rf"  {label} +(\d\.\d{{3}}|n/a) +\d+"
        assert sum(bool(re.fullmatch(row, line)) for line in lines) == 1, label
    for step in ("drawing phantoms", "indexing", "caching", "training", "evaluating test"):
        assert sum(line.startswith(f"{step}: done, ") for line in lines) == 1, step
    assert sum(line.startswith(f"Run folder: {run}  (") for line in lines) == 1
    assert not any(line.startswith("validating") for line in lines)


@pytest.mark.slow
def test_train_leaves_its_lines(shown, work):
    run = work / "run"
    assert_once(shown["train"], *epoch_lines(run), *run_summary(run, 80).splitlines())
    warnings = [line for line in shown["train"].text() if line.startswith("Warning: ")]
    assert len(warnings) == 1
    history = pd.read_csv(run / "history.csv")
    assert (history["seconds"] > 0).all()


@pytest.mark.slow
def test_evaluate_and_predict_fit_the_width(shown, work):
    run = work / "demo" / "run"
    assert_once(
        shown["evaluate"],
        f"Written to {run}: metrics-valid.json, predictions-valid.csv",
    )
    series = pd.read_csv(work / "p" / "series.csv")
    assert_once(
        shown["predict"], *prediction_table(series, 80).splitlines(), f"Predictions: {work / 'p'}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit(shown, work, width):
    from ich_keras.files import read_json

    runs = (work / "demo" / "run", work / "run")
    series = pd.read_csv(work / "p" / "series.csv")
    tables = [
        *(run_summary(run, width) for run in runs),
        *(
            evaluation_summary(read_json(run / f"metrics-{split}.json"), split, width)
            for run in runs
            for split in ("valid", "test")
        ),
        prediction_table(series, width),
        prediction_table(series.assign(verdict="irregular, gap, duplicate, tilted"), width),
    ]
    for table in tables:
        for line in table.splitlines():
            assert len(line) <= width or line.startswith(("Report: ", "Run folder: ")), line
    summary = run_summary(runs[0], width)
    assert "say nothing about patients" in " ".join(summary.split())
    assert "voxel counts" in summary


@pytest.mark.parametrize("is_phantom", [True, False])
def test_the_summary_explains_the_rows_that_it_shows(tmp_path, is_phantom):
    """Voxels are counted on phantoms only."""
    labels = np.tile([[0], [1]], (2, len(LABELS)))
    part = binary_metrics(labels, np.full(labels.shape, 0.25))
    if is_phantom:
        part["trivial_auroc_any"] = 0.75
    write_json(tmp_path / "metrics-test.json", {"slice": part})
    write_json(tmp_path / "data.json", {CACHE: "", SYNTHETIC: is_phantom})
    (tmp_path / "history.csv").write_text("epoch,valid_log_loss\n1,0.5\n")
    with h5py.File(tmp_path / "best.weights.h5", "w") as file:
        file.attrs[RECORD] = json.dumps({"epoch": 1})
    summary = run_summary(tmp_path, 80)
    assert "Best epoch: 1 of 1" in summary
    assert "constant: always predicting how common each label is." in summary
    assert ("any, voxel counts" in summary) == is_phantom
    assert ("voxel counts: a detector" in summary) == is_phantom


# What a long training shows: 30 epochs, each validated, more steps than a terminal has rows.
RECORDED = """
import sys, time
import click
from ich_keras.terminal import open_terminal
with open_terminal() as terminal:
    for step in range(30):
        terminal.progress(f"step {step}", 0, 5)
        terminal.progress(f"step {step}", 5, 5)
    for epoch in range(30):
        for batch in range(4):
            terminal.progress("training", 4 * epoch + batch, 120, f"epoch {epoch + 1}/30, loss 0.4")
        terminal.progress("validating", 0, 2)
        time.sleep(0.03)
        terminal.progress("validating", 2, 2)
        terminal.tell(f"epoch {epoch + 1}/30: training loss 0.4123, validation log loss 0.3778")
        if epoch == 7:
            terminal.warn(f"Warning: {sys.argv[1]}")
            print("printed by somebody else")
    terminal.progress("training", 120, 120)
    terminal.tell(f"Report: {sys.argv[1]}/report.md")
print("the end")
"""
PATH = "/data/[bold]runs[/bold]/" + "0123456789" * 12


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_appear_above_the_bars_whole_and_once(width):
    screen = screens(on_terminal(RECORDED, width, PATH), width)[0]
    assert_once(
        screen,
        *(f"epoch {n + 1}/30: training loss 0.4123, validation log loss 0.3778" for n in range(30)),
        *(f"step {n}: done, 5 in 0 s" for n in range(30)),
        f"Warning: {PATH}",
        "printed by somebody else",
        f"Report: {PATH}/report.md",
        "the end",
    )
    lines = [line for line in screen.text() if line]
    assert lines.index("epoch 8/30: training loss 0.4123, validation log loss 0.3778") + 1 == (
        lines.index(f"Warning: {PATH}")
    )
    assert lines[-1] == "the end"


def test_the_running_bar_is_on_the_screen():
    output = on_terminal(RECORDED, 80, PATH).split(b"epoch 25/30: training loss")[0]
    # Without the beginning of what erases them for the next line.
    output = output[: output.rindex(b" left") + len(b" left")]
    screen = screens(output, 80)[0]
    bars = [line for line in screen.display if BAR in line]
    assert any(
        re.match(r"training ━.*/120 epoch 25/30, loss 0.4, \d:\d\d left", line) for line in bars
    )
    assert len(bars) <= 2


def test_results_go_to_a_file_and_bars_to_the_terminal(tmp_path):
    with open(tmp_path / "results.txt", "w") as stream:
        output = on_terminal(RECORDED, 80, PATH, stdout=stream)
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert lines == [
        *(f"epoch {n}/30: training loss 0.4123, validation log loss 0.3778" for n in range(1, 9)),
        "printed by somebody else",
        *(f"epoch {n}/30: training loss 0.4123, validation log loss 0.3778" for n in range(9, 31)),
        f"Report: {PATH}/report.md",
        "the end",
    ]
    assert BAR in output.decode()
    screen = screens(output, 80)[0]
    assert_once(screen, f"Warning: {PATH}", "step 29: done, 5 in 0 s")
    assert not any(line.startswith("epoch") for line in screen.text())


def test_without_a_terminal_there_are_only_lines():
    done = subprocess.run(
        [sys.executable, "-c", RECORDED, PATH],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TERM": "xterm-256color", "FORCE_COLOR": "1"},
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 33
    assert done.stderr.splitlines() == [
        *(line for n in range(30) for line in (f"step {n}: 0/5", f"step {n}: done, 5 in 0 s")),
        "training: 0/120 (epoch 1/30, loss 0.4)",
        f"Warning: {PATH}",
        next(line for line in done.stderr.splitlines() if line.startswith("training: done, 120")),
    ]


def test_lines_come_at_most_once_a_minute(capsys, monkeypatch):
    clock = iter(range(0, 100000, 13))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with open_terminal() as terminal:
        for done in range(12):
            terminal.progress("caching", done, 2000)
        terminal.progress("caching", 2000, 2000)
    assert capsys.readouterr().err.splitlines() == [
        "caching: 0/2,000",
        "caching: 5/2,000, 7 h 12 min left",
        "caching: 10/2,000, 7 h 11 min left",
        "caching: done, 2,000 in 2 min 36 s",
    ]


@pytest.mark.filterwarnings("default")
def test_our_own_warnings_are_one_line(capsys):
    @click.command(cls=Command)
    def command():
        warnings.warn("before the console is open.", IchWarning, stacklevel=2)
        with open_terminal():
            warnings.warn("while it is open.", IchWarning, stacklevel=2)

    with pytest.raises(SystemExit):
        command([])
    assert capsys.readouterr().err.splitlines() == [
        "Warning: before the console is open.",
        "Warning: while it is open.",
    ]
    with pytest.warns(UserWarning, match="another's"):
        warnings.warn("another's", UserWarning, stacklevel=2)


def test_a_step_that_stops_short_still_ends(capsys):
    with open_terminal() as terminal:
        terminal.progress("predicting", 0, 10)
        terminal.progress("predicting", 8, 10)
    assert capsys.readouterr().err.splitlines() == [
        "predicting: 0/10",
        "predicting: 8/10 in 0 s",
    ]
    with pytest.raises(KeyboardInterrupt), open_terminal() as terminal:
        terminal.progress("predicting", 0, 10)
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["predicting: 0/10"]


def test_a_download_of_unknown_length_is_one_line(capsys):
    with open_terminal() as terminal:
        for done in (1, 2, 3):
            terminal.progress("downloading", done, done)
    assert capsys.readouterr().err.splitlines() == ["downloading: done, 1 in 0 s"]


def series_table(num_series: int) -> pd.DataFrame:
    rows = [
        {
            "series_instance_uid": f"1.2.840.113619.2.5.1762583153.{number:012}",
            "num_slices": 30,
            "verdict": "ok",
            **dict.fromkeys(LABELS, 0.1234),
            "any": number / num_series,
        }
        for number in range(num_series)
    ]
    return pd.DataFrame(rows)


def test_a_table_of_predictions():
    table = prediction_table(series_table(25), 80).splitlines()
    assert table[0].split() == ["series", "verdict", "EDH", "IPH", "IVH", "SAH", "SDH", "any"]
    assert table[3].split() == [
        shorten_middle("1.2.840.113619.2.5.1762583153.000000000002", 36),
        "ok",
        *["0.123"] * 5,
        "0.080",
    ]
    assert table[3].split()[0].endswith("000000000002")
    assert table[-1] == "10 more series are in series.csv."
    assert "EDH epidural, IPH intraparenchymal" in table[16]
    wide = prediction_table(series_table(2), 140).splitlines()
    assert wide[0].split() == ["series", "verdict", *LABELS]
    assert wide[1].split()[0] == "1.2.840.113619.2.5.1762583153.000000000000"
    assert len(wide) == 3


def test_rejects_are_counted_with_their_reason():
    from ich_keras.ct.rejects import REJECT_CODES, Reject, reject_table, summary

    codes = {"b": "NOT_DICOM", "c": "TRUNCATED", "a": "NOT_DICOM"}
    table = reject_table(Reject(path, code, f"{path} is odd") for path, code in codes.items())
    assert summary(table) == [
        "2 rejects: NOT_DICOM, not a DICOM file (no preamble with 'DICM')",
        "  first: a: a is odd",
        f"  what to do: {REJECT_CODES['NOT_DICOM'].hint}",
        f"1 reject: TRUNCATED, {REJECT_CODES['TRUNCATED'].meaning}",
    ]


# The real road of the experiments, at two widths; only the data and the runs are stand-ins.
EXPERIMENTS = """
import fcntl, struct, sys, termios
from experiments import __main__ as cli, reproduce
from experiments.report import page

def open_or_make(place, is_other=False, progress=None, tell=None):
    for step in ("drawing phantoms", "indexing", "caching"):
        for done in range(5):
            progress(f"{step} {is_other}", done, 4)
        tell(f"{step} {is_other} told")

reproduce.open_or_make = open_or_make
reproduce.require_same_cache = lambda *arguments: None
reproduce.make_run = lambda place, task, *others: task
reproduce._set_threads = reproduce._free_network = lambda *arguments: None
page.write_report = lambda *arguments, **options: sys.argv[1] + "/report.md"
for columns in (60, 120):
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    cli.main(
        ["all", "--tiny", "--device", "cpu", "--threads", "1", "--work", sys.argv[1]],
        standalone_mode=False,
    )
    print("\\x1b]0;next\\x07", end="", flush=True)
"""


@pytest.mark.slow
def test_experiments_leave_a_line_for_each_run(tmp_path):
    work = tmp_path / "work"
    parts = on_terminal(EXPERIMENTS, 60, work).split(NEXT)
    for width, part in zip((60, 120), parts, strict=False):
        screen = screens(part, width)[0]
        lines = screen.text()
        total = next(
            int(line.split()[0]) for line in lines if line.endswith("the others are finished.")
        )
        assert total > ROWS / 2
        for number in range(1, total + 1):
            assert sum(line.endswith(f": done ({number}/{total})") for line in lines) == 1
        assert_once(
            screen,
            *(f"caching {is_other} told" for is_other in (False, True)),
            *(f"caching {is_other}: done, 4 in 0 s" for is_other in (False, True)),
            f"Report: {work}/report.md",
        )


def test_a_closed_pipe_ends_a_command_without_a_word():
    """As in `weights-convert list | head -1`."""
    script = """
import sys
from weights_convert.cli import main
sys.stdin.readline()  # until the reader has gone
main(["list"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.close()
        child.stdin.write(b"\n")
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 1


def test_a_broken_pipe_inside_a_command_is_an_error():
    def callback():
        raise BrokenPipeError(32, "Broken pipe")

    result = CliRunner().invoke(Command("train", callback=callback), [])
    assert result.exit_code == 4
    assert result.output.startswith("Error: Broken pipe\n")
