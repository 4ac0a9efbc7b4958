"""What is run: three scales, and every training by name. Plain declarations; nothing runs here.

Numbers that depend on others are not written down but said: `like=("operations", "slab")` trains
for as many epochs as make the operations of the run "slab"; `reproduce.py` works them out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.errors import UsageError
from ich_keras.files import fingerprint

TABLES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Fitting:
    """How networks of one view are fitted at one scale.

    Args:
        batch_size: samples a batch.
        epochs: passes over the training samples.
        learning_rate: the highest.
        accumulate: batches whose gradients make one step.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    accumulate: int = 1


@dataclass(frozen=True)
class Scale:
    """How large the experiments are.

    Args:
        name: tiny, small or rsna.
        title: one line.
        size: rows and columns of the cache and of the network's input, pixels.
        series_slices: slices of a whole series.
        fittings: per view.
        seeds: of splits and trainings.
        fractions: per view, the parts of the training patients that the learning curves have
            beside all of them; powers of one half.
        balance, augment, schedule, warmup_steps, loader_workers: as in `RunConfig`.
        num_series: phantom series; None means DICOM files of the user's.
        phantom_seed, matrix, slice_spacing_mm: as in `write_phantoms`.
        other_series, other_seed: the other phantoms, on which the stand-ins for pretrained weights
            are trained.
        other_fittings: per preset, where a stand-in is fitted otherwise than the rest.
    """

    name: str
    title: str
    size: int
    series_slices: int
    fittings: Mapping[str, Fitting]
    seeds: tuple[int, ...]
    fractions: Mapping[str, tuple[float, ...]]
    balance: bool = True
    augment: str = "flip"
    schedule: str = "cosine"
    warmup_steps: int = 20
    loader_workers: int = 0
    num_series: int | None = None
    phantom_seed: int = 0
    matrix: int = 128
    slice_spacing_mm: tuple[float, float] = (8.0, 11.0)
    other_series: int = 0
    other_seed: int = 1000
    other_fittings: Mapping[str, Fitting] = field(default_factory=dict)

    @property
    def is_synthetic(self) -> bool:
        """Whether it runs on phantoms."""
        return self.num_series is not None


SCALES = {
    "tiny": Scale(
        name="tiny",
        title="the same road in minutes: shows that it can be walked, and nothing else",
        size=64,
        series_slices=12,
        fittings={
            "slice": Fitting(16, 2, 1e-3),
            "slab": Fitting(16, 1, 1e-3),
            "series": Fitting(4, 2, 1e-3),
        },
        seeds=(0,),
        fractions={"slice": (0.5,), "slab": (0.5,), "series": (0.5,)},
        warmup_steps=4,
        num_series=64,
        slice_spacing_mm=(10.0, 13.0),
        other_series=32,
    ),
    "small": Scale(
        name="small",
        title="phantoms, hours on two cores",
        size=96,
        # At 8 mm a head of 140 mm has 18; longer series are sampled evenly.
        series_slices=16,
        # A sample of a slab costs 13 times as much as a slice, one of a series 7 times. With two
        # epochs slabs did not beat counting voxels. With four and a rate of 1e-3 one of two seeds
        # did, the other at 3e-4 alone (validation split; batches of 8 bear less than those of 32).
        fittings={
            "slice": Fitting(32, 6, 1e-3),
            "slab": Fitting(8, 4, 3e-4),
            "series": Fitting(8, 14, 1e-3),
        },
        seeds=(0, 1, 2),
        # Slabs cost most, and of a quarter (55 patients) slices and series had an early epoch kept.
        fractions={"slice": (0.25, 0.5), "slab": (0.5,), "series": (0.25, 0.5)},
        num_series=400,
        other_series=200,
        other_fittings={
            "resnet18_3d_medicalnet": Fitting(8, 12, 3e-4),
            "resnet50_2d": Fitting(32, 12, 1e-3),
        },
    ),
    # Batch sizes, rates and epochs are the thesis's (its sections 4.3 and 5.2, and its source).
    "rsna": Scale(
        name="rsna",
        title="RSNA 2019 on one GPU, with the thesis's settings",
        size=256,
        series_slices=60,
        fittings={
            "slice": Fitting(32, 6, 1e-5),
            "slab": Fitting(16, 5, 1e-4),
            "series": Fitting(1, 5, 3e-4),
        },
        seeds=(0, 1, 2),
        fractions=dict.fromkeys(("slice", "slab", "series"), (0.125, 0.25, 0.5)),
        balance=False,
        augment="thesis",
        schedule="constant",
        warmup_steps=0,
        loader_workers=8,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training, made once per seed.

    Args:
        title: what it is, for tables.
        preset: the network.
        view: slice, slab or series.
        slices: of a slab; None: five.
        split: "patient"; "thesis-slices" and "thesis-series", in which the held-out samples also
            choose the model; "leaky" splits the slices of as many patients as the patient split
            trains on, see `splits.leaky_split`; "other" is a patient split of the other phantoms.
        fraction: of the training patients.
        weights: None from scratch; the name of a converted source; "run:KEY" the best weights of
            another run; "collapsed:KEY" the same, made 2D.
        like: (what, key): as many "steps" or "operations" as another run (by epochs), or as much
            "memory" (by the batch size).
        intensity, augment: as in `RunConfig`; None takes the scale's.
        normalise_first: imitate the thesis's order, normalisation before brightness and contrast.
        published: key of `tables.PUBLISHED`.
        first_seed: made for the scale's first seed only.
    """

    title: str
    preset: str
    view: str
    slices: int | None = None
    split: str = "patient"
    fraction: float = 1.0
    weights: str | None = None
    like: tuple[str, str] | None = None
    intensity: str | None = None
    augment: str | None = None
    normalise_first: bool = False
    published: str | None = None
    first_seed: bool = False

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Keys of the runs whose weights it starts from."""
        kind, _, key = (self.weights or "").partition(":")
        return (key,) if kind in ("run", "collapsed") else ()

    @property
    def needs_weights(self) -> str | None:
        """The converted source it starts from."""
        return None if self.weights is None or self.depends_on else self.weights

    @property
    def is_thesis(self) -> bool:
        """Whether its held-out samples also choose the model, as in the thesis."""
        return self.split.startswith("thesis-")


STAND_IN = "pretrained on other phantoms (stand-in)"
_MEDICALNET = "medicalnet_resnet18_23datasets"
MEDICALNET_2D = "medicalnet_resnet18_2d"  # the same, collapsed by `weights-convert collapse`


def _network(
    key: str,
    title: str,
    preset: str,
    view: str,
    source: str,
    stand_in: str,
    published: str,
    one_stand_in: bool = True,
) -> dict[str, Run]:
    """Declare a pretrained network four times: real weights or stand-in, sound or with the
    thesis's split and augmentation. A stand-in holds the place of weights that are not there and
    carries no claim: one seed, except of the cheapest network."""
    split = "thesis-series" if view == "series" else "thesis-slices"
    return {
        f"{key}-{name}{suffix}": Run(
            f"{title}, {what}{', thesis split and augmentation' if suffix else ''}",
            preset,
            view,
            weights=weights,
            published=published,
            first_seed=bool(suffix) or (name == "stand-in" and one_stand_in),
            **({"split": split, "augment": "thesis"} if suffix else {}),
        )
        for name, what, weights in (
            ("pretrained", f"weights {source}", source),
            ("stand-in", STAND_IN, f"run:{stand_in}"),
        )
        for suffix in ("", "-thesis")
    }


def _fractions() -> dict[str, Run]:
    names = {0.125: "eighth", 0.25: "quarter", 0.5: "half"}
    base = {"2d": ("resnet18_2d", "slice"), "slab": ("resnet18_3d_slab", "slab")}
    base["series"] = ("resnet18_3d", "series")
    return {
        f"{key}-{name}": Run(
            f"{RUN_TITLES[key]}, 1/{round(1 / fraction)} of the training patients",
            preset,
            view,
            fraction=fraction,
            like=("steps", key),
            intensity="windows",
        )
        for key, (preset, view) in base.items()
        for fraction, name in names.items()
    }


RUN_TITLES = {
    "2d": "2D ResNet-18 on slices, from scratch",
    "slab": "3D ResNet-18 on slabs of five, depth stride 1, from scratch",
    "series": "3D ResNet-18 on whole series, from scratch",
}

RUNS: dict[str, Run] = {
    # What stands in for pretrained weights where there are none: trained on other phantoms.
    "stand-in-2d-18": Run(
        "ResNet-18 on other phantoms", "resnet18_2d", "slice", split="other", first_seed=True
    ),
    "stand-in-2d-50": Run(
        "ResNet-50 on other phantoms", "resnet50_2d", "slice", split="other", first_seed=True
    ),
    # On slabs, whose labels are of single slices: MedicalNet itself learned from segmentations, a
    # label per voxel. 107 patients teach it little; the report says where it has hardly learned.
    "stand-in-3d-18": Run(
        "MedicalNet's ResNet-18 on slabs of other phantoms",
        "resnet18_3d_medicalnet",
        "slab",
        split="other",
        first_seed=True,
    ),
    # The three views from scratch: everything else is put beside these. All see the same three
    # windows: in the thesis's wide range brain and blood lie 0.02 apart, and what a view is worth
    # would be mixed up with what its intensities are worth (the question "intensity").
    "2d": Run(RUN_TITLES["2d"], "resnet18_2d", "slice", published="2d-scratch-4-epochs"),
    "slab": Run(RUN_TITLES["slab"], "resnet18_3d_slab", "slab", intensity="windows"),
    "series": Run(RUN_TITLES["series"], "resnet18_3d", "series", intensity="windows"),
    # Tables 1 to 4.
    "2d-thesis": Run(
        "2D ResNet-18 on slices, from scratch, thesis split and augmentation",
        "resnet18_2d",
        "slice",
        split="thesis-slices",
        augment="thesis",
        published="2d-scratch-4-epochs",
        first_seed=True,
    ),
    **_network(
        "2d",
        "2D ResNet-18 on slices",
        "resnet18_2d",
        "slice",
        "torchvision_resnet18",
        "stand-in-2d-18",
        "2d",
        one_stand_in=False,
    ),
    **_network(
        "2d-50",
        "2D ResNet-50 on slices",
        "resnet50_2d",
        "slice",
        "torchvision_resnet50",
        "stand-in-2d-50",
        "2d-resnet50-4-epochs",
    ),
    **_network(
        "series-medicalnet",
        "MedicalNet's ResNet-18 on whole series",
        "resnet18_3d_medicalnet",
        "series",
        _MEDICALNET,
        "stand-in-3d-18",
        "series",
    ),
    **_network(
        "slab-medicalnet",
        "MedicalNet's ResNet-18 on slabs of five",
        "resnet18_3d_medicalnet",
        "slab",
        _MEDICALNET,
        "stand-in-3d-18",
        "slab",
    ),
    # leak
    "2d-leaky": Run(
        "2D ResNet-18 on slices, from scratch, slices split one by one",
        "resnet18_2d",
        "slice",
        split="leaky",
        like=("steps", "2d"),
    ),
    # views: at equal operations
    "2d-operations": Run(
        f"{RUN_TITLES['2d']}, operations of the slabs",
        "resnet18_2d",
        "slice",
        like=("operations", "slab"),
    ),
    "series-operations": Run(
        f"{RUN_TITLES['series']}, operations of the slabs",
        "resnet18_3d",
        "series",
        like=("operations", "slab"),
        intensity="windows",
    ),
    # stride and stride-9: MedicalNet's takes five slices to one; the strided network needs nine.
    "slab-medicalnet": Run(
        "MedicalNet's ResNet-18 on slabs of five, from scratch",
        "resnet18_3d_medicalnet",
        "slab",
        intensity="windows",
    ),
    "slab-9": Run(
        "3D ResNet-18 on slabs of nine, depth stride 1, from scratch",
        "resnet18_3d_slab",
        "slab",
        slices=9,
        intensity="windows",
    ),
    "slab-9-strided": Run(
        "3D ResNet-18 on slabs of nine, strided in depth, from scratch",
        "resnet18_3d",
        "slab",
        slices=9,
        intensity="windows",
    ),
    **_fractions(),
    # memory
    "slab-memory": Run(
        f"{RUN_TITLES['slab']}, memory of the slices",
        "resnet18_3d_slab",
        "slab",
        like=("memory", "2d"),
        intensity="windows",
    ),
    "series-memory": Run(
        f"{RUN_TITLES['series']}, memory of the slices",
        "resnet18_3d",
        "series",
        like=("memory", "2d"),
        intensity="windows",
    ),
    # intensity
    "slab-wide": Run(
        f"{RUN_TITLES['slab']}, the thesis's wide range",
        "resnet18_3d_slab",
        "slab",
        intensity="wide",
    ),
    "series-wide": Run(
        f"{RUN_TITLES['series']}, the thesis's wide range",
        "resnet18_3d",
        "series",
        intensity="wide",
    ),
    # normalise: flips alone, the phantoms' augmentation, would not ask it
    "2d-normalise-last": Run(
        f"{RUN_TITLES['2d']}, normalised after brightness",
        "resnet18_2d",
        "slice",
        augment="thesis",
    ),
    "2d-normalise-first": Run(
        f"{RUN_TITLES['2d']}, normalised before brightness",
        "resnet18_2d",
        "slice",
        augment="thesis",
        normalise_first=True,
    ),
    # pretraining: MedicalNet's weights in 2D; the 3D ones are in the tables
    "2d-medicalnet-pretrained": Run(
        "MedicalNet's ResNet-18 collapsed to slices, its weights",
        "resnet18_2d_medicalnet",
        "slice",
        weights=MEDICALNET_2D,
    ),
    "2d-medicalnet-stand-in": Run(
        f"MedicalNet's ResNet-18 collapsed to slices, {STAND_IN}",
        "resnet18_2d_medicalnet",
        "slice",
        weights="collapsed:stand-in-3d-18",
    ),
}

TABLE_RUNS = {
    1: (
        *("2d", "2d-thesis", "2d-pretrained", "2d-pretrained-thesis", "2d-stand-in"),
        *("2d-stand-in-thesis", "2d-50-pretrained", "2d-50-pretrained-thesis"),
        *("2d-50-stand-in", "2d-50-stand-in-thesis"),
    ),
    2: ("2d-pretrained", "2d-pretrained-thesis", "2d-stand-in", "2d-stand-in-thesis"),
    3: tuple(
        f"series-medicalnet-{name}"
        for name in ("pretrained", "pretrained-thesis", "stand-in", "stand-in-thesis")
    ),
    4: tuple(
        f"slab-medicalnet-{name}"
        for name in ("pretrained", "pretrained-thesis", "stand-in", "stand-in-thesis")
    ),
}


@dataclass(frozen=True)
class Question:
    """What is asked of the data.

    Args:
        title: the question.
        runs: keys of `RUNS`.
        pairs: (one, other): compared on the same test patients, one minus other.
        in_all: whether `all` asks it.
        only_shared: whether the two held out different samples, and are compared on those that
            both did.
        note: what a comparison has in it beside its question.
    """

    title: str
    runs: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    in_all: bool = False
    only_shared: bool = False
    note: str = ""


QUESTIONS = {
    "leak": Question(
        "How much does splitting slices one by one flatter a model?",
        ("2d", "2d-leaky"),
        (("2d-leaky", "2d"),),
        True,
        only_shared=True,
    ),
    "views": Question(
        "Slice, slab or series, at equal patients and at equal operations?",
        ("2d", "slab", "series", "2d-operations", "series-operations"),
        (
            *(("slab", "2d"), ("series", "2d"), ("series", "slab")),
            *(("slab", "2d-operations"), ("series-operations", "2d-operations")),
            ("series-operations", "slab"),
        ),
        True,
        note=(
            "`2d`, `slab` and `series` have each view's own epochs and learning rate;"
            " `2d-operations` and `series-operations` are the same networks, trained for as many"
            " operations as `slab`."
        ),
    ),
    "stride": Question(
        "Depth stride 1 or MedicalNet's network on slabs of five?",
        ("slab", "slab-medicalnet"),
        (("slab", "slab-medicalnet"),),
        True,
        note=(
            "The networks differ in the strides in depth and in the plane, in dilation and in the"
            " kind of shortcut, and both are trained from scratch with a learning rate and epochs"
            " that were chosen on `slab`: the difference is that of the two networks at this"
            " budget, not what a stride costs (`stride-9` changes nothing but strides in depth)."
        ),
    ),
    "stride-9": Question(
        "What do strides along the slices cost, and all else equal, on slabs of nine?",
        ("slab", "slab-9", "slab-9-strided"),
        (("slab-9", "slab-9-strided"), ("slab-9", "slab")),
    ),
    "fractions": Question(
        "Can computation replace data? Equal optimiser steps on fewer patients.",
        ("2d", "slab", "series", *_fractions()),
        (
            *(("2d", "2d-half"), ("slab", "slab-half"), ("series", "series-half")),
            # Five slices a sample on half of the patients, beside one a sample on all of them.
            *(("slab-half", "2d"), ("series-half", "2d")),
        ),
        True,
    ),
    "memory": Question(
        "Slice, slab or series, with batches of equal activation memory?",
        ("2d", "slab-memory", "series-memory"),
        (("slab-memory", "2d"), ("series-memory", "2d")),
    ),
    "intensity": Question(
        "Three windows or one wide one in 3D?",
        ("slab", "slab-wide", "series", "series-wide"),
        (("slab", "slab-wide"), ("series", "series-wide")),
    ),
    "normalise": Question(
        "Normalise before or after brightness and contrast (fault of the thesis)?",
        ("2d-normalise-last", "2d-normalise-first"),
        (("2d-normalise-last", "2d-normalise-first"),),
    ),
    "pretraining": Question(
        "MedicalNet's weights in 2D and in 3D?",
        (
            *("2d-medicalnet-pretrained", "2d-medicalnet-stand-in"),
            *("series-medicalnet-pretrained", "series-medicalnet-stand-in"),
            *("slab-medicalnet-pretrained", "slab-medicalnet-stand-in"),
        ),
        (
            ("slab-medicalnet-stand-in", "2d-medicalnet-stand-in"),
            ("series-medicalnet-stand-in", "2d-medicalnet-stand-in"),
            ("slab-medicalnet-pretrained", "2d-medicalnet-pretrained"),
            ("series-medicalnet-pretrained", "2d-medicalnet-pretrained"),
        ),
    ),
}


def is_made_at(run: Run, scale: Scale) -> bool:
    """Whether a scale has the run: its fraction of patients, and stand-ins only of phantoms."""
    is_stand_in = run.split == "other" or bool(run.depends_on)
    is_asked_for = run.fraction in (1.0, *scale.fractions[run.view])
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
        for other in run.depends_on:
            add(other)
        ordered[key] = None

    for key in wanted:
        add(key)
    return sorted(ordered, key=lambda key: bool(RUNS[key].depends_on))


def require_scale(name: str) -> Scale:
    """Look a scale up by name.

    Raises:
        UsageError: unknown name.
    """
    if name not in SCALES:
        raise UsageError(f"scale {name!r}; expected one of {', '.join(SCALES)}.")
    return SCALES[name]


def fitting_of(run: Run, scale: Scale) -> Fitting:
    """Return how a run's network is fitted."""
    own = scale.other_fittings.get(run.preset) if run.split == "other" else None
    return own or scale.fittings[run.view]


def base_config(run: Run, scale: Scale, seed: int, device: str = "auto") -> RunConfig:
    """Return the configuration of a run as far as it depends on nothing but the declaration: its
    split, weights and what `like` asks for are filled in later."""
    fitting = fitting_of(run, scale)
    slices = {"slice": None, "slab": run.slices or 5, "series": scale.series_slices}[run.view]
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


@dataclass(frozen=True)
class Source:
    """DICOM files of the user's, for scales without phantoms.

    Args:
        dicom: the folder.
        labels: RSNA's csv.
    """

    dicom: str
    labels: str


def data_settings(scale: Scale, source: Source | None = None) -> dict:
    """Return what decides the data: a work folder belongs to one such set."""
    names = ("size", "num_series", "phantom_seed", "matrix", "other_series", "other_seed")
    content = {name: getattr(scale, name) for name in names}
    content["slice_spacing_mm"] = list(scale.slice_spacing_mm)
    return content | ({} if source is None else asdict(source))


def declaration(key: str, scale: Scale, seed: int, source: Source | None = None) -> str:
    """Return the fingerprint of all that is declared about a run: a stored result of another one
    is stale."""
    run = RUNS[key]
    content = {
        "run": {name: value for name, value in asdict(run).items() if name != "title"},
        "config": base_config(run, scale, seed).to_dict(),
        "data": data_settings(scale, source),
    }
    # Where it runs decides no number that is compared.
    for name in ("device", "backend"):
        del content["config"][name]
    others = [*run.depends_on, *([run.like[1]] if run.like else [])]
    content["others"] = {other: declaration(other, scale, seed, source) for other in others}
    return fingerprint(content)


def seeds_of(key: str, seeds: tuple[int, ...], scale: Scale) -> tuple[int, ...]:
    """Return the seeds a run is made for: those asked for, or the scale's first."""
    return scale.seeds[:1] if RUNS[key].first_seed else seeds
