"""Put known faults back, one after the other, and see that their tests fail.

`tests/faults.toml` lists what has gone wrong, or would, with the tests that guard against it. Each
entry names a line of code that keeps the fault out and a line that lets it in again:

    python tests/put_back.py                 # all, about half an hour on two cores
    python tests/put_back.py 21 6.3          # those of these numbers
    python tests/put_back.py --from tests/faults.toml --csv seen.csv

The change is made in a copy of the checkout. First the tests must pass there; with the fault they
must fail. Exit code 1 where a test stays green, or does not pass to begin with.
"""

import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
COPIED = ("ich_keras", "weights_convert", "experiments", "tests", "benchmarks", ".github")
TIME_LIMIT = 300  # seconds for the tests of one fault; a fault that hangs counts as seen


@dataclass(frozen=True)
class Fault:
    """A known fault: `old` in `file` keeps it out, `new` lets it in, `tests` notice."""

    number: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_faults(path: Path) -> list[Fault]:
    """The entries of a list of faults, in its order."""
    with path.open("rb") as source:
        entries = tomllib.load(source)["fault"]
    return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def copy_checkout(target: Path) -> None:
    """Copy what the tests need into `target`."""
    for name in COPIED:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "LICENSE"):
        shutil.copy(path, target)


def run_tests(
    copy: Path, tests: tuple[str, ...], time_limit: float = TIME_LIMIT
) -> tuple[int, str]:
    """Pytest's exit code (-1 beyond the time limit, in seconds) and the last line it wrote."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-m", "slow or not slow", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=time_limit
        )
    except subprocess.TimeoutExpired:
        return -1, "beyond the time limit"
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    return done.returncode, lines[-1]


def see(fault: Fault, copy: Path) -> tuple[str, str]:
    """How the tests of `fault` took it: "red" if they noticed, and pytest's last line."""
    path = copy / fault.file
    whole = path.read_text()
    if whole.count(fault.old) != 1:
        return "stale", f"{fault.old!r} is {whole.count(fault.old)} times in {fault.file}"
    path.write_text(whole.replace(fault.old, fault.new))
    try:
        code, last = run_tests(copy, fault.tests)
    finally:
        path.write_text(whole)
    return ("red" if code in (1, -1) else "GREEN" if code == 0 else f"code {code}"), last


@click.command()
@click.argument("numbers", nargs=-1)
@click.option("--from", "source", type=Path, default=ROOT / "tests" / "faults.toml")
@click.option("--csv", "table", type=Path, help="Also write a table to this file.")
def main(numbers: tuple[str, ...], source: Path, table: Path | None) -> None:
    """Put the faults of these NUMBERS back (all by default) and see their tests fail."""
    faults = [fault for fault in read_faults(source) if not numbers or fault.number in numbers]
    if missing := set(numbers) - {fault.number for fault in faults}:
        raise click.UsageError(f"{source} has no fault {', '.join(sorted(missing))}.")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        copy_checkout(copy)
        every = tuple(dict.fromkeys(test for fault in faults for test in fault.tests))
        code, last = run_tests(copy, every, len(every) * TIME_LIMIT)
        if code != 0 or "skipped" in last:
            raise click.ClickException(f"Without any fault, the tests must pass: {last}")
        for fault in faults:
            start = time.monotonic()
            seen, last = see(fault, copy)
            rows.append((fault.number, fault.what, " ".join(fault.tests), seen, last))
            took = f"{time.monotonic() - start:4.0f} s"
            click.echo(f"{fault.number:>6}  {seen:<6}  {took}  {fault.what}  [{last}]")
            if table:
                with table.open("w", newline="") as target:
                    writer = csv.writer(target, lineterminator="\n")
                    writer.writerow(("number", "fault", "tests", "seen", "pytest"))
                    writer.writerows(rows)
    red = sum(seen == "red" for _, _, _, seen, _ in rows)
    click.echo(f"{red} of {len(rows)} faults were noticed.")
    sys.exit(red != len(rows))


if __name__ == "__main__":
    main()
