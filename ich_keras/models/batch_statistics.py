"""Whether a batch has statistics that batch normalisation can learn from."""

import math

from ich_keras.errors import UsageError
from ich_keras.models.spec import NUM_STAGES, ModelSpec


def require_trainable(spec: ModelSpec, batch_size: int) -> None:
    """Refuse a training whose batch normalisation has a single value per channel.

    Its variance is then 0 and its output a constant: the network would silently learn nothing.

    Raises:
        UsageError: naming the size after the last stage and the ways out.
    """
    last = spec.spatial_shapes()[f"layer{NUM_STAGES}"]
    lengths = [length for length in last if length is not None]
    is_known = len(lengths) == len(last)
    if spec.norm != "batch" or not is_known or math.prod(lengths) * batch_size > 1:
        return
    raise UsageError(
        f"an input of {spec.input_shape[:-1]} is {last} after the last stage: with a batch of"
        f" {batch_size}, batch normalisation has one value per channel and no variance.",
        "Take larger batches or inputs, or norm 'frozen' (with weights) or 'group'.",
    )
