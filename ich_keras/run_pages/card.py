"""The data card: what a run was trained and tested on, how it was split, what was refused."""

from typing import Any

from ich_keras.data.cache.cache import CTCache
from ich_keras.data.split import SPLITS, Split
from ich_keras.external_data import described
from ich_keras.labels import LabelSet
from ich_keras.pages.content import Part, Table, Text
from ich_keras.run_folder import PIXELS, PLAN
from ich_keras.run_pages.numbers import column, counted

CARD = "card"  # entry of data.json
_QUARTILES = ("slices_per_series", "slice_spacing_mm", "pixel_spacing_mm", "tilt_degrees")
_MOST_CODES = 30


def data_card(cache: CTCache, labels: LabelSet) -> dict[str, Any]:
    """Describe all of a cache, for data.json: no name and no identifier of a patient.

    Args:
        cache: with labels.
        labels: of the run.
    """
    series = cache.series
    return described(cache, labels, list(labels.names), series) | {
        "reject_codes": _counts(cache.rejects["code"]),
        "kernels": _counts(series["kernel"].replace("", "not said"), 12),
        "size": cache.size,
        "compression": cache.manifest["compression"],
    }


def _counts(values: Any, most: int = _MOST_CODES) -> dict[str, int]:
    found = {str(value): int(count) for value, count in values.value_counts().items()}
    kept = dict(list(found.items())[:most])
    left = sum(found.values()) - sum(kept.values())
    return kept | ({"others": left} if left else {})


def card_parts(data: dict, split: Split | None, card: dict | None, labels: LabelSet) -> list[Part]:
    """Return the section on the data.

    Args:
        data: the content of data.json.
        split: of the run; None where it has none.
        card: as `data_card` makes it; None where nothing describes the data.
        labels: of the run.
    """
    parts: list[Part] = []
    plan = data.get(PLAN)
    if plan is not None:
        rows = [
            [part, *(f"{plan[f'num_{what}'][part]:,}" for what in ("patients", "series", "slices"))]
            for part in SPLITS
        ]
        parts.append(Table("Split", ["part", "patients", "series", "slices"], rows))
    if split is not None:
        parts += _split_parts(data, split)
    if plan is not None and plan.get("num_positive"):
        rows = [[name, f"{count:,}"] for name, count in plan["num_positive"].items()]
        parts.append(Table("Positive samples in training", ["label", "samples"], rows))
    if card is None:
        parts.append(
            Text(
                "This run did not keep a description of its data. Made with the cache of the"
                " training (--cache CACHE), the page has one."
            )
        )
        return parts
    return [*parts, *_described_parts(card, labels)]


def _split_parts(data: dict, split: Split) -> list[Part]:
    drawn = "" if split.seed is None else f", drawn with the seed {split.seed}"
    parts: list[Part] = [Text(f"Split: {split.name}{drawn}.")]
    if split.note:
        parts.append(Text(split.note))
    if split.warning:
        return [*parts, Text(f"Warning: {split.warning}", is_warning=True)]
    pixels = "no equal pixels" if data.get(PIXELS) else "their pixels were not compared"
    audit = f"Audit before training: the parts share no patient, study, series or slice; {pixels}."
    return [*parts, Text(audit)]


def _described_parts(card: dict, labels: LabelSet) -> list[Part]:
    rows = [
        ["patients", f"{card['patients']:,}"],
        ["series", f"{card['series']:,}"],
        ["slices", f"{card['slices']:,}"],
        ["labels are of a", card["label_level"]],
        ["verdicts", counted(card["verdicts"])],
        ["matrix", counted(card["matrix"])],
        ["kernels", counted(card["kernels"])],
        ["repaired slices", f"{card['repaired_slices']:,}"],
        ["cached at", f"{card['size']}x{card['size']}, {card['compression'] or 'uncompressed'}"],
        ["rejected files", f"{card['rejects']:,}"],
        ["reasons", counted(card["reject_codes"])],
    ]
    positive, known = card["series_positive"], card["series_with_label"]
    quartiles = [
        [name.replace("_mm", " (mm)").replace("_", " "), *column(card[name])] for name in _QUARTILES
    ]
    return [
        Table("All of the data", ["property", "value"], rows, has_numbers=False),
        Table(
            "Series with each label",
            ["label", "positive", "with this label"],
            [[name, f"{positive[name]:,}", f"{known[name]:,}"] for name in labels.names],
        ),
        Table(
            "Geometry of the series",
            ["", "lowest", "first quartile", "median", "third quartile", "highest"],
            quartiles,
        ),
    ]
