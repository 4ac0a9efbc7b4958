"""RunConfig: all settings of a training, frozen; saved as one JSON file in its run folder."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ich_keras.environment import BACKENDS, DEVICES
from ich_keras.errors import UsageError
from ich_keras.input_changes import InputChanges
from ich_keras.models.options import (
    PER_PROCESS,
    RANGES,
    LossSettings,
    require_choice,
    require_in_range,
)
from ich_keras.models.presets import require_preset
from ich_keras.paths import path_of
from ich_keras.synonyms import meant_by, question

# The names in `ich_keras.data.augment` and `ich_keras.data.intensity`; a test compares them. They
# are repeated because those modules import OpenCV, which would slow down `--help`.
AUGMENT = ("fast", "thesis", "flip", "none", "own")
CROPS = ("head",)
INTENSITY = ("windows", "wide", "head-z-score", "hu", "bone-windows", "nnunet")


@dataclass(frozen=True)
class DataConfig:
    """Which slices to use, and how to make batches of them.

    Args:
        size: rows and columns of the network's input, pixels.
        view: what one sample is: "slice", "stack", "slab" or "series"; None suits the preset.
        slices: number of slices in a stack (None: 3), slab (None: 5) or series (None: 60).
        edge: "air" or "repeat"; see `ich_keras.View`.
        long_series: "spread" or "middle"; see `ich_keras.View`.
        tilted: "keep", "skip" or "deshear"; see `ich_keras.View`.
        duplicate: "skip" or "keep"; see `ich_keras.View`.
        split: "patient", "none", "thesis-slices", "thesis-series", or a CSV file.
        balance: train on as many negative samples as positive ones (redrawn every epoch).
        augment: "fast", "thesis", "flip" or "none": random changes to training samples, the same
            for all slices of a sample (`ich_keras.data.batches.view_batches`). Validation, test
            and prediction samples are never changed. "own" stands for a function of yours, given
            to `ich_keras.train(..., augment=function)`.
        reverse: turn every second stack, slab or series, drawn at random, upside down in training.
        limit_series: use only this many series, the first ones; None uses all.
        intensity: from HU to input: "windows" (three channels), "bone-windows" (four), "wide",
            "head-z-score" or "nnunet" (one channel; measured on the training split), or "hu", which
            learnable windows take; None takes the one the weights were made for, or else one for
            the preset.
        loader_workers: processes that prepare batches; 0 uses the training process.
        hu_noise, window_jitter, width_jitter, drop_slices, mixup, cutmix: random changes of
            training samples beside `augment`; see `InputChanges`. None is without.
        skip_empty: leave slices without brain out of training batches, never out of evaluation.
        crop: "head" cuts the head out of each series, with a margin; None leaves slices whole.
        depth_mm: resample whole series to this distance between slices; None does not.
    """

    size: int = 256
    view: str | None = None
    slices: int | None = None
    edge: str = "air"
    long_series: str = "spread"
    tilted: str = "keep"
    duplicate: str = "skip"
    split: str = "patient"
    balance: bool = False
    augment: str = "fast"
    reverse: bool = False
    limit_series: int | None = None
    intensity: str | None = None
    loader_workers: int = 0
    hu_noise: float | None = None
    window_jitter: float | None = None
    width_jitter: float | None = None
    drop_slices: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    skip_empty: bool = False
    crop: str | None = None
    depth_mm: float | None = None

    @property
    def changes(self) -> InputChanges:
        """The random changes that are asked for."""
        return InputChanges.asked_by(self)


@dataclass(frozen=True)
class FitConfig:
    """How the network is fitted.

    Args:
        batch_size: samples per step, of all processes together; None takes 32 slices or stacks, 16
            slabs or 1 series.
        epochs: passes over the training split.
        learning_rate: None means 1e-5 with weights, 3e-4 from scratch.
        schedule: "constant" or "cosine".
        warmup_steps: batches over which the learning rate rises linearly from zero.
        weight_decay: decoupled; applies to kernels only.
        loss: "bce", "rsna" (`any` counted twice), "focal" or "asymmetric".
        label_weight, positive_weight, focal_gamma, focal_alpha, gamma_positive, gamma_negative,
            margin: see `LossSettings`.
        freeze: freeze the network up to and including "stem", "layer1", ... "layer4"; None trains
            all of it.
        backbone_factor: the backbone's learning rate, as a multiple of `learning_rate`.
        accumulate: batches per optimiser step; None takes 8 for series, else 1.
        step: "fast" or "stock" (Keras' own steps); see `ich_keras.choose_step`.
        recompute: "stage" or "block" keeps fewer activations and recomputes the rest; None keeps
            all.
        compiled: run the training function through `torch.compile`; None does so on CUDA.
        batch_norm: where several processes train, "per-process" takes the batch statistics of each
            one's samples, "synchronised" those of all.
        patience: stop after so many epochs without a lower validation log loss, by which the best
            weights are chosen; None trains for all epochs.
        ema: judge and keep the moving average of the weights, with this decay per optimiser step;
            None takes the weights themselves.
        swa: in each of the last `swa` epochs, judge and keep the average of the weights after the
            epochs from the first of them on, the statistics of batch normalisation included; None
            averages nothing.
    """

    batch_size: int | None = None
    epochs: int = 6
    learning_rate: float | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    loss: str = "bce"
    freeze: str | None = None
    backbone_factor: float = 1.0
    accumulate: int | None = None
    step: str = "fast"
    recompute: str | None = None
    compiled: bool | None = None
    batch_norm: str = PER_PROCESS
    label_weight: dict[str, float] | None = None
    positive_weight: dict[str, float] | None = None
    focal_gamma: float | None = None
    focal_alpha: float | None = None
    gamma_positive: float | None = None
    gamma_negative: float | None = None
    margin: float | None = None
    patience: int | None = None
    ema: float | None = None
    swa: int | None = None

    @property
    def loss_settings(self) -> LossSettings:
        """What is asked of the loss."""
        return loss_settings_of(self)


@dataclass(frozen=True)
class RunConfig:
    """One training: network, weights, seed, backend and device, data and fit.

    Args:
        preset: the network.
        weights: a `.weights.h5` file or the name of converted weights; None starts from scratch.
        norm: "batch", "frozen" or "group"; see `ModelSpec`.
        windows: "linear" or "sigmoid" windows that are trained with the network; see
            `ich_keras.models.windows.LearnedWindows`. None fixes them.
        seed: of everything random.
        backend: of Keras; None takes the one already loaded, else KERAS_BACKEND, else torch.
        device: "auto", "cpu" or "cuda".
        precision: "float32", "bfloat16" or "float16" for all but the head and the loss; "auto"
            takes bfloat16 on torch where the hardware supports it, otherwise float32.
        data: which slices to use, and how.
        fit: how to fit the network.
    """

    preset: str = "resnet18_2d"
    weights: str | None = None
    norm: str = "batch"
    windows: str | None = None
    seed: int = 0
    backend: str | None = None
    device: str = "auto"
    precision: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        require_preset(self.preset)
        for name, value, least, most in (
            ("data.size", self.data.size, 16, 4096),
            ("data.slices", self.data.slices, 1, 4096),
            ("data.limit_series", self.data.limit_series, 1, 10**9),
            ("data.loader_workers", self.data.loader_workers, 0, 1024),
            ("fit.batch_size", self.fit.batch_size, 1, 2**16),
            ("fit.epochs", self.fit.epochs, 1, 10**6),
            ("fit.patience", self.fit.patience, 1, 10**6),
            ("fit.swa", self.fit.swa, 2, self.fit.epochs),
            ("seed", self.seed, 0, 2**32 - 1),
        ):
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} is {value}; expected at least {least}, at most {most}.")
        for name, path in (("weights", self.weights), ("data.split", self.data.split)):
            if path is not None:
                path_of(str(path), name)
        self.fit.loss_settings.require_sound(None, "fit.")
        InputChanges.asked_by(self.data)  # refuses what is out of range
        for name in RANGES:
            number = getattr(self.fit, name)
            if isinstance(number, int | float):
                require_in_range(name, number, f"fit.{name}")
        if self.fit.swa is not None and (self.fit.ema is not None or self.fit.patience is not None):
            other = "ema" if self.fit.ema is not None else "patience"
            why = "both average" if other == "ema" else "the last epochs are not known before"
            raise UsageError(f"fit.swa with fit.{other}: {why}.", "Leave one of them out.")
        if self.fit.freeze is not None and self.weights is None:
            raise UsageError(
                "fit.freeze without weights would freeze random numbers.", "Add --weights."
            )
        if self.fit.backbone_factor != 1 and self.weights is None:
            raise UsageError(
                "fit.backbone_factor without weights: backbone and head both start at random.",
                "Add --weights, or leave it at 1.",
            )
        if self.norm == "frozen" and self.weights is None:
            raise UsageError(
                "norm 'frozen' without weights would freeze meaningless statistics.",
                "Add --weights, or use norm 'group'.",
            )
        require_choice("norm", self.norm)
        self._require_windows()
        require_choice("precision", self.precision, also=("auto",))
        for name in ("step", "schedule", "batch_norm"):
            require_choice(name, getattr(self.fit, name), f"fit.{name}")
        for name in ("recompute", "freeze"):
            if getattr(self.fit, name) is not None:
                require_choice(name, getattr(self.fit, name), f"fit.{name}")
        for name, chosen, known in (
            ("backend", self.backend, (None, *BACKENDS)),
            ("device", self.device, DEVICES),
            ("data.augment", self.data.augment, AUGMENT),
            ("data.intensity", self.data.intensity, (None, *INTENSITY)),
            ("data.crop", self.data.crop, (None, *CROPS)),
        ):
            if chosen not in known:
                names = ", ".join(option for option in known if option is not None)
                raise UsageError(f"{name} is {chosen!r}; expected one of {names}.")

    def _require_windows(self) -> None:
        asked, needed = self.data.intensity, "hu"
        if self.windows is None:
            return
        require_choice("windows", self.windows)
        if asked not in (None, needed):
            raise UsageError(
                f"data.intensity is {asked!r} with windows {self.windows!r}: a network that learns"
                " its windows takes HU.",
                f"Leave the intensity out (or give {needed}), or the windows.",
            )

    def require_no_own_augment(self) -> None:
        """Refuse a configuration that needs a function nobody gave.

        Raises:
            UsageError: `data.augment` is "own".
        """
        if self.data.augment == "own":
            raise UsageError(
                "data.augment is 'own': an augmentation of your own, which is not given.",
                "Call ich_keras.train(..., augment=FUNCTION), or choose thesis, flip or none.",
            )

    def with_settings(self, settings: Mapping[str, Any]) -> "RunConfig":
        """Return the configuration with other values of any fields, `data` and `fit` included.

        Args:
            settings: by name, such as {"preset": "resnet18_3d", "epochs": 3}.

        Raises:
            UsageError: a name is unknown (the hint names the nearest), or a value cannot be.

        >>> RunConfig().with_settings({"epochs": 3}).fit.epochs
        3
        """
        content = self.to_dict()
        places = [content["data"], content["fit"], content]
        known = [name for place in places for name in place if name not in ("data", "fit")]
        for name, value in settings.items():
            if name not in known:
                hint = question(meant_by(name, known)) or f"Known: {', '.join(known)}."
                raise UsageError(f"there is no setting {name!r}.", hint)
            next(place for place in places if name in place)[name] = value
        return RunConfig.from_dict(content)

    def to_dict(self) -> dict:
        """Return the configuration as nested dictionaries, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict) -> "RunConfig":
        """Read a configuration back, strictly.

        Raises:
            UsageError: a key is unknown (the hint suggests the nearest), or a value has the wrong
                type.
        """
        return _from_dict(cls, content, "")


def loss_settings_of(settings: Any) -> LossSettings:
    """Return what a `FitConfig`, or the training of a recipe, asks of the loss."""
    names = [field.name for field in dataclasses.fields(LossSettings)]
    return LossSettings(**{name: getattr(settings, name) for name in names})


def _from_dict(cls: Any, content: object, place: str) -> Any:
    if not isinstance(content, dict):
        raise UsageError(
            f"config: {place.rstrip('.') or 'the file'} is {content!r}; expected an object."
        )
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        if key not in known:
            near = meant_by(key, known)
            hint = question(near[:1]) or f"Known: {', '.join(known)}."
            raise UsageError(f"config: unknown key {place + key!r}.", hint)
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _from_dict(hints[key], value, f"{place}{key}.")
        else:
            values[key] = _checked(hints[key], value, place + key)
    return cls(**values)


def _checked(expected: Any, value: Any, place: str) -> Any:
    options, names = kinds_of(expected)
    if type(value) in options:
        return value
    if float in options and type(value) is int and abs(value) < 2**53:
        return float(value)
    raise UsageError(f"config: {place} is {value!r}; expected {names}.")


def kinds_of(annotation: Any) -> tuple[tuple[type, ...], str]:
    """Return the types that a field may have, and how a message calls them.

    >>> kinds_of(int | None)[1]
    'int or null'
    """
    is_union = isinstance(annotation, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    options = tuple(typing.get_origin(t) or t for t in options)  # dict[str, float] is a dict
    return options, " or ".join("null" if t is type(None) else t.__name__ for t in options)
