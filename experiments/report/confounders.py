"""Limits of the comparisons, computed from the results: too few seeds or patients, seeds that
disagree, and confounders: networks that have not learned, early epochs, trainings on different
devices, in different precisions or with different versions."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from experiments.report.formatting import LEAST_PATIENTS, LEAST_SEEDS, RANKING, Results
from experiments.results import Result
from experiments.runs import RUNS
from experiments.scores import LEVELS, seed_values
from ich_keras.metrics.binary import format_metric

# A bound this near to 0, as a share of the interval's width, counts as 0: a little more than twice
# the standard error (.022) of a bound from 1,000 resamples of a normal distribution.
_NEAR = 0.05


def verdict(row: dict, patients: int, per_seed: Sequence[float]) -> str:
    """Describe where an interval over patients lies, and whether the seeds agree with it.

    Args:
        row: has "low" and "high".
        patients: how many were resampled.
        per_seed: the difference of each seed.
    """
    if patients < LEAST_PATIENTS:
        return "too few patients"
    if len(per_seed) < LEAST_SEEDS:
        return "too few seeds"
    low, high = row["low"], row["high"]
    if low is None:
        return "not defined often enough"
    if min(abs(low), abs(high)) < _NEAR * (high - low):
        position = "ends at about 0"
    elif low > 0 or high < 0:
        position = "above 0" if low > 0 else "below 0"
    else:
        return "includes 0"
    if min(per_seed) < 0 < max(per_seed):
        return f"{position}; the seeds disagree"
    first, last = _over_seeds(per_seed)
    return f"{position}; interval over seeds includes 0" if first <= 0 <= last else position


def over_seeds(values: Sequence[float], digits: int = 4) -> str:
    """Return the 95 % interval of a mean over seeds by Student's t; "n/a" below three seeds.

    >>> over_seeds([1.0, 2.0, 3.0], digits=3)
    '-0.484 to 4.484'
    """
    if len(values) < LEAST_SEEDS:
        return "n/a"
    low, high = _over_seeds(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    reach = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def trivial_values(results: Sequence[Result], level: str) -> list[float]:
    """Return the AUROC(any) of the detector that counts voxels, per seed."""
    found = (result.info["trivial_auroc_any"][level] for result in results)
    return [value for value in found if value is not None]


def behind(group: Sequence[Result], level: str) -> list[int]:
    """Return the seeds whose network ranks no better than counting voxels."""
    return [
        result.seed
        for result in group
        if (values := seed_values([result], level, RANKING))
        and (counting := trivial_values([result], level))
        and values[0] <= counting[0]
    ]


def behind_notes(keys: Iterable[str], results: Results) -> list[str]:
    """Return a note on the trainings that rank no better than counting voxels."""
    named = []
    for key in keys:
        for level in LEVELS:
            seeds = behind(results[key], level)
            if seeds:
                is_every = len(seeds) == len(results[key]) > 1
                which = "every seed" if is_every else f"of seed {' and '.join(map(str, seeds))}"
                named.append(f"`{key}` per {level} ({which})")
    if not named:
        return []
    return [
        f"**Not above counting voxels** in AUROC(any): {', '.join(named)}. Such a network has"
        " learned no more than a count of voxels shows; a comparison with it means little else.",
        "",
    ]


def source_notes(keys: Iterable[str], results: Results) -> list[str]:
    """Return notes on runs whose source has not learned, or was trained again since.

    A source has not learned when it ranks no better than counting voxels.
    """
    notes = []
    for key in keys:
        for source in RUNS[key].depends_on:
            if key not in results or source not in results:
                continue
            if behind_notes([source], results):
                notes += [
                    f"`{key}` starts from `{source}`, which does not rank above counting voxels"
                    " itself. It shows little about starting from learned weights.",
                    "",
                ]
            made = results[source][0].info
            older = [str(r.seed) for r in results[key] if _is_before(r.info, made)]
            if older:
                notes += [
                    f"`{key}` of seed {' and '.join(older)} is older than the stored result of"
                    f" `{source}` ({made['date']}): it started from an earlier training of it.",
                    "",
                ]
    return notes


def _is_before(one: dict, other: dict) -> bool:
    """Whether a training began before another; older results record only the day."""
    times = [info["environment"].get("started", info["date"]) for info in (one, other)]
    length = min(map(len, times))
    return times[0][:length] < times[1][:length]


def kept_epoch(result: Result) -> int:
    """Return the epoch whose weights were kept, from 1; older results do not record it."""
    if "best_epoch" in result.info:
        return int(result.info["best_epoch"])
    row = result.history["valid_log_loss"].idxmin()
    return int(result.history["epoch"][row])


def early(group: Sequence[Result]) -> list[int]:
    """Return the seeds whose kept epoch lies in the first half of the training."""
    return [result.seed for result in group if 2 * kept_epoch(result) <= len(result.history)]


def early_notes(keys: Iterable[str], results: Results) -> list[str]:
    """Return a note on trainings whose scored model saw at most half of the epochs."""
    named = []
    for key in keys:
        group = [result for result in results[key] if result.seed in early(results[key])]
        if not group:
            continue
        epochs = ", ".join(f"{kept_epoch(r)} of {len(r.history)}" for r in group)
        kept, last = (
            _mean_ranking([r.history["valid_auroc_any"].iloc[row(r)] for r in group])
            for row in (lambda r: r.history["valid_log_loss"].argmin(), lambda r: -1)
        )
        named.append(f"`{key}` (epochs {epochs}; {kept} and {last})")
    if not named:
        return []
    return [
        "**Early epochs kept.** The scored model is that of the epoch with the lowest validation"
        " log loss. For the following runs it lies in the first half of the training (in brackets:"
        " the epochs kept; the AUROC of `any` on validation at that epoch and after the last):"
        f" {'; '.join(named)}. Such a model saw only a part of the steps and operations listed, and"
        " a comparison with it also depends on how the epoch was chosen.",
        "",
    ]


def _mean_ranking(values: Sequence[float]) -> str:
    """Return a mean AUROC as text; "n/a" where a value is undefined."""
    mean = float(np.mean(values))
    return format_metric(None if np.isnan(mean) else mean, 3)


def unlike_places(pairs: Iterable[tuple[str, str, Sequence[int]]], results: Results) -> list[str]:
    """Return a note on compared trainings with other devices, precisions or backend versions.

    Args:
        pairs: (one, other, the seeds compared).
        results: of both.
    """
    named = []
    for one, other, seeds in dict.fromkeys((a, b, tuple(s)) for a, b, s in pairs):
        differing = _unlike(one, other, seeds, results)
        if differing:
            named.append(f"`{one}` - `{other}` (seed {', '.join(map(str, differing))})")
    if not named:
        return []
    return [
        "The compared runs were trained on different devices, in different precisions or with"
        f" different versions (see Runs), which is part of the difference: {', '.join(named)}.",
        "",
    ]


def _unlike(one: str, other: str, seeds: Sequence[int], results: Results) -> list[int]:
    places = [{r.seed: trained_on(r.info) for r in results[key]} for key in (one, other)]
    return [seed for seed in seeds if places[0][seed] != places[1][seed]]


def confounders(
    one: str, other: str, level: str, seeds: Sequence[int], results: Results
) -> list[str]:
    """Name what else differs between two compared runs, in few words."""
    found = []
    for problem, seeds_with in (
        ("not above counting voxels", lambda group: behind(group, level)),
        ("early epoch kept", early),
    ):
        named = [
            f"`{key}` (seed {', '.join(map(str, these))})"
            for key in (one, other)
            if (these := sorted({*seeds_with(results[key])} & {*seeds}))
        ]
        found += [f"{problem}: {', '.join(named)}"] if named else []
    differing = _unlike(one, other, seeds, results)
    if differing:
        named_seeds = ", ".join(map(str, differing))
        found.append(f"other device, precision or version (seed {named_seeds})")
    return found


def trained_on(info: dict) -> str:
    """Return the device, precision and backend that a run was trained on."""
    backend = info["environment"]["backend"]
    version = info["environment"]["versions"].get(backend)
    return f"{info['machine']['device']}, {info['config']['precision']}, {backend} {version}"
