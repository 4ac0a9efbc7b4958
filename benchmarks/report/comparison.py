"""`python -m benchmarks compare`: two reports, number by number."""

from collections.abc import Iterable

from benchmarks.records import Place, table
from benchmarks.report.measurement import JOB, Measurement, Report

# What is compared, in order of preference: column, unit, factor from the column to the unit.
_VALUES = (
    ("slices_per_s", "slices/s", 1.0),
    ("peak_bytes", "MiB", 2.0**-20),
    ("tflops", "TFLOP/s", 1.0),
    ("gb_per_s", "GB/s", 1.0),
)
_KEY = ("section", "view", "case", "variant", "precision", "what", "batch")
_HEADER = (*_KEY, "A", "B", "unit", "B / A")
_MOST_NAMES = 12


def described(place: Place) -> str:
    """Say where and when a report was measured, in one line."""
    versions = f"torch {place.torch}, Keras {place.keras}, Python {place.python}"
    threads = f"{place.threads} thread{'' if place.threads == 1 else 's'}"
    return f"{place.device}, {threads}, {versions}, {place.date[:10]}"


def value_of(row: Measurement) -> tuple[float, str] | None:
    """Return the number of a row that is compared, and its unit; None without any."""
    for name, unit, factor in _VALUES:
        value = getattr(row, name)
        if value is not None:
            return value * factor, unit
    return None


def _values(report: Report) -> dict[tuple[str, ...], tuple[float, str]]:
    found: dict[tuple[str, ...], tuple[float, str]] = {}
    for row in report.rows:
        value = value_of(row)
        if row.section != JOB and value is not None:
            # The same case of two jobs (ours beside others) counts once: the first.
            found.setdefault(row.key, value)
    return found


def compared(one: Report, other: Report) -> str:
    """Return a table of the ratios of two reports, and what only one of them has.

    Args:
        one: A.
        other: B; the ratios are B divided by A.
    """
    here, there = _values(one), _values(other)
    lines = [
        (*key, f"{here[key][0]:.4g}", f"{there[key][0]:.4g}", here[key][1], _ratio(*pair))
        for key in here
        if key in there
        for pair in [(here[key][0], there[key][0])]
    ]
    parts = [
        f"A: {described(one.place)} ({one.path})",
        f"B: {described(other.place)} ({other.path})",
    ]
    parts += ["", table(_HEADER, lines) if lines else "They have nothing in common.", ""]
    for name, keys in (("A", here.keys() - there.keys()), ("B", there.keys() - here.keys())):
        if keys:
            parts.append(f"Only in {name} ({len(keys)}): {_listed(keys)}")
    return "\n".join(parts).rstrip()


def _ratio(one: float, other: float) -> str:
    return f"{other / one:.2f}" if one else ""


def _listed(keys: Iterable[tuple[str, ...]]) -> str:
    names = sorted(" ".join(part for part in key if part) for key in keys)
    more = f"; and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return "; ".join(names[:_MOST_NAMES]) + more
