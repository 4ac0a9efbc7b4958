"""Every declared run in one Markdown table: purpose, command, machine, time, published number."""

from experiments.declare import chosen_runs, seeds_of
from experiments.questions import QUESTIONS, TABLE_RUNS, TABLES
from experiments.runs import RUNS
from experiments.scales import SCALES
from experiments.tables import PUBLISHED
from experiments.times import IN_FLOAT32, TWO_AT_A_TIME, expected_seconds, expected_time
from ich_keras.report import markdown_table

_OPTION = {"tiny": "--tiny", "small": "--small", "rsna": "--dicom DIR --labels CSV"}
_MACHINE = {"tiny": "2 cores", "small": "2 cores", "rsna": "1 GPU"}


def needed_for(key: str) -> list[str]:
    """Return the tables and questions that need a run, in the words of the command line.

    >>> needed_for("2d-leaky")
    ['question leak']
    """
    found = [f"table {table}" for table, keys in TABLE_RUNS.items() if key in keys]
    found += [f"question {name}" for name, question in QUESTIONS.items() if key in question.runs]
    dependants = [f"run {other}" for other, run in RUNS.items() if key in run.depends_on]
    return found or dependants


def listing() -> str:
    """Return the table."""
    everything = {
        name: set(chosen_runs(scale, tuple(TABLE_RUNS), tuple(QUESTIONS)))
        for name, scale in SCALES.items()
    }
    rows = []
    for key, run in RUNS.items():
        needed = needed_for(key)
        command = next((n for n in needed if not n.startswith("run ")), None)
        if command is None:
            command = needed_for(needed[0].removeprefix("run "))[0]
        scales = [name for name in SCALES if key in everything[name]]
        published = PUBLISHED[run.published].loss if run.published else None
        rows.append(
            [
                f"`{key}`",
                run.title,
                ", ".join(needed),
                f"`python -m experiments {command} {_OPTION[min(scales, key=list(SCALES).index)]}`"
                if scales
                else "n/a",
                ", ".join(f"{name} ({_MACHINE[name]})" for name in scales),
                ", ".join(f"{name} {expected_time(key, SCALES[name])}" for name in scales),
                "n/a" if published is None else f"loss {published:.4f}",
            ]
        )
    header = ["run", "what", "for", "command", "scales (machine)", "one seed on one core"]
    return "\n".join(
        [markdown_table([*header, "published"], rows), "", *(_total(name) for name in SCALES)]
    )


def _total(name: str) -> str:
    """Return a line on how long `all` takes, without runs that need converted weights."""
    scale = SCALES[name]
    asked = tuple(question for question, found in QUESTIONS.items() if found.in_all)
    keys = chosen_runs(scale, TABLES, asked)
    if not scale.is_synthetic:
        return f"`all` at {name}: {len(keys)} runs; not measured."
    runs = [
        (key, seed)
        for key in keys
        if not RUNS[key].needs_weights
        for seed in seeds_of(key, scale.seeds, scale)
    ]
    hours = sum(expected_seconds(key, scale) or 0.0 for key, _ in runs) / 3600
    return (
        f"`all --{name}`: {len(runs)} trainings, about {hours:.1f} h on one core,"
        f" {hours / 2 * TWO_AT_A_TIME:.1f} h with --jobs 2 on two; on processors without"
        f" instructions for bfloat16 about {IN_FLOAT32} times that."
    )
