"""RunFolder: a run on disk. Only it knows the file names and when a run is finished."""

import csv
import shlex
from dataclasses import dataclass
from pathlib import Path

from ich_keras.checkpoints import has_state
from ich_keras.config import RunConfig
from ich_keras.data.split import SPLITS, Split
from ich_keras.data.thin_series import SliceDistances
from ich_keras.errors import StaleError, UsageError
from ich_keras.files import fingerprint, lock, read_json, read_object
from ich_keras.metrics.aggregation import ALL_RULES, DEFAULT_RULE, rules_of
from ich_keras.metrics.smoothing import KERNELS, NO_SMOOTHING
from ich_keras.recipe import Recipe

# Entries of data.json.
CACHE = "cache"
CACHE_PATH = "cache_path"
PIXELS = "pixels"  # digest of the cached pixels; None for a cache of an older version
PIXELS_OF = "pixels_of"  # the same for each split
LABELS_DIGEST = "labels"
SYNTHETIC = "synthetic"
SLICE_SPACING = "slice_spacing_mm"  # of the training series; absent in older runs
PLAN = "plan"
# Entries of environment.json: when the training began; where it was resumed since; why it ended
# before its last epoch; which finished runs it goes on from.
START, RESUMED, ENDED_EARLY, EXTENDED = "started", "resumed", "ended_early", "extended"
STAGES = "seconds"  # the same, of what follows the last epoch, by stage
EPOCH = "epoch"  # entry of the record of the best weights

# In the names of what was computed with the weights of an unfinished training.
_SO_FAR = ".unfinished"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training.

    Functions pass runs to each other as a `RunFolder`.

    Args:
        path: the folder; it need not exist yet.
    """

    path: Path

    @classmethod
    def at(cls, path: "Path | str | RunFolder") -> "RunFolder":
        """Make a `RunFolder` from a path; an existing one is returned as is."""
        return path if isinstance(path, RunFolder) else cls(Path(path))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config_file(self) -> Path:
        """The requested settings (`RunConfig`)."""
        return self.path / "config.json"

    @property
    def recipe_file(self) -> Path:
        """The settings in use (`Recipe`)."""
        return self.path / "recipe.json"

    @property
    def environment_file(self) -> Path:
        """Versions, backend, device and machine."""
        return self.path / "environment.json"

    @property
    def data_file(self) -> Path:
        """The cache and labels, counts, and whether the data are phantoms."""
        return self.path / "data.json"

    @property
    def split_file(self) -> Path:
        """The members of each split."""
        return self.path / "split.json"

    @property
    def seen_file(self) -> Path:
        """Hashes of the images of training and validation; absent in older runs."""
        return self.path / "seen.npz"

    @property
    def started_from_file(self) -> Path:
        """What was loaded from pretrained weights; absent for training from scratch."""
        return self.path / "weights.json"

    @property
    def history_file(self) -> Path:
        """Losses, learning rate and seconds of each epoch."""
        return self.path / "history.csv"

    @property
    def windows_file(self) -> Path:
        """Learnable windows after each epoch, and before the first; absent without any."""
        return self.path / "windows.csv"

    @property
    def best_weights(self) -> Path:
        """The weights of the best epoch by validation loss."""
        return self.path / "best.weights.h5"

    @property
    def model_file(self) -> Path:
        """The best epoch as a model that loads with Keras alone."""
        return self.path / "model.keras"

    @property
    def choices_file(self) -> Path:
        """Smoothing, rule, temperature and thresholds, chosen on the validation split."""
        return self.path / "choices.json"

    @property
    def domain_file(self) -> Path:
        """What the training series look like to the network (`ich_keras.domain`)."""
        return self.path / "domain.npz"

    @property
    def report_file(self) -> Path:
        """The report; written last, so a run that has it is finished."""
        return self.path / "report.md"

    def page_file(self, is_final: bool = True) -> Path:
        """The report to look at; of an unfinished training under a name of its own."""
        return self.path / f"report{'' if is_final else _SO_FAR}.html"

    @property
    def report_to_read(self) -> Path:
        """The report that people are pointed to: the page, or report.md where there is none."""
        return self.page_file() if self.page_file().is_file() else self.report_file

    @property
    def checksums_file(self) -> Path:
        """The checksums of a finished run's files."""
        return self.path / "checksums.json"

    @property
    def state_folder(self) -> Path:
        """What an interrupted training resumes from."""
        return self.path / "state"

    @property
    def lock_file(self) -> Path:
        """Held while a training writes here."""
        return self.path / "training.lock"

    def predictions_file(self, split: str, is_final: bool = True) -> Path:
        """Probabilities and labels of a split, by the final weights or by those so far."""
        return self.path / f"predictions-{split}{'' if is_final else _SO_FAR}.csv"

    def metrics_file(self, split: str, is_final: bool = True) -> Path:
        """Metrics of a split, of the final weights or of those so far."""
        return self.path / f"metrics-{split}{'' if is_final else _SO_FAR}.json"

    @property
    def is_finished(self) -> bool:
        """Whether training and evaluation are complete."""
        return self.report_file.is_file()

    @property
    def is_interrupted(self) -> bool:
        """Whether a training finished at least one epoch here, but not all its work."""
        return has_state(self.state_folder) and not self.is_finished

    @property
    def is_running(self) -> bool:
        """Whether a training is at work here now; False where that cannot be found out."""
        if not self.lock_file.is_file():
            return False
        try:
            with lock(self.lock_file):
                return False
        except StaleError:
            return True
        except OSError:  # a folder that may only be read
            return False

    def notice(self) -> str:
        """Say that the training is unfinished, for every output of its weights; "" if it is not.

        The text fits into a cell of a table, and holds no value of the data.
        """
        if self.is_finished:
            return ""
        done, epochs = self._epochs_done(), self.recipe().training.epochs
        state = "is still running" if self.is_running else "was interrupted"
        return (
            f"Unfinished: the training {state}, {done} of {epochs} epochs done. These are the best"
            " weights so far, not its result."
        )

    def _epochs_done(self) -> int:
        if not self.history_file.is_file():
            return 0
        with open(self.history_file, newline="", encoding="utf-8") as stream:
            return sum(1 for _ in csv.DictReader(stream))

    def require_finished(self, unfinished: bool = False) -> "RunFolder":
        """Return the run if it is finished.

        Args:
            unfinished: whether one that has only begun will do; `notice` must then appear in every
                output.

        Raises:
            StaleError: there is no run, or it is not finished: interrupted, or still running.
        """
        so_far = "--unfinished (in Python: unfinished=True)"
        has_weights = self.best_weights.is_file()
        if not self.is_finished and self.is_running and not (unfinished and has_weights):
            also = f", or use its best weights so far with {so_far}" if has_weights else ""
            raise StaleError(
                f"the training in {self} is still running.", f"Wait until it finishes{also}."
            )
        if self.is_interrupted and not unfinished:
            raise StaleError(
                f"the training in {self} is not finished.",
                f"Use its best weights so far with {so_far}, or finish it: ich-train --resume"
                f" {shlex.quote(str(self))}",
            )
        self.require_begun()
        if not self.is_finished and not unfinished:
            raise StaleError(
                f"{self} is not a finished run: {self.report_file.name} is absent.",
                "Give the folder that ich-train printed.",
            )
        return self

    def forget_evaluations(self) -> None:
        """Remove what an earlier evaluation left, by weights that were not the final ones."""
        self.choices_file.unlink(missing_ok=True)
        self.domain_file.unlink(missing_ok=True)
        for is_final in (True, False):
            self.page_file(is_final).unlink(missing_ok=True)
            for split in SPLITS:
                self.predictions_file(split, is_final).unlink(missing_ok=True)
                self.metrics_file(split, is_final).unlink(missing_ok=True)

    def require_begun(self) -> "RunFolder":
        """Return the run if it has weights, finished or not.

        Raises:
            StaleError: there is no run.
        """
        absent = [p.name for p in (self.config_file, self.best_weights) if not p.is_file()]
        if absent:
            raise StaleError(
                f"{self} is not a run folder: {' and '.join(absent)} absent.",
                "Give the folder that ich-train printed.",
            )
        return self

    def require_interrupted(self) -> "RunFolder":
        """Return the run if its training can be resumed.

        Raises:
            UsageError: the run is finished.
            StaleError: there is no training to resume.
        """
        if self.is_finished:
            raise UsageError(
                f"the training in {self} is finished.", f"Look at its {self.report_file.name}."
            )
        if not self.path.is_dir():
            raise StaleError(f"the folder {self} does not exist.", "Is this the right folder?")
        if not self.is_interrupted:
            raise StaleError(
                f"{self} is not an interrupted training: it has no state of a finished epoch.",
                "Give a folder that ich-train began. If this is one, remove it and train again.",
            )
        return self

    def config(self) -> RunConfig:
        """Return the requested settings."""
        return RunConfig.from_dict(read_json(self.config_file))

    def recipe(self) -> Recipe:
        """Return the settings in use.

        Raises:
            StaleError: the recipe is absent, damaged or incomplete; nothing is guessed.
        """
        again = (
            "Train again: ich-train --config"
            f" {shlex.quote(str(self.config_file))} --cache CACHE --out NEW"
        )
        if not self.recipe_file.is_file():
            raise StaleError(
                f"{self} has no {self.recipe_file.name}: nothing says how its input was made.",
                f"Runs of ich_keras 0.1 have none; that version still predicts with them. {again}",
            )
        try:
            return Recipe.from_dict(read_json(self.recipe_file), str(self.recipe_file))
        except StaleError as error:
            raise StaleError(error.message, f"{error.hint} {again}") from error

    def environment(self) -> dict:
        """Return versions, backend, device and machine of the training."""
        return read_object(self.environment_file)

    def identity(self) -> dict[str, str | None]:
        """Return what tells this run from others, to be stored with its states."""
        data, recipe = self.data(), read_object(self.recipe_file)
        # A resumed training may run in another place.
        for place in ("backend", "device", "precision"):
            recipe.pop(place, None)
        return {
            "recipe": fingerprint(recipe),
            **{name: data.get(name) for name in (CACHE, PIXELS, LABELS_DIGEST)},
            "start": self.environment().get(START),
        }

    def data(self) -> dict:
        """Return what the run was trained on: see `data_file`.

        Raises:
            StaleError: the file is absent or damaged.
        """
        return read_object(self.data_file, CACHE)

    def slice_distances(self) -> SliceDistances | None:
        """Return how far apart the slices of the training lie; None where nothing says so.

        Raises:
            StaleError: the file is absent or damaged.
        """
        try:
            return SliceDistances.from_record(self.data().get(SLICE_SPACING))
        except ValueError as error:
            raise StaleError(
                f"{self.data_file} is damaged: {SLICE_SPACING}: {error}.",
                "Copy the original run folder again, or train again.",
            ) from error

    def split(self) -> Split:
        """Return the members of each split."""
        return Split.load(self.split_file)

    def choices(self) -> dict:
        """Return the choices made on the validation split; empty before they are made."""
        if not self.choices_file.is_file():
            return {}
        choices = read_json(self.choices_file)
        is_object = isinstance(choices, dict) and all(
            isinstance(part, dict) for part in choices.values()
        )
        rule = choices.get("aggregation", {"rule": DEFAULT_RULE}) if is_object else {}
        smoothing = choices.get("smoothing", {"kernel": NO_SMOOTHING}) if is_object else {}
        for kind, name, known in (
            ("rule", rule.get("rule"), ALL_RULES),
            ("smoothing kernel", smoothing.get("kernel"), KERNELS),
        ):
            if isinstance(name, str) and name in known:
                continue
            raise StaleError(
                f"{self.choices_file} is damaged: it holds no {kind} of {', '.join(known)}.",
                f"Remove it, then: ich evaluate --run {shlex.quote(str(self))} --cache CACHE"
                " --split valid",
            )
        return choices

    def rule(self) -> str:
        """Return the rule for aggregating slices, chosen on the validation split."""
        usual = next(iter(rules_of(self.recipe().labels)))
        return self.choices().get("aggregation", {"rule": usual})["rule"]

    def smoothing(self) -> str:
        """Return the kernel for smoothing along z, chosen on the validation split."""
        # Runs of before smoothing have none.
        return self.choices().get("smoothing", {"kernel": NO_SMOOTHING})["kernel"]

    def best_epoch(self) -> int:
        """Return the epoch of the best weights, counted from 1."""
        from ich_keras.models.weights_file import read_record

        # Not from history.csv: where weights were lost, a later epoch took their place.
        found = read_record(self.best_weights).get(EPOCH)
        if isinstance(found, int):
            return found
        with open(self.history_file, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        return int(min(rows, key=lambda row: float(row["valid_log_loss"]))["epoch"])

    def metrics(self, split: str) -> dict | None:
        """Return the metrics of a split; None if it was not evaluated."""
        path = self.metrics_file(split)
        return read_json(path) if path.is_file() else None
