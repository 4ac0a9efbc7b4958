"""Which steps `fit`, `evaluate` and `predict` of a model take: ours, fast, or Keras' own."""

import functools
import types
from collections.abc import Callable
from typing import Any

import keras

from ich_keras.errors import UsageError
from ich_keras.keras_settings import require_floatx
from ich_keras.models.options import PRECISIONS, require_choice

# Methods in which Keras computes in its global floatx -> whether they train.
_IN_FLOATX = {
    "compile": True,
    "fit": True,
    "train_on_batch": True,
    "evaluate": False,
    "predict": False,
}


def built_precision(model: keras.Model) -> str:
    """Return the precision a model of ours was built in: that of its backbone.

    Head and learnable windows are float32 in any case.
    """
    policies = (layer.dtype_policy.name for layer in model.layers if layer.weights)
    policy = next((name for name in policies if name != "float32"), "float32")
    return next((name for name, known in PRECISIONS.items() if known == policy), policy)


def choose_step(
    model: keras.Model,
    step: str = "fast",
    precision: str | None = None,
    recompute: str | None = None,
    compiled: bool | None = None,
) -> keras.Model:
    """Choose the steps that a functional model takes; may be called at any time.

    On the torch backend "fast" runs the model as one flat function over its own parameters
    (`ich_keras.models.torch.step`); everything a Keras user sees stays. On jax and tensorflow both
    are Keras' own steps, which are compiled there.

    Args:
        model: of ours, or any functional model of one input made of the same layers: Conv2D
            (with groups, too), Conv3D, MaxPooling and AveragePooling without padding or activation
            of their own (ZeroPadding before them), BatchNormalization and GroupNormalization with
            scale and centre, plain ReLU, Add, Multiply, Concatenate of channels,
            GlobalAveragePooling, Dropout, Dense, Activation("sigmoid"); and what learnable windows
            are made of: ReLU with an upper limit, Rescaling by one number, Normalization by given
            numbers. Others keep Keras' steps, with a warning that says which layer it was.
        step: "fast" or "stock" (Keras' own).
        precision: "float32", "bfloat16" or "float16" for all but the head, whatever the model was
            built in; None leaves it. Only the fast steps can change it.
        recompute: "stage" or "block" keeps fewer activations in training and computes them again
            in the backward pass; fast steps only.
        compiled: run the training function through `torch.compile`; None does so on CUDA, unless
            `recompute` is given.

    Returns:
        The same model.

    Raises:
        UsageError: an unknown name, what Keras' own steps cannot do, or a `keras.distribution` in
            force on torch, whose backend does not carry it out. Later `compile`, `fit`, `evaluate`
            and `predict` of the model raise it where Keras' global floatx would round.

    >>> from ich_keras.models.resnet import resnet
    >>> from ich_keras.models.spec import ModelSpec
    >>> model = resnet(ModelSpec((32, 32, 1), depth=10, width=4))
    >>> choose_step(model, "stock") is model
    True
    """
    if not isinstance(model, keras.Model):
        raise UsageError(f"choose_step takes a Keras model; received {type(model).__name__}.")
    require_choice("step", step)
    if precision is not None:
        require_choice("precision", precision)
    if recompute is not None:
        require_choice("recompute", recompute)
    if recompute is not None and compiled:
        raise UsageError("recompute and compiled exclude each other.", "Leave one of them out.")
    _refuse_rounding(model)
    backend = keras.backend.backend()
    if step == "fast" and backend == "torch":
        from ich_keras.models.torch.fast import StepOptions
        from ich_keras.models.torch.step import accelerate

        if accelerate(model, StepOptions(precision, recompute, compiled)):
            return model
        where = "this model"
    else:
        where = f"backend {backend}, step {step}"
    if precision not in (None, built_precision(model)):
        raise UsageError(
            f"precision {precision}: the model was built in {built_precision(model)}, which only"
            f" the fast steps of the torch backend can change ({where}).",
            f"Build it with precision={precision!r}.",
        )
    if recompute is not None:
        raise UsageError(f"recompute needs the fast steps of the torch backend ({where}).")
    if backend == "torch":
        from ich_keras.models.torch.step import stock

        stock(model)
    return model


def _refuse_rounding(model: keras.Model) -> None:
    """Let a model refuse a floatx in which Keras would round, whenever it is set."""
    for name, is_training in _IN_FLOATX.items():
        if name not in vars(model):
            setattr(model, name, types.MethodType(_in_full(name, is_training, type(model)), model))


def _in_full(name: str, is_training: bool, kind: type) -> Callable[..., Any]:
    """Return a method that looks at floatx first; `kind` is the class whose method it calls."""

    @functools.wraps(getattr(kind, name))
    def method(model: Any, *args: Any, **settings: Any) -> Any:
        require_floatx(name, is_training)
        return getattr(kind, name)(model, *args, **settings)

    return method
