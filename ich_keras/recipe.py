"""Recipe: every setting of a run, decided once and complete.

`RunConfig` holds the request, with None for "choose for me". `Recipe.of` makes those choices, and
all later code uses the recipe: nothing is decided twice. The recipe records the network's input by
value (the windows' level and width, mean and deviation, the resampling rule), so a run predicts the
same after the library's defaults have changed. It is stored in the run folder, in the record of the
weights and in the metadata of `model.keras`.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any

from ich_keras.config import DataConfig, FitConfig, RunConfig
from ich_keras.data.emptiness import LEAST_BRAIN_MM2
from ich_keras.data.head_crop import HeadCrop
from ich_keras.data.inputs import RESAMPLING
from ich_keras.data.intensity import Intensity, Normalisation
from ich_keras.data.views import View
from ich_keras.environment import choose_backend, choose_device, choose_precision
from ich_keras.errors import StaleError, UsageError
from ich_keras.input_changes import NO_CHANGES, InputChanges
from ich_keras.input_recipe import InputRecipe
from ich_keras.intensity_choice import RECIPE as RECIPE
from ich_keras.intensity_choice import choose_intensity
from ich_keras.labels import SIX, LabelSet
from ich_keras.models.options import PER_PROCESS
from ich_keras.models.presets import (
    PRESETS,
    SERIES_SHAPE,
    SLAB_SHAPE,
    STACK_SLICES,
    preset,
    view_kind,
)
from ich_keras.models.spec import ModelSpec
from ich_keras.recipe_json import WHERE_ABSENT, read_strictly

SCHEMA = 1

# Slices per sample; those of slabs and series as in the thesis's two 3D networks.
DEFAULT_SLICES = {
    "slice": 1,
    "stack": STACK_SLICES,
    "slab": SLAB_SHAPE[0],
    "series": SERIES_SHAPE[0],
}
# Samples per batch.
DEFAULT_BATCH = {"slice": 32, "stack": 32, "slab": 16, "series": 1}
# Batches per optimiser step: a batch of one series holds too few samples.
DEFAULT_ACCUMULATION = {"slice": 1, "stack": 1, "slab": 1, "series": 8}
# With pretrained weights, and from scratch.
DEFAULT_RATES = (1e-5, 3e-4)
_NONE_WHERE_ABSENT = {WHERE_ABSENT: None}


@dataclass(frozen=True)
class TrainingRecipe:
    """How the network is trained; see `DataConfig` and `FitConfig` for what each entry means.

    Args:
        weights: what training starts from; None starts from scratch.
        seed: of all random numbers.
        split: the name of the split, or its file.
        balance, augment, reverse, limit_series, loader_workers: as in `DataConfig`.
        batch_size: samples per batch.
        epochs: passes over the training split.
        learning_rate: after the warm-up.
        schedule, warmup_steps, weight_decay, loss, freeze, backbone_factor: as in `FitConfig`.
        accumulate: batches per optimiser step.
        step, recompute: as in `FitConfig`.
        compiled: as in `FitConfig`; None compiles on CUDA only.
        own_augment: the name of a user's augmentation, which then replaces `augment`.
        batch_norm: as in `FitConfig`; recipes of older versions, all of one process, lack it.
        label_weight, positive_weight, focal_gamma, focal_alpha, gamma_positive, gamma_negative,
            margin, patience, ema, swa: as in `FitConfig`; recipes of older versions lack them.
        own_callbacks: the classes of a user's callbacks; lacking where there were none.
        skip_empty_mm2: slices with less brain than this are left out of training; None: none are.
        changes: random changes beside the augmentation; recipes of older versions have none.
    """

    weights: str | None
    seed: int
    split: str
    balance: bool
    augment: str
    reverse: bool
    limit_series: int | None
    loader_workers: int
    batch_size: int
    epochs: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    loss: str
    freeze: str | None
    backbone_factor: float
    accumulate: int
    step: str
    recompute: str | None
    compiled: bool | None
    own_augment: str | None = None
    batch_norm: str = field(default=PER_PROCESS, metadata={WHERE_ABSENT: PER_PROCESS})
    label_weight: dict[str, float] | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    positive_weight: dict[str, float] | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    focal_gamma: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    focal_alpha: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    gamma_positive: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    gamma_negative: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    margin: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    patience: int | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    ema: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    swa: int | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    own_callbacks: str | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    skip_empty_mm2: float | None = field(default=None, metadata=_NONE_WHERE_ABSENT)
    changes: InputChanges = field(
        default=NO_CHANGES, metadata={WHERE_ABSENT: dataclasses.asdict(NO_CHANGES)}
    )


@dataclass(frozen=True)
class Recipe:
    """Everything a run's numbers depend on, apart from its data.

    Args:
        preset: the network's name.
        network: the network, for inputs of `inputs.shape`.
        inputs: how Hounsfield units become its input.
        training: how it is trained.
        backend: "torch", "jax" or "tensorflow".
        device: "cpu" or "cuda".
        precision: "float32", "bfloat16" or "float16".
        labels: what the network answers; in recipes of older versions RSNA's six.
    """

    preset: str
    network: ModelSpec
    inputs: InputRecipe
    training: TrainingRecipe
    backend: str
    device: str
    precision: str
    labels: LabelSet = field(default=SIX, metadata={WHERE_ABSENT: SIX.to_dict()})

    @classmethod
    def of(
        cls, config: RunConfig, cache_size: int | None = None, labels: LabelSet = SIX
    ) -> "Recipe":
        """Decide everything that a configuration leaves open.

        This also sets backend and device, so call it before Keras is imported.

        Args:
            config: the request.
            cache_size: rows and columns of the cached slices; None takes the input's size.
            labels: of the data.

        Raises:
            UsageError: the view does not fit the preset, the network needs more slices, the
                weights do not exist, or Keras already runs on another backend or device.
            EnvironmentProblem: the device or the backend is not available.
        """
        config.fit.loss_settings.require_sound(labels, "fit.")
        backend, device = choose_backend(config.backend), choose_device(config.device)
        precision = choose_precision(config.precision, device)
        if backend != "torch" and (config.fit.ema is not None or config.fit.swa is not None):
            raise UsageError(
                f"averages of the weights (ema, swa) on the backend {backend}; they need torch.",
                "Leave them out, or use --backend torch.",
            )
        view = _view(config)
        if config.data.reverse and not (view.has_slices and config.data.augment != "none"):
            raise UsageError(
                "data.reverse turns augmented stacks, slabs and series upside down; this run has"
                " none.",
                "Leave it out.",
            )
        size = config.data.size
        if cache_size is not None and size > cache_size:
            # Enlarging would only blur.
            raise UsageError(
                f"data.size is {size}, but the cache holds {cache_size}x{cache_size} pixels.",
                f"Train at {cache_size} or less.",
            )
        if config.windows is not None and view.is_stack:
            raise UsageError(
                f"windows {config.windows!r} on stacks: learnable windows are of one slice.",
                "Leave them out, or train on slices or slabs.",
            )
        intensity = choose_intensity(config, view)
        crop = None if config.data.crop is None else HeadCrop()
        before = (cache_size or size, RESAMPLING, crop, config.data.depth_mm)
        inputs = InputRecipe(view, intensity, size, *before)
        if config.data.skip_empty and view.kind == "series":
            raise UsageError(
                "data.skip_empty leaves out slices; this run is on whole series.", "Leave it out."
            )
        data, fit, changes = config.data, config.fit, config.data.changes
        changes.require_for(view.kind, intensity.is_windowed)
        return cls(
            preset=config.preset,
            network=preset(config.preset, inputs.shape, config.norm, config.windows),
            inputs=inputs,
            training=TrainingRecipe(
                weights=config.weights,
                seed=config.seed,
                **{
                    name: getattr(data, name)
                    for name in (
                        "split",
                        "balance",
                        "augment",
                        "reverse",
                        "limit_series",
                        "loader_workers",
                    )
                },
                **{
                    **{f.name: getattr(fit, f.name) for f in dataclasses.fields(fit)},
                    **fit.loss_settings.decided(),
                    "batch_size": fit.batch_size or DEFAULT_BATCH[view.kind],
                    "accumulate": fit.accumulate or DEFAULT_ACCUMULATION[view.kind],
                    "learning_rate": fit.learning_rate or DEFAULT_RATES[config.weights is None],
                },
                changes=changes,
                skip_empty_mm2=LEAST_BRAIN_MM2 if data.skip_empty else None,
            ),
            backend=backend,
            device=device,
            precision=precision,
            labels=labels,
        )

    @property
    def input_options(self) -> list[str]:
        """Return what was asked for of the input beside view, size and windows, in sentences."""
        lines = [f"Input: {self.inputs}."] if str(self.inputs) else []
        if self.training.skip_empty_mm2 is not None:
            least = f"{self.training.skip_empty_mm2:g} mm2"
            lines.append(f"Negative slices with less than {least} of brain are not trained on.")
        if self.training.changes:
            lines.append(f"Changed in training, beside augmentation: {self.training.changes}.")
        return lines

    @property
    def batch_device(self) -> str | None:
        """The `device` of `ich_keras.data.batches.view_batches`: where inputs are made."""
        return self.device if self.backend == "torch" and self.device != "cpu" else None

    def on(self, backend: str, device: str) -> "Recipe":
        """Return the recipe for another backend or device.

        It uses float32 where the hardware does not support the run's bfloat16.
        """
        precision = self.precision
        if precision == "bfloat16" and choose_precision("auto", device) != "bfloat16":
            precision = "float32"
        return replace(self, backend=backend, device=device, precision=precision)

    def as_config(self) -> RunConfig:
        """Return the configuration that requests exactly this recipe, with nothing left open."""
        inputs, training = self.inputs, self.training
        asked: dict[str, Any] = {
            **{f.name: getattr(training, f.name, None) for f in dataclasses.fields(DataConfig)},
            "size": inputs.size,
            "view": inputs.view.kind,
            "slices": inputs.view.num_slices,
            "edge": inputs.view.edge,
            "long_series": inputs.view.long_series,
            "tilted": inputs.view.tilted,
            "duplicate": inputs.view.duplicate,
            "intensity": inputs.intensity.name,
            "crop": None if inputs.crop is None else "head",
            "depth_mm": inputs.depth_mm,
            "skip_empty": training.skip_empty_mm2 is not None,
            **dataclasses.asdict(training.changes),
        }
        fit = {f.name: getattr(training, f.name) for f in dataclasses.fields(FitConfig)}
        return RunConfig(
            preset=self.preset,
            weights=training.weights,
            norm=self.network.norm,
            windows=None if self.network.windows is None else self.network.windows.kind,
            seed=training.seed,
            backend=self.backend,
            device=self.device,
            precision=self.precision,
            data=DataConfig(**asked),
            fit=FitConfig(**fit),
        )

    def to_dict(self) -> dict:
        """Return the recipe as a dictionary, ready for JSON."""
        content = dataclasses.asdict(self)
        content["network"] = self.network.to_dict()
        content["inputs"]["intensity"] = self.inputs.intensity.to_dict()
        content["labels"] = self.labels.to_dict()
        return {"schema": SCHEMA, **content}

    @classmethod
    def from_dict(cls, content: object, source: str = "the recipe") -> "Recipe":
        """Read a recipe back from what `to_dict` returned.

        Args:
            content: from JSON.
            source: where it comes from, for messages.

        Raises:
            StaleError: an entry is missing, unknown or of the wrong type, or this version cannot
                follow the recipe.
        """
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else content
            raise StaleError(
                f"{source} has schema {found!r}; expected {SCHEMA}.", "Train the run again."
            )
        recipe = read_strictly(cls, {k: v for k, v in content.items() if k != "schema"}, "", source)
        if recipe.inputs.resampling != RESAMPLING:
            raise StaleError(
                f"{source}: its slices were resized by {recipe.inputs.resampling!r}; this version"
                f" knows {RESAMPLING!r}.",
                "Use the version of ich_keras that trained the run.",
            )
        if recipe.network.input_shape != recipe.inputs.shape:
            raise StaleError(
                f"{source}: the network takes {recipe.network.input_shape}, its input is"
                f" {recipe.inputs.shape}.",
                "The recipe is damaged: train the run again.",
            )
        if recipe.network.windows is not None and not _is_hu(recipe.inputs.intensity):
            raise StaleError(
                f"{source}: the network learns windows and takes HU; its input is"
                f" {recipe.inputs.intensity.name!r}.",
                "The recipe is damaged: train the run again.",
            )
        return recipe


def _is_hu(intensity: Intensity) -> bool:
    """Tell whether an input is HU: its normalisation undoes its one window."""
    window, found = intensity.windows[0], intensity.normalisation
    if not isinstance(found, Normalisation) or intensity.channels != 1:
        return False
    return math.isclose(found.std[0] * window.width, 1) and math.isclose(
        found.mean[0] * window.width, -window.low
    )


def _view(config: RunConfig) -> View:
    """Return the view: as configured, or to suit the preset."""
    data, spec = config.data, PRESETS[config.preset].spec
    kind = view_kind(config.preset, data.view)
    count = DEFAULT_SLICES.get(kind, 1) if data.slices is None else data.slices
    view = View(kind, count, data.edge, data.long_series, data.tilted, data.duplicate)
    if view.is_volume != (spec.rank == 3):
        of_rank = {2: ("slices", "slice or stack"), 3: ("volumes", "slab or series")}
        takes, other = of_rank[spec.rank]
        raise UsageError(
            f"view {kind!r} with preset {config.preset}, which takes {takes}.",
            f"Use view {other}, or another preset (`ich presets`).",
        )
    return view
