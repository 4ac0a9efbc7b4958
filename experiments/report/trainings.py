"""The section on the runs: what was trained, where, for how long."""

from collections.abc import Sequence

from experiments.report.confounders import behind_notes, early_notes, kept_epoch, trained_on
from experiments.report.formatting import Results, mean_text, spread
from experiments.runs import RUNS
from ich_keras.report import markdown_table

_OF_HEADS = (
    " Of a sequence head, samples are series, and operations and seconds its own with those of the"
    " features; the section `context` adds its slice network's."
)


def runs_section(results: Results) -> list[str]:
    """Return the section on the runs, one row each."""
    rows = []
    for key in RUNS:
        if key not in results:
            continue
        group = results[key]
        infos = [result.info for result in group]
        rows.append(
            [
                f"`{key}`",
                RUNS[key].title,
                ", ".join(str(result.seed) for result in group),
                "; ".join(sorted(set(map(trained_on, infos)))),
                mean_text([info["patients"]["train"] for info in infos], 0),
                mean_text([info["patients"]["test"] for info in infos], 0),
                _fitting_text(infos),
                ", ".join(f"{kept_epoch(result)} of {len(result.history)}" for result in group),
                mean_text([info["steps"] for info in infos], 0),
                mean_text([info["samples_seen"] for info in infos], 0),
                mean_text([info["training_operations"] / 1e12 for info in infos], 1),
                spread([info["seconds"] for info in infos], 0),
            ]
        )
    header = ["run", "description", "seeds", "trained on", "training patients", "test patients"]
    header += [
        "learning rate, batch",
        "epoch kept",
        "steps",
        "samples seen",
        "operations (10^12 multiply-adds)",
        "seconds",
    ]
    return [
        "## Runs",
        "",
        "Means over seeds. Precision: bfloat16 where the device has instructions for it, otherwise"
        " float32. Epoch kept: the one with the lowest validation log loss, of all epochs, for each"
        " seed. Operations: three times the forward pass, for all training samples. Seconds"
        " (range): training, and validation after each epoch, in one process; they cannot be"
        " compared between devices or precisions."
        + (_OF_HEADS if any(RUNS[key].on for key in results) else ""),
        "",
        markdown_table(header, rows),
        "",
        *behind_notes([key for key in RUNS if key in results], results),
        *early_notes([key for key in RUNS if key in results], results),
    ]


def _fitting_text(infos: Sequence[dict]) -> str:
    fits = [info["config"]["fit"] for info in infos]
    return "; ".join(sorted({f"{fit['learning_rate']:g}, {fit['batch_size']}" for fit in fits}))
