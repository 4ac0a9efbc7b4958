"""Which intensity a training takes, where its configuration leaves that open."""

from typing import Any

from ich_keras.config import RunConfig
from ich_keras.data.intensity import HU, INTENSITIES, NNUNET, UNMEASURED, Intensity, intensity_of
from ich_keras.data.views import View
from ich_keras.errors import DataError, UsageError
from ich_keras.models.presets import PRESETS, STACK_SLICES, view_kind

# Key in the metadata of `model.keras` and in the record of a weights file.
RECIPE = "recipe"


def choose_intensity(config: RunConfig, view: View) -> Intensity:
    """Return the intensity: as configured, else as for the weights, else to suit the channels.

    A missing weights file is refused here, before any long work begins.

    Args:
        config: the request.
        view: what a sample is.
    """
    from ich_keras.models.weights_file import read_record
    from ich_keras.models.weights_lookup import find_weights

    path = None if config.weights is None else find_weights(config.weights, config.preset)
    record = {} if path is None else read_record(path)
    if config.windows is not None:
        return intensity_of(HU)  # what else is asked for was refused by the configuration
    if config.data.intensity == NNUNET:
        return UNMEASURED
    if config.data.intensity is not None:
        return intensity_of(config.data.intensity)
    # The channels in the file, which `weights-convert` may have changed.
    network_of_file = record.get("network") or {}
    spec = PRESETS[config.preset].spec
    per_sample = (network_of_file.get("input_shape") or [spec.channels])[-1]
    # A stack has those of all its slices. Without a file, of as many as the preset is made for.
    usual = view_kind(config.preset, None) == "stack"
    slices = view.num_slices if network_of_file and view.is_stack else 1
    slices = STACK_SLICES if not network_of_file and usual else slices
    channels = per_sample // slices if per_sample % slices == 0 else per_sample
    try:
        made_for = _recorded_intensity(record)
    except UsageError as error:
        raise DataError(
            f"{path}: the recipe in its record is damaged: {error.message}",
            "Fetch the file again, or choose --intensity yourself.",
        ) from error
    # Weights for single slices are no reason for another intensity: they are refused later, with
    # the command that spreads them over a stack.
    if made_for is not None and made_for.channels in (channels, per_sample):
        return made_for
    fitting = [known for known in INTENSITIES.values() if known.channels == channels]
    if not fitting:
        raise UsageError(
            f"no intensity has {channels} channels, which {config.weights or config.preset} takes.",
            f"Choose one: {', '.join(INTENSITIES)}.",
        )
    return fitting[0]


def _recorded_intensity(record: dict) -> Intensity | None:
    """Return the intensity that weights were made for: a run's by value, others' by name."""
    recipe = record.get(RECIPE)
    if isinstance(recipe, dict):
        inputs = recipe.get("inputs")
        made_for: Any = inputs.get("intensity") if isinstance(inputs, dict) else None
        return Intensity.from_dict(made_for)
    return INTENSITIES.get(record.get("intensity", ""))
