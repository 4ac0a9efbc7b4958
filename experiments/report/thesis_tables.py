"""The thesis's tables 1 to 4 beside our numbers."""

from collections.abc import Sequence
from dataclasses import asdict

from experiments.questions import TABLE_RUNS
from experiments.report.confounders import source_notes, trivial_values
from experiments.report.formatting import Results, absent, bounds, fewer_text, seeds_text, spread
from experiments.results import Result
from experiments.runs import RUNS
from experiments.scores import (
    THESIS_NAMES,
    baseline_values,
    constant_under_convention,
    intervals,
    scored,
    seed_values,
    under_convention,
)
from experiments.tables import PUBLISHED
from ich_keras.labels import LABELS
from ich_keras.metrics.binary import binary_metrics, format_metric
from ich_keras.report import markdown_table

_TABLE_TITLES = {
    1: "loss after four epochs, three networks on slices",
    2: "2D ResNet-18 on slices",
    3: "3D ResNet-18 on whole series",
    4: "3D ResNet-18 on slabs of five slices",
}
# Rows of table 1: the published network, and our runs (patient split, thesis split).
_TABLE_1 = (
    ("2d-pretrained-4-epochs", "2d-pretrained", "2d-pretrained-thesis"),
    ("2d-pretrained-4-epochs", "2d-stand-in", "2d-stand-in-thesis"),
    ("2d-scratch-4-epochs", "2d", "2d-thesis"),
    ("2d-resnet50-4-epochs", "2d-50-pretrained", "2d-50-pretrained-thesis"),
    ("2d-resnet50-4-epochs", "2d-50-stand-in", "2d-50-stand-in-thesis"),
)
TABLE_1_EPOCHS = 4
_CONVENTION = (
    "Thesis convention: the thesis's split, on which the held-out samples also choose the model;"
    " each held-out sample augmented once at random; means over batches of the thesis's size (32"
    " slices, 16 slabs, 1 series), where an undefined rate counts as 0. Not imitated: its reading"
    " faults (zeros for unreadable files, neighbours from the rows of a table), windows before"
    " resizing, normalisation before brightness, and its changing rules for undefined rates."
    " Constants are constant answers, scored on the same samples. Under the convention, the loss"
    " is that of the training set's prevalence, and the other metrics are those of answering"
    ' "no haemorrhage". Skill: 1 - loss / loss of the constant (log loss against the'
    ' prevalence; Hamming loss and error against "no haemorrhage").'
)
_MACRO_NOTE = (
    "Precision, recall, F1 and specificity are means over the labels that have such a rate: a label"
    " that is never predicted has no precision. These and the Hamming metrics have no intervals"
    " (n/a)."
)

METRICS_NOTES = (_CONVENTION, _MACRO_NOTE)


def loss_table(results: Results) -> list[str]:
    """Return table 1: losses after four epochs."""
    rows = []
    for published, sound, thesis in _TABLE_1:
        group = results.get(sound, [])
        if not group and RUNS[sound].depends_on:
            continue  # a stand-in that nobody asked for
        found = intervals(group, "slice") if group else None
        constant = baseline_values(group, "slice", "log_loss")
        skill = [result.info["metrics"]["slice"]["skill"]["log_loss"] for result in group]
        rows.append(
            [
                RUNS[sound].title,
                seeds_text(group),
                format_metric(PUBLISHED[published].loss),
                spread([loss_after(r) for r in results[thesis]])
                + fewer_text(results[thesis], group)
                if thesis in results
                else absent(thesis),
                spread([loss_after(result) for result in group]) if group else absent(sound),
                spread(seed_values(group, "slice", "log_loss")),
                bounds(found["log_loss"] if found else None),
                spread(constant),
                spread([value for value in skill if value is not None], 3),
            ]
        )
    header = ["network", "seeds", "as published", "thesis split and augmentation, validation"]
    header += ["patient split, validation", "patient split, test, epoch kept", "95 % interval"]
    header += ["test, constant: prevalence", "test, skill"]
    return [
        f"## Table 1: {_TABLE_TITLES[1]}",
        "",
        markdown_table(header, rows),
        "",
        f"Validation: log loss after {TABLE_1_EPOCHS} epochs, as published, or after the last epoch"
        f" of a shorter training{_under_way(results)}. Test: log loss of the epoch kept. The two"
        " validation columns differ in the split and in the augmentation of training; the section"
        " *leak* shows the effect of the split alone. Skill: 1 - loss / loss of the constant. The"
        ' constant answer "no haemorrhage" has no finite log loss.',
        "",
        *source_notes([sound for _, sound, _ in _TABLE_1], results),
    ]


def loss_after(result: Result, epochs: int = TABLE_1_EPOCHS) -> float:
    """Return the validation log loss after some epochs, or after the last of fewer."""
    return float(result.history["valid_log_loss"].iloc[min(epochs, len(result.history)) - 1])


def _under_way(results: Results) -> str:
    """Return a remark that the learning rate is still falling, where it is."""
    schedules = {
        result.info["config"]["fit"].get("schedule")
        for _, *keys in _TABLE_1
        for key in keys
        for result in results.get(key, ())
    }
    if "cosine" not in schedules:
        return ""
    return (
        "; our learning rate falls over more epochs (see Runs), so that our trainings are still"
        " under way at that point"
    )


def metrics_table(table: int, results: Results) -> list[str]:
    """Return one of the tables 2 to 4: the metrics of one network."""
    lines = [f"## Table {table}: {_TABLE_TITLES[table]}", ""]
    keys = TABLE_RUNS[table]
    for key in keys:
        if RUNS[key].is_thesis:
            continue
        thesis_key = f"{key}-thesis"
        if key not in results:
            if not RUNS[key].depends_on:
                lines += [f"**{RUNS[key].title}**: {absent(key)}.", ""]
            continue
        lines += [
            f"**{RUNS[key].title}** (seeds {seeds_text(results[key])}; thesis convention: seeds"
            f" {seeds_text(results.get(thesis_key, []))}; {intensity_text(results[key])})",
            "",
            _network_table(results[key], results.get(thesis_key, []), thesis_key),
            "",
            *source_notes([key], results),
        ]
    return lines


def intensity_text(group: Sequence[Result]) -> str:
    """Return the names of the intensities that runs were trained on."""
    names = {
        "windows": "three windows",
        "wide": "one wide range",
        "head-z-score": "z-scores over the head",
        "hu": "HU, for learned windows",
        "bone-windows": "three windows and one for bone",
        None: "intensity not recorded",
    }
    found = {result.info["config"]["data"].get("intensity") for result in group}
    return ", ".join(sorted(names[name] for name in found))


def _network_table(group: Sequence[Result], thesis: Sequence[Result], thesis_key: str) -> str:
    level = "series" if group[0].is_series else "slice"
    name_there = RUNS[group[0].key].published
    assert name_there is not None  # every run of the tables has a published counterpart
    published = asdict(PUBLISHED[name_there])
    convention = [under_convention(result) for result in thesis]
    constant = [constant_under_convention(result) for result in thesis]
    found = intervals(group, level)
    defined = [
        binary_metrics(part.truth, part.values)["defined_labels"]
        for result in group
        if (part := scored(result, level)) is not None
    ]
    rows = []
    for name, ours in THESIS_NAMES.items():
        skill_name = ours if ours in ("log_loss", "hamming_loss", "exact_match") else None
        skills = [result.info["metrics"][level]["skill"].get(skill_name) for result in group]
        rows.append(
            [
                name.replace("_", " "),
                format_metric(published[name]),
                spread([row[name] for row in convention]) if thesis else absent(thesis_key),
                spread([row[name] for row in constant]),
                spread(seed_values(group, level, ours)) + _labels_text(defined, ours),
                bounds((found or {}).get(ours)),
                spread(baseline_values(group, level, ours)),
                spread(baseline_values(group, level, ours, "all_negative")),
                spread([skill for skill in skills if skill is not None], 3),
            ]
        )
    for name in ("auroc/any", "ap/any"):
        is_auroc = name.startswith("auroc")
        counting = f"counting voxels: {spread(trivial_values(group, level))}" if is_auroc else "n/a"
        rows.append(
            [
                name.replace("/", " of "),
                *("n/a", "n/a", "n/a", spread(seed_values(group, level, name))),
                *(bounds((found or {}).get(name)), counting, "n/a", "n/a"),
            ]
        )
    header = ["metric", "as published", "thesis convention", "thesis convention: constant"]
    header += [
        "done properly",
        "95 % interval",
        "constant: prevalence",
        "constant: no haemorrhage",
        "skill",
    ]
    return markdown_table(header, rows)


def _labels_text(defined: Sequence[dict[str, int]], metric: str) -> str:
    """Return the number of labels behind a mean, where some label has no such rate."""
    number = min(numbers.get(metric, len(LABELS)) for numbers in defined)
    return f" ({number} of {len(LABELS)} labels)" if number < len(LABELS) else ""
