"""One answer per study: the series that counts, and what the others say.

A study often holds one scan several times: with a soft and a sharp kernel, in thick and thin
slices. Its answer is that of one series, chosen by a rule that looks at no probability:

1. with a head in it (not `empty`) before others;
2. without a fault (verdict "ok") before others;
3. a soft kernel before one whose name says nothing, that before a sharp one (bone, lung);
4. without contrast medium, as far as tags say, before with it;
5. the slice distance nearest to 5 mm, in steps of half a millimetre;
6. more slices; then the order of the series table.

Where another series of the study decides a label otherwise, the study says so. It is `operated`
where any of its series shows a gap in the skull.
"""

import pandas as pd

from ich_keras.ct.kernels import is_sharp
from ich_keras.ct.traits import YES
from ich_keras.labels import LabelSet

USUAL_SPACING_MM = 5.0  # of the heads that networks here were trained on
_STEP_MM = 0.5
_UID = "series_instance_uid"
RULE = (
    "Of each study one series counts: verdict ok, soft kernel, no contrast medium, slice distance"
    " nearest to 5 mm, most slices, in this order."
)


def study_table(answers: pd.DataFrame, series: pd.DataFrame, labels: LabelSet) -> pd.DataFrame:
    """Return one row per study.

    Args:
        answers: of series, as `FolderPrediction.series`.
        series: the series table of their index.
        labels: the answered ones.

    Returns:
        study_instance_uid; series_instance_uid, kernel and slice_spacing_mm of the series that
        counts; num_series; its answers; and `disagreement`: labels that another series of the study
        decides otherwise, joined by ";". The last is empty where there are no decisions.
    """
    facts = series.set_index("series_uid")[
        ["study_instance_uid", "kernel", "slice_spacing_mm"]
    ].rename_axis(_UID)
    table = answers.join(facts, on=_UID)
    # Series without a study are studies of their own.
    table["study"] = table["study_instance_uid"].where(
        table["study_instance_uid"] != "", table[_UID]
    )
    rank = pd.DataFrame(
        {
            "empty": table["empty"] == YES if "empty" in table else False,
            "fault": table["verdict"] != "ok",
            "kernel": table["kernel"].map(_sharpness),
            "contrast": table["contrast"] == YES if "contrast" in table else False,
            "spacing": ((table["slice_spacing_mm"].abs() - USUAL_SPACING_MM).abs() / _STEP_MM)
            .round()
            .fillna(1e9),
            "slices": -table["num_slices"],
        }
    )
    order = rank.sort_values(list(rank.columns), kind="stable").index
    chosen = table.loc[order].drop_duplicates("study").sort_index()
    by_study = table.groupby("study", sort=False)
    decisions = [name for name in labels.names if f"decision_{name}" in table]
    differing = {
        study: ";".join(
            name
            for name in decisions
            if part[f"decision_{name}"].replace("", pd.NA).dropna().nunique() > 1
        )
        for study, part in by_study
    }
    first = ["study_instance_uid", _UID, "kernel", "slice_spacing_mm"]
    found = chosen[first].copy()
    found["num_series"] = by_study.size().reindex(chosen["study"]).to_numpy()
    found["disagreement"] = chosen["study"].map(differing).to_numpy()
    rest = [name for name in answers.columns if name not in found]
    found = pd.concat([found, chosen[rest]], axis=1).reset_index(drop=True)
    if "operated" in found:
        operated = set(table["study"][table["operated"] == YES])
        found["operated"] = [YES if study in operated else "" for study in chosen["study"]]
    return found


def _sharpness(kernel: str) -> int:
    found = is_sharp(kernel)
    return 1 if found is None else 2 * found
