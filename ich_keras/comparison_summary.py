"""The comparison of runs as tables for a terminal."""

import textwrap

from ich_keras.notices import SYNTHETIC_RUNS_NOTE
from ich_keras.run_pages.comparison import Comparison
from ich_keras.run_pages.comparison_page import READING, about_level, comparison_rows
from ich_keras.summary import shorten_middle, text_table


def comparison_text(comparison: Comparison, width: int) -> str:
    """Lay the comparison out for a terminal.

    Args:
        comparison: as `compare` returns it.
        width: columns.
    """
    parts = []
    if comparison.is_synthetic:
        parts.append(textwrap.fill(SYNTHETIC_RUNS_NOTE.replace("*", ""), width))
    keys = [chr(ord("A") + number) for number in range(len(comparison.names))]
    parts.append(
        "\n".join(f"{key}  {name}" for key, name in zip(keys, comparison.names, strict=True))
    )
    for level, found in comparison.levels.items():
        header = [f"per {level}", "A"]
        for key in keys[1:]:
            header += [key, f"{key} - A", "95 % interval"]
        rows = comparison_rows(comparison, found)
        lines = [text_table([header, *rows])]
        if max(map(len, lines[0].splitlines())) > width:
            lines = _by_run(keys, rows, width, level)
        lines += [textwrap.fill(line, width) for line in about_level(comparison, level, found)]
        parts.append("\n".join(lines))
    room = max(12, (width - 24) // len(keys) - 2)
    if comparison.settings:
        rows = [
            [shorten_middle(row[0], 24), *(shorten_middle(value, room) for value in row[1:])]
            for row in comparison.settings
        ]
        parts.append(text_table([["differs", *keys], *rows], left=len(keys) + 1))
    else:
        parts.append("Their settings are the same.")
    parts.append(textwrap.fill(READING, width))
    return "\n\n".join(parts)


def _by_run(keys: list[str], rows: list[list[str]], width: int, level: str) -> list[str]:
    """Lay out one table for each later run."""
    tables = []
    for number, key in enumerate(keys[1:]):
        start = 2 + 3 * number
        header = [f"per {level}", "A", key, f"{key} - A", "95 % interval"]
        tables.append(text_table([header, *([*row[:2], *row[start : start + 3]] for row in rows)]))
    return tables
