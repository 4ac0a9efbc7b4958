"""The runs of a prediction: one, or several whose answers are averaged (an ensemble)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ich_keras.context import Context, context_sentence
from ich_keras.ct.rejects import nothing_usable
from ich_keras.ct.tables import csv_text
from ich_keras.data.thin_series import SliceDistances
from ich_keras.domain import DISTANCE, INSIDE, OUTSIDE, VERDICT, Domain
from ich_keras.errors import UsageError
from ich_keras.files import atomic_write, fingerprint, sha256_of
from ich_keras.inference import load_run, network_digest
from ich_keras.labels import LabelSet
from ich_keras.leftovers import remove_leftovers
from ich_keras.metrics.aggregation import head_columns
from ich_keras.metrics.logits import mean_answer
from ich_keras.metrics.smoothing import NO_SMOOTHING
from ich_keras.notices import NOT_CLINICAL, TRAINED_ON_PHANTOMS, UNFINISHED
from ich_keras.prediction_journal import JOURNAL_FILE, written
from ich_keras.prediction_tables import FolderPrediction, write_tables
from ich_keras.prediction_variants import tta_names
from ich_keras.recipe import Recipe
from ich_keras.run_checksums import require_choices
from ich_keras.run_folder import SYNTHETIC, RunFolder
from ich_keras.thin_tables import AVERAGED_SLICE, NUM_AVERAGED, joint_columns

AnyRun = RunFolder | Path | str
MEMBERS_FOLDER = "members"
MEMBERS_FILE = "members.csv"
TRAINED_ON = "trained_on"  # a column of predictions.csv and series.csv
_KEY = ["series_instance_uid", "sop_instance_uid"]


@dataclass(frozen=True, eq=False)
class Member:
    """A run that predicts.

    Args:
        run: its folder.
        recipe, model: from `load_run`.
        digest: of its weights.
        rule, kernel: from slices to series, and for smoothing along z, as the run chose them.
        notice: that its training is unfinished; "" if it is not.
        is_synthetic: whether it was trained on phantoms.
        domain: what its training series look like; None where it does not say.
        distances: how far apart their slices lie; None where it does not say.
        context: its sequence head; None where it has none.
    """

    run: RunFolder
    recipe: Recipe
    model: Any
    digest: str
    rule: str
    kernel: str
    notice: str
    is_synthetic: bool
    domain: Domain | None
    distances: SliceDistances | None
    context: Context | None = None

    @property
    def whole_digest(self) -> tuple[str, str | None]:
        """Return the digests of its network and of its head."""
        return self.digest, None if self.context is None else self.context.digest

    def settings(self) -> dict[str, Any]:
        """Return what its answers depend on, for the journal."""
        return {
            "weights": self.digest,
            "backend": self.recipe.backend,
            "device": self.recipe.device,
            "precision": self.recipe.precision,
            "recipe": fingerprint(self.recipe.to_dict()),
            "rule": self.rule,
            "smoothing": None if self.kernel == NO_SMOOTHING else self.kernel,
            "domain": None if self.domain is None else sha256_of(self.run.domain_file),
            "context": None if self.context is None else self.context.digest,
        }


def require_members(
    given: AnyRun | Sequence[AnyRun], unfinished: bool, tta: Sequence[str]
) -> list[RunFolder]:
    """Return the runs of a prediction if their answers can be averaged; reads no weights.

    Args:
        given: a run, or several.
        unfinished: see `RunFolder.require_finished`.
        tta: see `tta_names`.

    Raises:
        UsageError: there is none; one is given twice; their labels differ; some answer per slice,
            others per whole series; or the augmentation does not suit one.
        StaleError: one is not a finished run, or has lost what it chose.
    """
    many = [given] if isinstance(given, (RunFolder, Path, str)) else list(given)
    runs = [RunFolder.at(run) for run in many]
    if not runs:
        raise UsageError("no run is given to predict with.")
    places = [run.path.resolve() for run in runs]
    for number, run in enumerate(runs):
        if places[number] in places[:number]:
            raise UsageError(f"the run {run} is given twice.", "Give each run once.")
        run.require_finished(unfinished)
        if run.is_finished:
            require_choices(run)
    recipes = [run.recipe() for run in runs]
    for run, recipe in zip(runs, recipes, strict=True):
        first, kinds = recipes[0], (_answers(recipes[0]), _answers(recipe))
        if recipe.labels != first.labels:
            raise UsageError(
                f"{runs[0]} answers {_labels(first.labels)}, {run} {_labels(recipe.labels)}.",
                "The runs of an ensemble need the same labels in the same order.",
            )
        if kinds[0] != kinds[1]:
            raise UsageError(
                f"{runs[0]} answers per {kinds[0]}, {run} per {kinds[1]}: they answer different"
                " questions.",
                "Predict with runs on slices and slabs together, and with runs on whole series"
                " together.",
            )
        tta_names(tta, recipe.inputs.view)
    return runs


def _answers(recipe: Recipe) -> str:
    return "whole series" if recipe.inputs.view.kind == "series" else "slice"


def _labels(labels: LabelSet) -> str:
    return f"{'one of ' if labels.exclusive else ''}{labels}"


def load_members(runs: Sequence[RunFolder], device: str | None, unfinished: bool) -> list[Member]:
    """Load the networks of runs that `require_members` returned.

    Raises:
        UsageError: two of them have the same weights.
        StaleError, DataError: as `load_run`.
    """
    members: list[Member] = []
    for run in runs:
        notice = run.notice()
        recipe, model = load_run(run, device, unfinished=unfinished)
        digest = network_digest(model)
        context = Context.load(run, recipe.labels, model)
        # Several heads may stand on one slice network: they answer differently.
        whole = digest, None if context is None else context.digest
        twin = next((one.run for one in members if one.whole_digest == whole), None)
        if twin is not None:
            raise UsageError(
                f"{run} has the same weights as {twin}: its answer would count twice.",
                "Give each run once.",
            )
        is_synthetic = bool(run.data().get(SYNTHETIC))
        rule, kernel = run.rule(), run.smoothing()
        facts = (
            Domain.load(run, digest),
            run.slice_distances(),
            context,
        )
        members.append(
            Member(run, recipe, model, digest, rule, kernel, notice, is_synthetic, *facts)
        )
    return members


def ensemble_setting(members: Sequence[Member]) -> str | None:
    """Name an ensemble for the journals of its members; None for a single run."""
    if len(members) == 1:
        return None
    digest = fingerprint([member.digest for member in members])
    return f"({len(members)} runs, {digest[:8]})"


def journal_file(number: int) -> str:
    """Return the name of a member's journal; the first is called as that of a single run."""
    return JOURNAL_FILE if number == 1 else f"member-{number}-{JOURNAL_FILE}"


def cost_line(members: Sequence[Member], tta: Sequence[str]) -> str:
    """Say how much more is computed than by one run alone; "" if nothing is."""
    times = 2 ** len(tta)
    parts = [f"{len(members)} runs"] if len(members) > 1 else []
    parts += [f"{times} views of every input ({', '.join(('plain', *tta))})"] if tta else []
    if not parts:
        return ""
    return f"{', '.join(parts)}: {len(members) * times} times the computation of one run."


def with_marks(
    prediction: FolderPrediction, members: Sequence[Member], tta: Sequence[str]
) -> FolderPrediction:
    """Return a prediction that says, for every reader, what it was made by."""
    drawn = sum(member.is_synthetic for member in members)
    notices = [NOT_CLINICAL]
    marks = {TRAINED_ON: "head CT"}
    if drawn == len(members):
        marks[TRAINED_ON] = "drawn phantoms only"
        notices.insert(0, TRAINED_ON_PHANTOMS)
    elif drawn:
        marks[TRAINED_ON] = f"head CT; {drawn} of {len(members)} runs on drawn phantoms only"
        notices.insert(0, f"{drawn} of {len(members)} runs were trained on drawn phantoms only.")
    if tta:
        notices.insert(0, f"Test-time augmentation ({', '.join(tta)}): the mean over the logits.")
    if len(members) > 1:
        notices.insert(
            0,
            f"Ensemble of {len(members)} runs: the mean over their logits. Each run smooths"
            " and aggregates as it chose; its own answers are in members/; no run's temperature or"
            " thresholds fit the mean.",
        )
    unfinished = list(dict.fromkeys(member.notice for member in members if member.notice))
    if unfinished:
        marks[UNFINISHED] = " ".join(unfinished)
        notices.insert(0, marks[UNFINISHED])
    slices = None if prediction.slices is None else prediction.slices.assign(**marks)
    told = [*prediction.notice.splitlines()[1:], _domain_sentence(prediction.series[VERDICT])]
    told += _context_sentences(members)
    return dataclasses.replace(
        prediction,
        slices=slices,
        series=prediction.series.assign(**marks),
        # What follows the first line of the notice says how the answers were made.
        notice="\n".join([" ".join(notices), *told]),
    )


def averaged(predictions: Sequence[FolderPrediction]) -> FolderPrediction:
    """Average the predictions of an ensemble's members over their logits.

    Slices and series are averaged each: a series' answer is the mean of those that its members
    give it, each by its own rule. What one member did not predict is in no average.

    Args:
        predictions: of one index, with the same labels.

    Returns:
        The mean, with the members' predictions beside it (`members`). That of one member, or of
        equal ones, has their numbers to the last bit.

    Raises:
        NothingUsable: there is nothing that all members predicted.
    """
    first = predictions[0]
    labels = first.labels
    rejects = pd.concat([one.rejects for one in predictions], ignore_index=True)
    rejects = rejects.drop_duplicates(["path", "code"]).sort_values("path", kind="stable")
    rejects = rejects.reset_index(drop=True)
    # Heads answer for their own run; each member's table has them.
    heads = [name for name in head_columns(labels) if name in first.series]
    tables = [first.series.drop(columns=heads), *(one.series for one in predictions[1:])]
    series = _mean_table(tables, _KEY[:1], labels)
    if series.empty:
        raise nothing_usable("no series was predicted by every run of the ensemble", rejects)
    # Distances in the features of several networks have no mean.
    uids = series["series_instance_uid"]
    own = [one.series.set_index(_KEY[:1]).loc[uids] for one in predictions]
    verdicts = _joint_verdicts([table[VERDICT] for table in own])
    series = series.assign(**{DISTANCE: np.float32(np.nan), VERDICT: verdicts})
    series = series.assign(**joint_columns(own))
    slices = None
    if first.slices is not None:
        slices = _mean_table([one.slices for one in predictions], _KEY, labels)
        slices[AVERAGED_SLICE] = _joint_numbers(slices, series)
    told = dict.fromkeys(line for one in predictions for line in one.notice.splitlines()[1:])
    notice = "\n".join([first.notice.partition("\n")[0], *told])
    return FolderPrediction(slices, series, rejects, notice, labels, members=tuple(predictions))


def _mean_table(tables: Sequence[Any], key: list[str], labels: LabelSet) -> pd.DataFrame:
    """Average the probabilities of the rows that all tables have, in the order of the first."""
    indexed = [table.set_index(key) for table in tables]
    shared = indexed[0].index
    for table in indexed[1:]:
        shared = shared[shared.isin(table.index)]
    names = list(labels.names)
    values = mean_answer([table.loc[shared, names].to_numpy() for table in indexed], labels)
    is_shared = indexed[0].index.isin(shared)
    found = tables[0][is_shared].reset_index(drop=True)
    found[names] = values
    if "num_rejected" in found:
        # What the run says that could read least.
        counts = np.stack([table.loc[shared, "num_rejected"].to_numpy() for table in indexed])
        for row, member in enumerate(counts.argmax(axis=0).tolist()):
            if member:
                for name in ("num_slices", "verdict", "num_rejected"):
                    value = indexed[member].loc[shared[row], name]
                    found.loc[row, name] = value
    return found


def _joint_numbers(slices: pd.DataFrame, series: pd.DataFrame) -> Any:
    """Return the averaged slice of each slice; missing in series that the runs average unlike."""
    differing = series.loc[series[NUM_AVERAGED].isna(), _KEY[0]]
    return slices[AVERAGED_SLICE].where(~slices[_KEY[0]].isin(differing)).array


def _joint_verdicts(tables: list[pd.Series]) -> list[str]:
    """Return the verdicts of an ensemble: outside where it is for any run that says something."""
    found = []
    for row in zip(*tables, strict=True):
        said = {one for one in row if one}
        found.append(OUTSIDE if OUTSIDE in said else INSIDE if said else "")
    return found


def _context_sentences(members: Sequence[Member]) -> list[str]:
    """Say which runs have a sequence head, one line each."""
    found = []
    for number, member in enumerate(members, 1):
        if member.context is not None:
            which = "" if len(members) == 1 else f"Run {number} of {len(members)}: "
            found.append(f"{which}{context_sentence(member.run)}")
    return found


def _domain_sentence(verdicts: pd.Series) -> str:
    """Say, for every reader of the answers, how many series are outside."""
    if not (verdicts != "").any():
        return (
            "Nothing says whether these series are like those of the training: the run has no"
            " domain.npz."
        )
    outside, number = int((verdicts == OUTSIDE).sum()), len(verdicts)
    if not outside:
        return (
            f"Domain: none of {number:,} series is far from those of the training, by the network's"
            " features. That is no proof that they are like them."
        )
    return (
        f"Domain: {outside:,} of {number:,} series outside, unlike those of the training (column"
        " domain). There calibrated probabilities, decisions and groups promise nothing."
    )


def write_members(
    folder: Path, members: Sequence[Member], predictions: Sequence[FolderPrediction]
) -> None:
    """Write members.csv (which run is which) and members/1/, ...: what each would write alone.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """
    rows = []
    for number, (member, prediction) in enumerate(zip(members, predictions, strict=True), 1):
        own = folder / MEMBERS_FOLDER / str(number)
        with written(own):
            own.mkdir(parents=True, exist_ok=True)
        remove_leftovers(own, is_alone=True)  # of an interrupted try
        write_tables(own, prediction)
        rows.append(
            {
                "member": number,
                "run": member.run.path.resolve().name,
                "preset": member.recipe.preset,
                "view": member.recipe.inputs.view.kind,
                "smoothing": member.kernel,
                "rule": "" if prediction.slices is None else member.rule,
                "weights": member.digest,
            }
        )
    with written(folder / MEMBERS_FILE):
        atomic_write(folder / MEMBERS_FILE, csv_text(pd.DataFrame(rows)))
