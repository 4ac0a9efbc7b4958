"""The parity of every network on random weights, against an oracle; needs no checkpoint.

The statistics of the normalisations are random, too: with fresh ones (mean 0, variance 1) an
exchange of beta and mean, or of gamma and variance, would go unnoticed.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ich_keras.errors import UsageError
from ich_keras.keras_private import keep_float64
from ich_keras.labels import NUM_LABELS
from ich_keras.models.presets import preset
from ich_keras.models.spec import ModelSpec
from ich_keras.models.weights import HEAD
from weights_convert.mapping import COUNTER, to_torch
from weights_convert.parity import IMAGE_SIZES, Parity, compare, full_precision, worse
from weights_convert.reference import reference
from weights_convert.sources import SOURCES, Source, source_named
from weights_convert.state import load_state, state_of, variables_by_name

if TYPE_CHECKING:
    import keras
    from torch import nn

VOLUME_SIZES = ((1, 40, 31), (5, 33, 47), (16, 32, 32), (60, 32, 33))
# Long steps, so that rounding does not hide the gradient in the difference of the weights.
LEARNING_RATE = 2.0**12
_TINY = float(np.finfo(np.float32).tiny)


def randomise(module: "nn.Module", seed: int) -> None:
    """Give a torch network random kernels and statistics, in place.

    Kernels are He-normal, gamma is uniform in [0.5, 1.5] and the variance in [0.5, 2]; mean and
    beta are normal with standard deviation 0.1.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith(COUNTER):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(0.0, (2.0 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0.0, 0.1, generator=generator)


# Whose networks can be the oracle where they are installed: how the names of sources begin.
_OWNERS = ("torchvision", "timm")
# Their modules -> the features that these give.
_TAPS = {
    "relu": "stem",
    "act1": "stem",
    "stem": "stem",
    "maxpool": "maxpool",
    "avgpool": "avgpool",
    "global_pool": "avgpool",
    **{f"layer{stage}": f"layer{stage}" for stage in (1, 2, 3, 4)},
    "features.relu0": "stem",
    "features.pool0": "maxpool",
    **{f"features.denseblock{stage}": f"layer{stage}" for stage in (1, 2, 3)},
    "features.norm5": "layer4",  # before its ReLU
}


def published_network(source: Source, outputs: int) -> Any:
    """Return the network as its publisher builds it: torchvision's or timm's own.

    None if it is of another publisher, or the package is absent.
    """
    owner, _, name = source.name.partition("_")
    if owner not in _OWNERS or not importlib.util.find_spec(owner):
        return None
    if owner == "timm":
        return importlib.import_module("timm").create_model(name, num_classes=outputs)
    models = importlib.import_module("torchvision").models
    zoo = models if hasattr(models, name) else models.video
    return getattr(zoo, name)(num_classes=outputs)


def tapped(net: Any) -> Any:
    """Return a network of torchvision or timm so that it gives its features by name."""
    import torch

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net.eval()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            found: dict[str, torch.Tensor] = {}
            hooks = [
                module.register_forward_hook(
                    lambda _, __, y, key=_TAPS[name]: found.setdefault(
                        key, y.flatten(1) if key == "avgpool" else y.clone()
                    )
                )
                for name, module in self.net.named_modules()
                if name in _TAPS
            ]
            try:
                found[HEAD] = self.net(x)
            finally:
                for hook in hooks:
                    hook.remove()
            if "avgpool" not in found:  # DenseNet computes both outside of its modules
                found["layer4"] = found["layer4"].relu()
                found["avgpool"] = found["layer4"].mean((2, 3))
            return found

    return Oracle()


def oracle_of(source: Source, spec: ModelSpec) -> tuple["nn.Module", "nn.Module"]:
    """Return (torch network with six outputs that returns features, module with its state dict)."""
    owner = published_network(source, NUM_LABELS)
    if owner is not None:
        return tapped(owner), owner
    made = reference(spec, NUM_LABELS)
    return made, made


def keras_network(spec: ModelSpec, dtype: str = "float32") -> "keras.Model":
    """Build a classifier with logits and without dropout for inputs of any size."""
    import keras

    from ich_keras.models.backbone import backbone

    spec = replace(spec.with_any_size(), dropout=0.0)
    body = backbone(spec, dtype=dtype)
    x = keras.layers.Dense(NUM_LABELS, dtype=dtype, name=HEAD)(body.output)
    return keras.Model(body.input, x, name=body.name)


def _torch_gradients(
    model: "keras.Model", images: np.ndarray, direction: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the gradients of a Keras model on torch, by torch's names."""
    import torch

    output = model(torch.from_numpy(images), training=True)
    (output * torch.from_numpy(direction).to(output)).mean().backward()
    return {
        name: to_torch(variable.value.grad.cpu().numpy())
        for name, variable in variables_by_name(model).items()
        if variable.trainable
    }


def _step_gradients(
    model: "keras.Model", images: np.ndarray, direction: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the gradients, computed on any backend from one step of gradient descent."""
    import keras

    model.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE),
        loss=lambda truth, output: keras.ops.mean(truth * output, axis=-1),
    )
    before = state_of(model)
    model.train_on_batch(images, direction)
    after = state_of(model)
    return {n: (before[n].astype(np.float64) - after[n]) / LEARNING_RATE for n in before}


def _oracle_gradients(
    module: "nn.Module", images: np.ndarray, direction: np.ndarray
) -> list[np.ndarray]:
    """Return the gradients of the oracle's parameters."""
    import torch

    dtype = next(module.parameters()).dtype
    module.zero_grad()
    module.train()
    output = module(torch.from_numpy(np.moveaxis(images, -1, 1)).to(dtype))[HEAD]
    (output * torch.from_numpy(direction).to(dtype)).mean().backward()
    module.eval()
    return [p.grad.numpy().astype(np.float64) for p in module.parameters()]


def gradient_rows(
    module: "nn.Module", state_owner: "nn.Module", model: "keras.Model", images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Compare the gradients of one training step, with batch statistics.

    The loss is the head's output times random numbers, so that every weight matters. A float32
    gradient can jump: where rounding moves an activation across zero, its ReLU switches the whole
    path on or off. The row "oracle" shows how much the oracle's gradient differs from its own one
    in float64 for that reason; with dtype float64 almost nothing is left of it.

    Args:
        module: the oracle.
        state_owner: the module whose parameters have torch's names.
        model: the Keras network with the same weights; it may take a training step.
        images: float32 (N, *spatial, channels).

    Returns:
        "gradient": the largest absolute difference, and the largest relative one of any tensor
        (norm of the difference over norm of the gradient). "oracle": the same for the oracle
        against itself in float64.
    """
    import keras

    direction = np.random.default_rng(1).standard_normal((len(images), NUM_LABELS))
    direction = direction.astype(np.float32)
    expected = _oracle_gradients(module, images, direction)
    again = _oracle_gradients(copy.deepcopy(module).double(), images, direction)
    is_torch = keras.config.backend() == "torch"
    found = (_torch_gradients if is_torch else _step_gradients)(model, images, direction)
    rows = {"gradient": (0.0, 0.0), "oracle": (0.0, 0.0)}
    names = [name for name, _ in state_owner.named_parameters()]
    for name, gradient, other in zip(names, expected, again, strict=True):
        for row, value, truth in (
            ("gradient", found[name], gradient),
            ("oracle", gradient, other),
        ):
            off = value - truth
            relative = np.linalg.norm(off) / max(float(np.linalg.norm(truth)), _TINY)
            rows[row] = worse(rows[row], (float(np.abs(off).max()), float(relative)))
    return rows


def check(
    source_name: str,
    dtype: str = "float32",
    sizes: tuple[tuple[int, ...], ...] | None = None,
    seed: int = 0,
) -> Parity:
    """Compare a source's Keras network with its oracle on random weights and inputs.

    Args:
        source_name: a key of `SOURCES`.
        dtype: "float32" or "float64".
        sizes: of the inputs; None takes even, odd and mixed ones (in 3D 1, 5, 16 and 60 slices).
        seed: of weights and inputs.

    Returns:
        One row per feature, the logits ("fc"), and the rows of `gradient_rows`.
    """
    import torch

    if dtype not in ("float32", "float64"):
        raise UsageError(f"dtype {dtype!r}; expected 'float32' or 'float64'.")
    source = source_named(source_name)
    spec = preset(source.preset).with_any_size()
    module, state_owner = oracle_of(source, spec)
    randomise(state_owner, seed)
    module.to(getattr(torch, dtype))
    sizes = sizes or (IMAGE_SIZES if spec.rank == 2 else VOLUME_SIZES)
    # Large enough for meaningful statistics in the normalisations of the last stage.
    size = (96, 96) if spec.rank == 2 else (16, 64, 64)
    images = np.random.default_rng(seed).standard_normal((2, *size, spec.channels))
    with keep_float64() if dtype == "float64" else contextlib.nullcontext(), full_precision():
        model = keras_network(spec, dtype)
        load_state(model, {name: t.numpy() for name, t in state_owner.state_dict().items()})
        rows = dict(compare(module, model, sizes, spec.channels, batch_size=1, seed=seed).rows)
        rows |= gradient_rows(module, state_owner, model, images.astype(np.float32))
    return Parity(rows)


def check_all(names: tuple[str, ...] = (), dtype: str = "float32") -> Iterator[str]:
    """Check several sources and yield a Markdown table line by line.

    Args:
        names: keys of `SOURCES`; () takes one source for each network.
        dtype: "float32" or "float64".
    """
    # The two MedicalNet releases of a depth are the same network.
    names = names or tuple(name for name in SOURCES if not name.endswith("_23datasets"))
    header = None
    for name in names:
        rows = check(name, dtype).rows
        if header is None:
            header = ["stem", "maxpool", *(n for n in rows if n not in ("stem", "maxpool"))]
            yield f"| {dtype} | " + " | ".join(header) + " |"
            yield "|--" * (len(header) + 1) + "|"
        cells = [f"{rows[n][0]:.0e} / {rows[n][1]:.0e}" if n in rows else "-" for n in header]
        yield f"| {name} | " + " | ".join(cells) + " |"
