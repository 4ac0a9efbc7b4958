"""Takes training steps in one of two processes, in float64, and compares them with those of one.

Run as a program in the environment that torchrun sets; the first process prints, as JSON, how far
the weights of each case are from those that it computed alone with whole batches.
"""

import json
from dataclasses import replace

import keras
import numpy as np
import torch

from ich_keras.models.classifier import compile_classifier
from ich_keras.models.resnet import resnet
from ich_keras.models.spec import ModelSpec
from ich_keras.models.torch import distributed
from ich_keras.models.torch.distributed import join
from ich_keras.models.torch.step import distribute
from ich_keras.ranks import this_rank

SLICES = ModelSpec((16, 16, 3), depth=10, width=8, dropout=0.0)
SLAB = ModelSpec(
    (3, 16, 16, 1), depth=10, width=8, dropout=0.0, strides=((1, 2, 2),) * 4, shortcut="B"
)
# Samples of each batch: the last ones leave a process with fewer, and with none.
SIZES = (8, 8, 8, 5, 1)
# Case -> (network, settings of the compilation, batch statistics of all processes, sizes).
CASES = {
    "batch": (SLICES, {}, True, SIZES),
    "group": (replace(SLICES, input_shape=(48, 48, 3), norm="group"), {}, False, (8, 8, 5)),
    "frozen": (replace(SLICES, norm="frozen"), {}, False, SIZES),
    "accumulation": (SLICES, {"accumulate": 2}, True, (8, 8, 8, 5)),
    "label weights, clipping, decay": (
        SLICES,
        {"loss": "rsna", "global_clipnorm": 0.1, "weight_decay": 0.01},
        True,
        SIZES,
    ),
    "dropout, recomputation": (replace(SLICES, dropout=0.5), {"recompute": "stage"}, True, SIZES),
    "batch, per process": (SLICES, {}, False, (8, 8)),
    "slabs": (SLAB, {}, True, (4, 4, 3, 1)),
}


def network(spec: ModelSpec, settings: dict) -> keras.Model:
    """A network in float64 with uneven statistics, ending in six logits, compiled."""
    keras.utils.set_random_seed(3)
    backbone = resnet(replace(spec, dropout=0.0), dtype="float64")
    x = backbone.output
    if spec.dropout:
        x = keras.layers.Dropout(spec.dropout, dtype="float64")(x)
    model = keras.Model(backbone.input, keras.layers.Dense(6, dtype="float64", name="fc")(x))
    random = np.random.default_rng(5)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(random.normal(0, 1, layer.moving_mean.shape))
            layer.moving_variance.assign(random.uniform(0.5, 2, layer.moving_variance.shape))
    return compile_classifier(model, 1e-2, **settings)


def train(model: keras.Model, sizes: tuple[int, ...], part) -> tuple[list[np.ndarray], float]:
    """Take a step for each batch; return all variables and the loss that `fit` would tell."""
    random = np.random.default_rng(7)
    model.optimizer.build(model.trainable_variables)
    model.make_train_function()
    keras.utils.set_random_seed(11)
    logs = {}
    for size in sizes:
        # Unlike samples: statistics of a part are far from those of the whole.
        x = random.normal(0, 1, (size, *model.input_shape[1:])) * np.arange(1, size + 1).reshape(
            -1, *[1] * (len(model.input_shape) - 1)
        )
        y = random.integers(0, 2, (size, 6)).astype(np.float32)
        own = part(size)
        logs = model.train_function([(x[own].astype(np.float32), y[own])])
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(v.numpy(), np.float64) for v in variables], float(logs["loss"])


def main() -> None:
    """Train every case in both ways."""
    rank = this_rank()
    group = join(rank, "cpu")
    distributed.BUCKET_BYTES = 2**14  # several buckets, also in a small network
    told = {}
    for name, (spec, settings, synchronised, sizes) in CASES.items():
        model = network(spec, settings)
        distribute(model, group, synchronised)
        together, loss = train(model, sizes, rank.part)
        others = group.gather([v.tobytes() for v in together])
        alone, loss_alone = train(network(spec, settings), sizes, slice)
        told[name] = {
            "weights": max(
                float(np.abs(a - b).max()) for a, b in zip(together, alone, strict=True)
            ),
            "loss": abs(loss - loss_alone),
            "alike": others[0] == others[1],
        }
    if rank.is_first:
        print(json.dumps(told))
    group.leave()
    again = join(rank, "cpu")  # as a second training does
    assert again.gather(rank.number) == [0, 1]
    again.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
