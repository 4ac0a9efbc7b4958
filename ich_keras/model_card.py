"""The model card of a run, for pages: what it was trained on, and how good it was on validation."""

from typing import Any

from ich_keras.context import context_sentence
from ich_keras.learned_windows import window_lines
from ich_keras.metrics.binary import format_metric
from ich_keras.notices import NOT_CLINICAL, TRAINED_ON_PHANTOMS
from ich_keras.pages.study import Card
from ich_keras.run_folder import PLAN, SYNTHETIC, RunFolder

_SPLITS = {"valid": "validation", "test": "test"}
_COUNTED = ("patients", "series", "slices")


def model_card(run: RunFolder, title: str = "Model card") -> Card:
    """Return what a reader of a run's answers must know of it.

    Args:
        run: with weights, finished or not.
        title: of the card.

    Raises:
        StaleError: a file of the run is damaged.
    """
    recipe, data = run.recipe(), run.data()
    is_synthetic = bool(data.get(SYNTHETIC))
    view, size = recipe.inputs.view, recipe.inputs.size
    neighbours = f"{view.num_slices} neighbouring slices"
    sample = {"slice": "a slice", "slab": neighbours, "stack": f"{neighbours} as channels"}.get(
        view.kind, f"a series of up to {view.num_slices} slices"
    )
    labels = recipe.labels
    facts = [
        ("Use", f"Research. {NOT_CLINICAL}"),
        ("Run", run.path.resolve().name),
        ("Network", f"{recipe.preset}; it sees {sample} of {size} x {size} pixels"),
        *(("Windows", line) for line in window_lines(run)),
        *_context(run),
        ("Answers", f"{'exactly one of ' if labels.exclusive else ''}{labels}"),
        ("Trained on", "drawn phantoms only" if is_synthetic else "head CT"),
        *_counts(data.get(PLAN)),
        ("Started from", recipe.training.weights or "random weights"),
        *(("Settings", line) for line in recipe.input_options),
    ]
    warnings = [run.notice()] if run.notice() else []
    if is_synthetic:
        warnings.append(TRAINED_ON_PHANTOMS)
    metrics = {name: run.metrics(name) for name in _SPLITS}
    level = "series" if any("series" in (found or {}) for found in metrics.values()) else "slice"
    splits = {name: found[level] for name, found in metrics.items() if found and level in found}
    if not splits:
        return Card(title, facts, warnings)
    scores = [
        [label, *(cell for part in splits.values() for cell in _cells(part, label))]
        for label in labels.names
    ]
    header = [
        "label",
        *(name for split in splits for name in (f"AUROC, {_SPLITS[split]}", "positive")),
    ]
    return Card(
        title,
        facts,
        warnings,
        f"Area under the ROC curve per {level}; in brackets 95 % intervals, patients resampled"
        f"{'; on drawn phantoms' if is_synthetic else ''}",
        header,
        scores,
    )


def _context(run: RunFolder) -> list[tuple[str, str]]:
    sentence = context_sentence(run)
    return [("Context", sentence)] if sentence else []


def _counts(plan: Any) -> list[tuple[str, str]]:
    if not plan:
        return []
    found = []
    for name, title in (("train", "Training data"), ("valid", "Validation"), ("test", "Test")):
        numbers = [f"{plan[f'num_{what}'][name]:,} {what}" for what in _COUNTED]
        found.append((title, ", ".join(numbers)))
    return found


def _cells(part: dict, label: str) -> tuple[str, str]:
    """Return the AUROC of a label with its interval, and how many are positive of how many."""
    text = format_metric(part["auroc"].get(label), 3)
    intervals = (part.get("intervals") or {"metrics": {}})["metrics"]
    interval = intervals.get(f"auroc/{label}")
    if interval is not None and interval["low"] is not None:
        text = f"{text} ({interval['low']:.3f} to {interval['high']:.3f})"
    positive = part["n"]["positive"].get(label)
    return text, "n/a" if positive is None else f"{positive:,} of {part['n']['samples']:,}"
