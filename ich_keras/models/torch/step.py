"""`fit`, `evaluate` and `predict` of a Keras model on torch, by the flat function.

The Keras model stays what it is: its graph, its variables, its files, its optimiser, its loops.
`accelerate` only puts other steps under Keras' loops; `model.compile` by anyone keeps them. What
these steps cannot honour runs on Keras' own steps, with one warning that says why.

This folder is the only part of the networks that imports torch.
"""

import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras

from ich_keras.errors import UsageError
from ich_keras.keras_private import has_loss_weights, has_metrics, mark_as_called, tensor_of
from ich_keras.models.graph import CONVOLUTIONS, UnknownStep
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.torch.distributed import Group
from ich_keras.models.torch.fast import FastSteps, StepOptions
from ich_keras.models.torch.operations import Across

ATTRIBUTE = "_ich_torch_step"
_KINDS = ("train", "test", "predict")


class StockStep(UserWarning):
    """A model runs on Keras' own, slower steps; the text says why."""


def accelerate(model: keras.Model, options: StepOptions | None = None) -> bool:
    """Put the fast steps under a functional model; `stock` takes them away.

    Kernels are laid out in memory as the convolutions read them; their shapes and values stay.

    Args:
        model: functional, of the layers our networks are made of; compiled or not.
        options: see `StepOptions`.

    Returns:
        Whether the model could be read; when not, a `StockStep` warning says why.

    Raises:
        UsageError: a `keras.distribution` is in force.
    """
    require_no_distribution()
    steps = FastSteps(model, options or StepOptions())
    try:
        steps.prepare()
    except UnknownStep as reason:
        _warn(str(reason))
        return False
    for layer in model.layers:
        if isinstance(layer, CONVOLUTIONS):
            _lay_out(layer.kernel)
    _attach(model, steps)
    return True


def stock(model: keras.Model) -> None:
    """Give a model Keras' own steps back; weights and optimiser stay as they are.

    Raises:
        UsageError: a `keras.distribution` is in force.
    """
    require_no_distribution()
    if accelerated(model) is None:
        return
    for layer in model.layers:
        if isinstance(layer, CONVOLUTIONS):
            kernel = tensor_of(layer.kernel)
            kernel.data = kernel.data.contiguous()
    _detach(model)


def accelerated(model: keras.Model) -> StepOptions | None:
    """Return the options of a model's fast steps; None on Keras' own."""
    steps = getattr(model, ATTRIBUTE, None)
    return None if steps is None else steps.options


def distribute(model: keras.Model, group: Group, synchronised: bool) -> None:
    """Let the training steps of a compiled model be those of several processes.

    Each gives its part of a batch; losses, gradients and the loss that `fit` tells are those of the
    whole. Evaluation and prediction stay each process's own.

    Args:
        model: on the fast steps, with a loss of ours that averages over samples, and no metrics.
        group: the processes.
        synchronised: batch normalisation by the statistics of all processes.

    Raises:
        UsageError: the model has other steps, another loss, metrics or regularisers.
    """
    options, loss = accelerated(model), model.loss
    is_ours = isinstance(loss, BinaryCrossEntropy) and loss.reduction == "sum_over_batch_size"
    if options is None or not is_ours or has_metrics(model) or has_loss_weights(model):
        raise UsageError(
            "several processes train a model only on the fast steps, with the mean of"
            " ich_keras.BinaryCrossEntropy as its loss and without metrics.",
            "Compile it with ich_keras.compile_classifier.",
        )
    if not model.trainable_variables:
        raise UsageError("the model has nothing to train.", "Freeze less of it.")
    accelerate(model, replace(options, across=Across(group, synchronised)))


def require_no_distribution() -> None:
    """Refuse to run under a `keras.distribution`.

    Keras' torch backend takes one and does nothing with it: neither its steps nor ours would split
    a batch or average gradients, and each process would train a copy of its own.

    Raises:
        UsageError: one is in force.
    """
    distribution = keras.distribution.distribution()
    if distribution is not None:
        raise UsageError(
            f"a keras.distribution is in force ({type(distribution).__name__}), which Keras' torch"
            " backend does not carry out: each process would train its own copy on one device.",
            "Call keras.distribution.set_distribution(None), or use the jax backend.",
        )


# What is hung on Keras' model, and nowhere else: the steps under `ATTRIBUTE`; a
# `make_<kind>_function` of our own for each kind, which hides that of the class; and the
# `<kind>_function` that it makes, which is Keras' own attribute.


def _attach(model: keras.Model, steps: FastSteps) -> None:
    setattr(model, ATTRIBUTE, steps)
    for kind in _KINDS:
        setattr(model, f"make_{kind}_function", types.MethodType(_maker(kind), model))
        setattr(model, f"{kind}_function", None)


def _detach(model: keras.Model) -> None:
    delattr(model, ATTRIBUTE)
    for kind in _KINDS:
        delattr(model, f"make_{kind}_function")
        setattr(model, f"{kind}_function", None)


def _maker(kind: str) -> Callable[..., None]:
    """Return a `make_<kind>_function` that chooses between the fast step and Keras'."""

    def make(model: Any, force: bool = False) -> None:
        steps = getattr(model, ATTRIBUTE)
        require_no_distribution()
        if getattr(model, "steps_per_execution", 1) != 1:
            getattr(type(model), f"make_{kind}_function")(model, True)  # Keras refuses it on torch
        reason = steps.reason_for_stock(kind)
        if reason is None:
            steps.prepare()
            if kind != "predict":
                _require_fitting_loss(model)
            mark_as_called(model)
            setattr(model, f"{kind}_function", getattr(steps, kind))
            return
        if steps.options.across is not None and kind == "train":
            raise UsageError(
                f"{reason}: several processes train on the fast steps only.",
                "Train in one process.",
            )
        current = getattr(model, f"{kind}_function")
        if current is None or getattr(current, "__self__", None) is steps:
            _warn(reason)
            force = True
        getattr(type(model), f"make_{kind}_function")(model, force)

    make.__name__ = f"make_{kind}_function"
    return make


def _warn(reason: str) -> None:
    message = (
        f"{reason}. Keras' own steps are used. They are slower, and in training keep Keras' running"
        " variance (divided by n, not n - 1)."
    )
    warnings.warn(message, StockStep, stacklevel=4)


def _lay_out(kernel: Any) -> None:
    """Move a kernel's output channels first in memory, behind the shape that Keras sees.

    The permuted view that torch's convolution takes is then channels_last, as it wants it.
    """
    tensor = tensor_of(kernel)
    last = tensor.dim() - 1
    moved = tensor.data.permute(last, *range(last)).contiguous()
    tensor.data = moved.permute(*range(1, last + 1), 0)


def _require_fitting_loss(model: Any) -> None:
    """Refuse our loss with the other kind of outputs: it would train, on a wrong loss."""
    loss, last = model.loss, model.layers[-1]
    if not isinstance(loss, BinaryCrossEntropy):
        return
    gives = {keras.layers.Activation: "probabilities", keras.layers.Dense: "logits"}.get(type(last))
    expects = "logits" if loss.from_logits else "probabilities"
    if gives is not None and gives != expects:
        raise UsageError(
            f"the model gives {gives}, and its loss takes {expects}:"
            f" BinaryCrossEntropy(from_logits={loss.from_logits}).",
            f"Take BinaryCrossEntropy(from_logits={not loss.from_logits}), or build the model with"
            f" output={expects!r}.",
        )
