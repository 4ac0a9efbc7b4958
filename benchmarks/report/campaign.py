"""`python -m benchmarks cpu` and `gpu`: job after job, each in a fresh process, within a budget."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.records import Place, file_name, now, write_csv
from benchmarks.report.children import Child
from benchmarks.report.jobs import CEILINGS, CPU, Job, jobs_of
from benchmarks.report.measurement import (
    DONE,
    FAILED,
    JOB,
    LEFT_OUT,
    STEM,
    TINY_STEM,
    Measurement,
    Report,
    finished,
    read_report,
)
from ich_keras import files
from ich_keras.errors import EnvironmentProblem, StaleError
from ich_keras.progress import Tell

# Before a job is stopped: this many times as long as expected, but not less than that.
_PATIENCE = 4
_LEAST_SECONDS = 60
# Less time than this is not worth starting a process in.
_SHORTEST_SECONDS = 5
_SECONDS_TO_START = 180


@dataclass(frozen=True)
class Machine:
    """What the report must know about a machine before it measures.

    Args:
        place: device and versions.
        precision: the fast one: "bfloat16", or "float32" where the hardware has none.
    """

    place: Place
    precision: str


@dataclass
class Campaign:
    """The run of one report.

    Args:
        kind: "cpu" or "gpu".
        place: device and versions.
        path: the CSV.
        patients: how many patients' voxels a batch holds.
        is_tiny: a trial.
        tell: called with a line per job.
        rows: what has been measured already.
    """

    kind: str
    place: Place
    path: Path
    patients: int
    is_tiny: bool
    tell: Tell
    rows: list[Measurement] = field(default_factory=list)

    def run(self, jobs: list[Job], seconds: float, clock: Callable[[], float]) -> None:
        """Run what has not been run yet, in order, and say what was left out.

        Args:
            jobs: all of them.
            seconds: the budget. A job that is expected to take longer than what is left of it is
                left out; later, shorter ones are still tried.
            clock: returns seconds.
        """
        end = clock() + seconds
        done = finished(self.rows)
        for number, job in enumerate(jobs, 1):
            if job.name in done:
                continue
            left, expected = end - clock(), self._expected(job, jobs)
            head = f"[{number}/{len(jobs)}] {job.name}"
            if left < max(_SHORTEST_SECONDS, expected):
                note = f"needs about {expected:.0f} s; {max(0, left):.0f} s left"
                self._end(job, LEFT_OUT, None, note)
                continue
            self.tell(f"{head} (about {expected:.0f} s)")
            # What an earlier try measured stays until there is a new one.
            self.rows = [row for row in self.rows if row.job != job.name]
            begun = clock()
            limit = min(left, max(_LEAST_SECONDS, _PATIENCE * expected))
            word, note = self._measure(job, limit, is_last=limit == left)
            self._end(job, word, clock() - begun, note)
            if note:
                self.tell(f"  {word}: {note}")
        self._write()

    def _expected(self, job: Job, jobs: list[Job]) -> float:
        """Scale a job's estimate by what the jobs so far took."""
        if self.is_tiny:
            return 0
        known = {other.name: other.seconds for other in jobs}
        took = [
            (row.ms_median / 1e3, known[row.job])
            for row in self.rows
            if row.section == JOB and row.what == DONE and row.ms_median and row.job in known
        ]
        if len(took) < 2:  # the first alone says little
            return job.seconds
        return job.seconds * sum(seconds for seconds, _ in took) / sum(s for _, s in took)

    def _measure(self, job: Job, limit: float, is_last: bool) -> tuple[str, str]:
        """Run one job; return what became of it, and why."""
        command = ["job", "--name", job.name, *self._options(), "--seconds", f"{limit:.0f}"]
        lines = 0
        with Child(command, limit) as child:
            for line in child.lines():
                if line.startswith("{"):  # a library may print something of its own
                    self._keep(job, json.loads(line))
                    lines += 1
        if child.is_late:
            word = LEFT_OUT if is_last else FAILED
            return word, f"stopped after {limit:.0f} s"
        if child.problem:
            return FAILED, child.problem
        return DONE, "" if lines else "nothing to measure here"

    def _options(self) -> list[str]:
        tiny = ["--tiny"] if self.is_tiny else []
        device = "cpu" if self.kind == CPU else "cuda"
        options = ["--device", device, "--threads", str(self.place.threads)]
        return [*options, "--patients", str(self.patients), *tiny]

    def _keep(self, job: Job, found: dict[str, Any]) -> None:
        row = Measurement(kind=self.kind, job=job.name, patients=self.patients, date=now(), **found)
        self.rows.append(with_shares(row, self.rows))
        self._write()

    def _end(self, job: Job, word: str, seconds: float | None, note: str) -> None:
        # What a job measured before it failed is kept beside the reason.
        self.rows = [row for row in self.rows if (row.job, row.section) != (job.name, JOB)]
        self.rows.append(
            Measurement(
                self.kind,
                job.name,
                JOB,
                case=job.network,
                variant=" + ".join(job.variants),
                precision=job.precision,
                what=word,
                ms_median=None if seconds is None else seconds * 1e3,
                patients=self.patients,
                note=note,
                date=now(),
            )
        )
        self._write()

    def _write(self) -> None:
        if self.rows:
            write_csv(self.path, self.rows, self.place)


def with_shares(row: Measurement, rows: list[Measurement]) -> Measurement:
    """Add the shares of the measured ceilings.

    Args:
        row: of any section.
        rows: among them the ceilings of the same run.
    """
    ceilings = {(r.what, r.precision): r for r in rows if r.section == CEILINGS}
    if row.section == CEILINGS:
        return row
    product, copy = ceilings.get(("matmul", row.precision)), ceilings.get(("copy", ""))
    if product is not None and row.tflops is not None and product.tflops:
        row = replace(row, matmul_share=row.tflops / product.tflops)
    if copy is not None and row.gb_per_s is not None and copy.gb_per_s:
        row = replace(row, copy_share=row.gb_per_s / copy.gb_per_s)
    return row


def examine(device: str, threads: int) -> Machine:
    """Ask a process of its own about the machine, so that this one holds no memory of a GPU.

    Args:
        device: "cpu" or "cuda".
        threads: threads of torch on the CPU.

    Raises:
        EnvironmentProblem: the device cannot be used.
    """
    options = ["--device", device, "--threads", str(threads)]
    with Child(["place", *options], _SECONDS_TO_START) as child:
        lines = list(child.lines())
    if child.problem or not lines:
        raise EnvironmentProblem(
            child.problem or f"{device} did not answer within {_SECONDS_TO_START} seconds.",
            "`ich doctor` says what can be used here.",
        )
    found = json.loads(lines[-1])
    return Machine(Place(**found["place"]), found["precision"])


def find_unfinished(folder: Path, name: str, patients: int, jobs: list[Job]) -> Report | None:
    """Return the newest report of the same device, versions and batches, if it is not finished.

    Args:
        folder: where reports lie.
        name: that a new one would get; only its date may differ.
        patients: how many patients' voxels a batch holds.
        jobs: of a finished report.
    """
    prefix = name.rpartition("_")[0]
    for path in sorted(folder.glob(f"{prefix}_*.csv"), reverse=True):
        report = read_report(path)
        if report.rows[0].patients != patients:
            continue
        ends = {name: end.what for name, end in report.ends.items()}
        is_unfinished = any(ends.get(job.name, LEFT_OUT) == LEFT_OUT for job in jobs)
        return report if is_unfinished else None
    return None


def require_same(
    report: Report, kind: str, place: Place, patients: int, is_tiny: bool = False
) -> None:
    """Refuse to go on with the report of another machine, with other batches, or with a trial.

    Raises:
        StaleError: something differs.
    """
    there = {**vars(report.place), "kind": report.kind, "patients": report.rows[0].patients}
    there["--tiny"] = report.path.name.startswith(TINY_STEM)
    here = {**vars(place), "kind": kind, "patients": patients, "--tiny": is_tiny}
    for name in here:
        if name != "date" and there[name] != here[name]:
            raise StaleError(
                f"{report.path} was measured with {name} {there[name]!r}; here it is"
                f" {here[name]!r}.",
                "Leave --resume out to begin a new report.",
            )


def conduct(
    kind: str,
    minutes: float,
    patients: int,
    threads: int,
    folder: Path,
    resume: Path | None,
    is_fresh: bool,
    is_tiny: bool,
    tell: Tell,
    only: tuple[str, ...] = (),
) -> Path:
    """Measure a report, or go on with one.

    Args:
        kind: "cpu" or "gpu".
        minutes: the budget.
        patients: how many patients' voxels a batch holds.
        threads: threads of torch on the CPU.
        folder: where the CSV goes.
        resume: go on with this file; None looks for the newest one of this machine and versions
            that left something out.
        is_fresh: begin a new file, even if there is an unfinished one.
        is_tiny: a trial.
        tell: called with each line for the user.
        only: tasks of `benchmarks.report.jobs`; () runs all jobs.

    Returns:
        The CSV.

    Raises:
        EnvironmentProblem: the device cannot be used.
        StaleError: another report is being measured, or `resume` is of another machine.
        DataError: `resume` is no report.
    """
    end = time.monotonic() + minutes * 60
    folder = folder if resume is None else resume.parent
    folder.mkdir(parents=True, exist_ok=True)
    # Times taken side by side mean nothing.
    with files.lock(folder / ".report.lock", is_kept=False):
        machine = examine("cpu" if kind == CPU else "cuda", threads)
        jobs = [job for job in jobs_of(kind, machine.precision) if not only or job.task in only]
        name = file_name(TINY_STEM if is_tiny else STEM, machine.place, "")
        report = None
        if resume is not None:
            report = read_report(resume)
            require_same(report, kind, machine.place, patients, is_tiny)
        elif not is_fresh:
            report = find_unfinished(folder, name, patients, jobs)
        place = report.place if report else machine.place
        path = report.path if report else folder / name
        rows = list(report.rows) if report else []
        if report:
            tell(f"Going on with {path}: {len(finished(rows))} jobs are done.")
        campaign = Campaign(kind, place, path, patients, is_tiny, tell, rows)
        campaign.run(jobs, end - time.monotonic(), time.monotonic)
    tell(summary(read_report(path)))
    return path


def summary(report: Report) -> str:
    """Say what was measured and what was not."""
    ends = report.ends
    lines = [f"{sum(end.what == DONE for end in ends.values())} of {len(ends)} jobs done."]
    for word in (FAILED, LEFT_OUT):
        chosen = [f"  {name}: {end.note}" for name, end in ends.items() if end.what == word]
        lines += [f"{word.capitalize()}:", *chosen] if chosen else []
    if any(end.what == LEFT_OUT for end in ends.values()):
        lines.append("The same command goes on with what was left out.")
    return "\n".join(lines)
