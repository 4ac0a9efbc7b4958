"""From declarations to configurations: which runs a scale has, their settings, and the fingerprint
that tells whether a stored result still matches its declaration."""

from dataclasses import asdict, dataclass

from experiments.questions import QUESTIONS, TABLE_RUNS
from experiments.run import Run
from experiments.runs import RUNS
from experiments.scales import Fitting, Scale
from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.files import fingerprint

_LATER_OPTIONS = (
    "batch_norm",
    "ema",
    "focal_alpha",
    "focal_gamma",
    "gamma_negative",
    "gamma_positive",
    "label_weight",
    "margin",
    "patience",
    "positive_weight",
    "swa",
)
_LATER_INPUTS = (
    "crop",
    "cutmix",
    "depth_mm",
    "drop_slices",
    "hu_noise",
    "mixup",
    "skip_empty",
    "width_jitter",
    "window_jitter",
)
# Fields of `Run` that came after the first results were stored: declared where they are used.
_LATER_FIELDS = {"on": None, "learn_from": "both", "end_to_end": False}
# Of all sequence heads. Named here, so that neither another default of the library nor an option
# that it adds makes stored results stale.
_HEAD_SHAPE = {"width": 128, "depth": 2, "heads": 4, "dropout": 0.3}
_HEAD_FITTING = {"weight_decay": 0.01, "series_weight": 0.5}
# Of head and slice network together, where they are trained end to end.
_JOINT = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-4, "backbone_factor": 0.1, "chunk": 32}
_HEAD_PREFIX = "sequence_"


@dataclass(frozen=True)
class Source:
    """DICOM files that the user provides, for scales without phantoms.

    Args:
        dicom: the folder.
        labels: RSNA's csv.
    """

    dicom: str
    labels: str


def is_made_at(run: Run, scale: Scale) -> bool:
    """Whether a scale has a run: it needs the fraction of patients, and phantoms for stand-ins."""
    is_stand_in = run.split == "other" or bool(run.depends_on)
    is_asked_for = run.fraction == 1 or run.fraction in scale.fractions[run.view]
    return is_asked_for and (scale.is_synthetic or not is_stand_in)


def chosen_runs(
    scale: Scale, tables: tuple[int, ...] = (), questions: tuple[str, ...] = ()
) -> list[str]:
    """Return the runs that tables and questions need at a scale, dependencies before dependants."""
    wanted = [key for table in tables for key in TABLE_RUNS[table]]
    wanted += [key for name in questions for key in QUESTIONS[name].runs]
    ordered: dict[str, None] = {}

    def add(key: str) -> None:
        run = RUNS[key]
        if not is_made_at(run, scale):
            return
        for other in run.needs:
            add(other)
        ordered[key] = None

    for key in wanted:
        add(key)
    return sorted(ordered, key=stage_of)


def stage_of(key: str) -> int:
    """Return how many runs must have been trained one after another before this one.

    >>> stage_of("2d"), stage_of("2d-stand-in"), stage_of("sequence-gru")
    (0, 1, 1)
    """
    return max((1 + stage_of(other) for other in RUNS[key].needs), default=0)


def fitting_of(run: Run, scale: Scale) -> Fitting:
    """Return the training settings of a run."""
    own = scale.other_fittings.get(run.preset) if run.split == "other" else None
    return own or scale.fittings[run.view]


def base_config(run: Run, scale: Scale, seed: int, device: str = "auto") -> RunConfig:
    """Return the part of a run's configuration that follows from the declaration alone.

    `settle.resolve` adds the split, the weights and what `like` asks for. That of a sequence head
    is its slice network's; `head_settings` has its own settings.
    """
    if run.on is not None:
        return base_config(RUNS[run.on], scale, seed, device)
    fitting = fitting_of(run, scale)
    slices = (
        run.slices
        or {"slice": None, "stack": 3, "slab": 5, "series": scale.series_slices}[run.view]
    )
    return RunConfig(
        preset=run.preset,
        seed=seed,
        device=device,
        data=DataConfig(
            size=scale.size,
            view=run.view,
            slices=slices,
            balance=scale.balance,
            augment=run.augment or scale.augment,
            intensity=run.intensity,
            # The stand-in for the library's augmentation is of this process only.
            loader_workers=0 if run.normalise_first else scale.loader_workers,
        ),
        fit=FitConfig(
            batch_size=fitting.batch_size,
            epochs=fitting.epochs,
            learning_rate=fitting.learning_rate,
            accumulate=fitting.accumulate,
            schedule=scale.schedule,
            warmup_steps=scale.warmup_steps,
        ),
    )


def head_settings(run: Run, scale: Scale, seed: int) -> dict:
    """Return the settings of a sequence head, as `ich_keras.context_fitting.ContextConfig` takes
    them.

    Args:
        run: with `on`.
        scale, seed: as for `base_config`.
    """
    return {
        "kind": run.preset.removeprefix(_HEAD_PREFIX),
        **_HEAD_SHAPE,
        "epochs": scale.head.epochs,
        "batch_size": scale.head.batch_size,
        "learning_rate": scale.head.learning_rate,
        **_HEAD_FITTING,
        "learn_from": run.learn_from,
        "seed": seed,
    }


def joint_settings() -> dict:
    """Return the settings of a training end to end, as `ich_keras.end_to_end.JointConfig` takes
    them."""
    return dict(_JOINT)


def data_settings(scale: Scale, source: Source | None = None) -> dict:
    """Return the settings that determine the data: a work folder belongs to one set of them."""
    names = ("size", "num_series", "phantom_seed", "matrix", "other_series", "other_seed")
    content = {name: getattr(scale, name) for name in names}
    content["slice_spacing_mm"] = list(scale.slice_spacing_mm)
    return content | ({} if source is None else asdict(source))


def declaration(key: str, scale: Scale, seed: int, source: Source | None = None) -> str:
    """Return the fingerprint of everything declared about a run, except its title.

    A stored result with another fingerprint is stale. Runs that a run depends on are included.
    """
    run = RUNS[key]
    fields = {name: value for name, value in asdict(run).items() if name != "title"}
    for name, usual_value in _LATER_FIELDS.items():
        if fields[name] == usual_value:
            del fields[name]
    content = {
        "run": fields,
        "config": base_config(run, scale, seed).to_dict(),
        "data": data_settings(scale, source),
    }
    # Where it runs decides no number that is compared.
    for name in ("device", "backend"):
        del content["config"][name]
    # Asked since the first results were stored. It changes none: phantoms have no such series.
    del content["config"]["data"]["duplicate"]
    # Neither do options that came later and that a run does not use.
    if content["config"]["windows"] is None:
        del content["config"]["windows"]
    for part, later, usual in (
        ("fit", _LATER_OPTIONS, asdict(FitConfig())),
        ("data", _LATER_INPUTS, asdict(DataConfig())),
    ):
        for name in later:
            if content["config"][part][name] == usual[name]:
                del content["config"][part][name]
    if run.on is not None:
        content["head"] = head_settings(run, scale, seed)
    if run.end_to_end:
        content["joint"] = joint_settings()
    others = [*run.needs, *([run.like[1]] if run.like else [])]
    content["others"] = {other: declaration(other, scale, seed, source) for other in others}
    return fingerprint(content)


def seeds_of(key: str, seeds: tuple[int, ...], scale: Scale) -> tuple[int, ...]:
    """Return the seeds a run is trained with: the given ones, or only the scale's first.

    >>> from experiments.scales import SCALES
    >>> seeds_of("2d", (0, 1), SCALES["small"]), seeds_of("2d-thesis", (0, 1), SCALES["small"])
    ((0, 1), (0,))
    """
    return scale.seeds[:1] if RUNS[key].first_seed else seeds
