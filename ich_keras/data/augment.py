"""Random changes of training slices: by name, or a function of your own. Of the names, "thesis" is
albumentations behind one small function; `ich_keras.data.draws` has the others.

(albumentations by itself gives every worker the same random stream; see `ich_keras.data.seeds`.)
"""

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ich_keras.data.seeds import step_seed
from ich_keras.errors import UsageError

# change(images, seed) -> images of the same shape
Change = Callable[[np.ndarray, int], np.ndarray]

AUGMENTATIONS = ("fast", "thesis", "flip")
BY_DRAWS = ("fast", "flip")  # `ich_keras.data.draws` draws them; albumentations is not needed
# Ranges of the thesis (albumentations' defaults of 2021).
FLIP_PROBABILITY = 0.5
AFFINE_PROBABILITY = 0.5
MAX_SHIFT = 0.0625  # of the side
MAX_SCALE = 0.1
MAX_ROTATION_DEGREES = 45
BRIGHTNESS_PROBABILITY = 0.5
MAX_BRIGHTNESS = 0.2
MAX_CONTRAST = 0.2
_LONGEST_NAME = 300
_CONSTANTS = (bool, int, float, str, bytes, type(None), np.generic)
REVERSE_PROBABILITY = 0.5  # not the thesis's: upside down along the slices


@dataclass(frozen=True)
class Augmentation:
    """A change of your own, and where it stands in the order of preprocessing.

    Args:
        function: called as `function(images, seed)` once per sample and epoch, with float32
            (rows, columns, channels), or (slices, rows, columns, channels) of all other views.
            It returns float32 of the same shape, finite, and in 0..1 before normalisation. What
            it draws must depend on `seed` alone. It may change `images` in place.
        after_normalisation: False gives it windows in 0..1, as the library's own augmentations
            get them; True the network's input, already normalised.
    """

    function: Change
    after_normalisation: bool = False


# What `augment` may be: a name, a function on windows, or a function and its place.
Augment = str | Change | Augmentation


def seed_pipeline(pipeline: Any, seed: int) -> None:
    """Give each step of an albumentations pipeline a random stream of its own.

    The pipeline's `set_random_seed` gives the same seed to all of them: they would be applied
    together or not at all, and by related amounts.
    """
    for number, step in enumerate(pipeline.transforms):
        step.set_random_seed(step_seed(seed, number))


def require_augmentation(augment: Augment | None, workers: int = 0) -> None:
    """Refuse what is not an augmentation, or cannot reach worker processes.

    Args:
        augment: None stands for no augmentation.
        workers: processes that will make the batches.

    Raises:
        UsageError: an unknown name, not a function, or a function that cannot be sent.
    """
    if augment is None:
        return
    if isinstance(augment, str):
        _require_name(augment)
        return
    function = _function_of(augment)
    if not callable(function):
        raise UsageError(
            f"augmentation {function!r} is not a function; expected"
            " `function(images, seed) -> images`, an `Augmentation` of one, or a name.",
        )
    _require_two_arguments(function)
    if workers:
        _require_sendable(function)


def _require_two_arguments(function: Change) -> None:
    try:
        inspect.signature(function).bind(None, 0)
    except TypeError as error:
        raise UsageError(
            f"augmentation {_name_of(function)}: {error}; expected `function(images, seed)`."
        ) from error
    except ValueError:
        return  # a built-in without a signature; the first call shows


def _require_name(name: str) -> None:
    if name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        raise UsageError(
            f"augmentation {name!r}; expected one of {known}, or a function of your own."
        )


def _function_of(augment: Change | Augmentation) -> Change:
    return augment.function if isinstance(augment, Augmentation) else augment


def augmentation_name(augment: Change | Augmentation) -> str:
    """Return what a run remembers of a user's augmentation, to recognise it when it is resumed.

    That is the module and name; the arguments of a partial function; the numbers and texts that an
    object or a function defined in another holds; the source of a lambda; and whether it comes
    after normalisation. What else a function does is not compared.

    >>> augmentation_name(functools.partial(np.clip, 0.1, a_max=1))
    'partial(numpy.clip, 0.1, a_max=1)'
    """
    name = _described(_function_of(augment))
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}... {_digest(name.encode())}"
    return f"{name}, after normalisation" if comes_after_normalisation(augment) else name


def _described(thing: Any) -> str:
    if isinstance(thing, functools.partial):
        parts = [_described(thing.func), *map(_value, thing.args)]
        parts += [f"{name}={_value(value)}" for name, value in thing.keywords.items()]
        return f"partial({', '.join(parts)})"
    if inspect.ismethod(thing) and not inspect.isclass(thing.__self__):
        return f"{_described(thing.__self__)}.{thing.__name__}"
    if not hasattr(thing, "__qualname__"):
        # Without what begins with an underscore: counters and random generators, which change.
        held = {k: v for k, v in getattr(thing, "__dict__", {}).items() if not k.startswith("_")}
        arguments = ", ".join(f"{name}={_value(value)}" for name, value in held.items())
        return f"{_full_name(type(thing))}({arguments})"
    name = _full_name(thing)
    if thing.__qualname__.endswith("<lambda>"):
        # Lambdas of one place share their name.
        with contextlib.suppress(OSError, TypeError):
            name += f" {_digest(inspect.getsource(thing).strip().encode())}"
    if inspect.isfunction(thing) and thing.__closure__:
        outer = inspect.getclosurevars(thing).nonlocals
        # Lists and the like may grow from call to call.
        constants = [f"{k}={v!r}" for k, v in outer.items() if isinstance(v, _CONSTANTS)]
        name += f"({', '.join(constants)})" if constants else ""
    return name


def _full_name(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _value(value: Any) -> str:
    """Return a value that an augmentation holds: numbers and texts as they are, others by type."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"array {value.shape} {_digest(np.ascontiguousarray(value).tobytes())}"
    entries = [value]
    if isinstance(value, dict):
        entries = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        entries = list(value)
    if all(isinstance(entry, _CONSTANTS) for entry in entries):
        return repr(value)
    return _full_name(value if hasattr(value, "__qualname__") else type(value))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _name_of(function: Change) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _require_sendable(function: Change) -> None:
    """Refuse what a worker process could not import: it starts anew and imports by name."""
    home = getattr(function, "__module__", None)
    try:
        pickle.dumps(function)
        reason = ""
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = str(error)
    if home == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
        reason = "it was defined in an interactive session or a notebook"
    if reason:
        raise UsageError(
            f"augmentation {_name_of(function)} cannot be sent to worker processes: {reason}.",
            "Define it at the top level of a module, or make the batches with workers=0.",
        )


def comes_after_normalisation(augment: Augment | None) -> bool:
    """Tell whether an augmentation receives the network's input instead of windows."""
    return isinstance(augment, Augmentation) and augment.after_normalisation


def change_of(augment: Augment, changes_grey: bool = True) -> Change:
    """Return the function behind an augmentation; what your own returns is checked.

    Args:
        augment: a name, or your own.
        changes_grey: see `make_augmentation`.
    """
    if isinstance(augment, str):
        return make_augmentation(augment, changes_grey)
    function, is_after = _function_of(augment), comes_after_normalisation(augment)

    def checked(images: np.ndarray, seed: int) -> np.ndarray:
        expected = images.shape  # before the call: it may change `images`
        changed = function(images, seed)
        _require_images(changed, expected, _name_of(function), is_after)
        return changed

    return checked


def _require_images(changed: Any, expected: tuple[int, ...], name: str, is_after: bool) -> None:
    if not isinstance(changed, np.ndarray):
        found = type(changed).__name__
    elif changed.shape != expected or changed.dtype != np.float32:
        found = f"{changed.dtype} {changed.shape}"
    elif not np.isfinite(changed).all():
        found = "values that are not finite"
    elif not is_after and (changed.min() < 0 or changed.max() > 1):
        found = f"values from {changed.min():.6g} to {changed.max():.6g}"
    else:
        return
    limits = "finite" if is_after else "finite, in 0..1 (windows; normalisation comes later)"
    raise UsageError(
        f"augmentation {name} returned {found}; expected float32 {expected}, {limits}.",
        "Correct the function; np.clip(images, 0, 1, dtype=np.float32) helps with windows.",
    )


def make_augmentation(name: str = "thesis", changes_grey: bool = True) -> Change:
    """Build an augmentation by name.

    Args:
        name: "thesis": flips left-right and up-down, shift-scale-rotate, brightness and contrast;
            "flip": left-right flips only, for trainings of a few hundred steps.
        changes_grey: change brightness and contrast, too; not where the input is HU.

    Returns:
        A function `augment(windows, seed) -> windows` on float32 (rows, columns, channels), or
        (slices, rows, columns, channels), with values in 0..1. It changes all slices alike; the
        result has the same shape and range. It refuses other values, because albumentations
        silently clips HU to [0, 1].

    Source:
        The thesis's section on augmentation; `Affine` with the ranges of its
        `ShiftScaleRotate(0.0625, 0.1, 45)`, borders reflected.

    Raises:
        UsageError: unknown name, or one that changes HU instead of windows.
    """
    _require_name(name)
    if name == "fast":
        raise UsageError(
            'augmentation "fast" changes Hounsfield units, not windows.',
            'Ask `view_batches` for it, or take "thesis", which draws the same.',
        )
    # Otherwise albumentations asks a server for news on import.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations
    import cv2

    steps = [albumentations.HorizontalFlip(p=FLIP_PROBABILITY)]
    if name == "thesis":
        steps += [
            albumentations.VerticalFlip(p=FLIP_PROBABILITY),
            albumentations.Affine(
                translate_percent=(-MAX_SHIFT, MAX_SHIFT),
                scale=(1 - MAX_SCALE, 1 + MAX_SCALE),
                keep_ratio=True,
                rotate=(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),
                interpolation=cv2.INTER_LINEAR,
                border_mode=cv2.BORDER_REFLECT_101,
                p=AFFINE_PROBABILITY,
            ),
        ]
    if name == "thesis" and changes_grey:
        steps.append(
            albumentations.RandomBrightnessContrast(
                brightness_limit=MAX_BRIGHTNESS,
                contrast_limit=MAX_CONTRAST,
                p=BRIGHTNESS_PROBABILITY,
            )
        )
    pipeline = albumentations.Compose(steps)

    def change(image: np.ndarray, seed: int) -> np.ndarray:
        seed_pipeline(pipeline, seed)
        return np.clip(pipeline(image=image)["image"], 0.0, 1.0, dtype=np.float32)

    def augment(windows: np.ndarray, seed: int) -> np.ndarray:
        if windows.dtype != np.float32 or windows.min() < 0 or windows.max() > 1:
            raise ValueError(
                f"augmentation received {windows.dtype} values from {windows.min()} to"
                f" {windows.max()}; expected windows, float32 in 0..1."
            )
        if windows.ndim == 3:
            return change(windows, seed)
        # Slice by slice with the same draws. As channels of one image they are slower, and too
        # many: OpenCV 5 takes 128 at most, 60 slices of three windows are 180.
        return np.stack([change(image, seed) for image in windows])

    return augment
