"""The section "In short": every comparison in one line."""

import itertools
from collections.abc import Mapping, Sequence

from experiments.questions import QUESTIONS
from experiments.report.comparisons import Compared, difference_row
from experiments.report.confounders import confounders
from experiments.report.formatting import HEADLINE, RANKING, Results
from ich_keras.report import markdown_table


def summary_section(compared: Mapping[str, Sequence[Compared]], results: Results) -> list[str]:
    """Return the section with a line per comparison of the questions that `all` answers."""
    rows = []
    for name, question in QUESTIONS.items():
        pairs = compared[name] if question.in_all else ()
        for (one, other, level, difference), metric in itertools.product(pairs, HEADLINE):
            # Slices are balanced in training, series are not: it would be in their log loss.
            if metric != RANKING and len({results[key][0].is_series for key in (one, other)}) > 1:
                continue
            row = difference_row(one, other, level, difference, metric)
            rows.append(
                [
                    name,
                    *row[:7],
                    "; ".join(
                        [row[-1], *confounders(one, other, level, difference.seeds, results)]
                    ),
                ]
            )
    if not rows:
        return []
    header = ["question", "difference", "level", "metric", "mean of the seeds (each)"]
    header += ["95 % interval over patients", "95 % interval over seeds", "seeds"]
    return [
        "## In short",
        "",
        "Differences on the same test patients (AUROC: above 0 means that the first run is better;"
        " log loss: below 0). Log loss is left out where only one of the two runs was trained on"
        " whole series, which are balanced differently. The last column shows where the interval"
        " over patients lies, whether the seeds agree when it excludes 0, and the confounders: what"
        " else differs between the two runs. The runs and all metrics follow below.",
        "",
        markdown_table([*header, "the interval over patients"], rows),
        "",
    ]
