"""`fit`, `evaluate` and `predict` of a Keras model on torch, by the flat function.

The Keras model stays what it is: its graph, its variables, its files, its optimiser, its loops.
`accelerate` only puts other steps under Keras' loops; `model.compile` by anyone keeps them. What
these steps cannot honour runs on Keras' own steps, with one warning that says why.

This room is the only one of the networks that imports torch.
"""

import types
import warnings
from dataclasses import dataclass

import keras
import numpy as np
import torch
import torch.nn.functional as F
from keras import tree
from keras.utils import unpack_x_y_sample_weight

from ich_keras.errors import UsageError
from ich_keras.models.graph import CONVOLUTIONS, UnknownStep
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.torch.function import FlatFunction

ATTRIBUTE = "_ich_torch_step"
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True)
class StepOptions:
    """How the fast steps run.

    Args:
        precision: "float32", "bfloat16" or "float16" for all but the head; None leaves each layer
            the type it was built with.
        recompute: "stage" or "block" trades time for memory in training; see `FlatFunction`.
        compiled: run the flat function of training through `torch.compile`; None does so on CUDA.
    """

    precision: str | None = None
    recompute: str | None = None
    compiled: bool | None = None


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
    """
    steps = _Steps(model, options or StepOptions())
    try:
        steps.prepare()
    except UnknownStep as reason:
        _warn(str(reason))
        return False
    for layer in model.layers:
        if isinstance(layer, CONVOLUTIONS):
            _lay_out(layer.kernel)
    setattr(model, ATTRIBUTE, steps)
    for kind in ("train", "test", "predict"):
        name = f"make_{kind}_function"
        setattr(model, name, types.MethodType(_maker(kind), model))
        setattr(model, f"{kind}_function", None)
    return True


def stock(model: keras.Model) -> None:
    """Give a model Keras' own steps back; weights and optimiser stay as they are."""
    if accelerated(model) is None:
        return
    for layer in model.layers:
        if isinstance(layer, CONVOLUTIONS):
            kernel = layer.kernel._value
            kernel.data = kernel.data.contiguous()
    delattr(model, ATTRIBUTE)
    for kind in ("train", "test", "predict"):
        delattr(model, f"make_{kind}_function")
        setattr(model, f"{kind}_function", None)


def accelerated(model: keras.Model) -> StepOptions | None:
    """Return the options of a model's fast steps; None on Keras' own."""
    steps = getattr(model, ATTRIBUTE, None)
    return None if steps is None else steps.options


def _warn(reason: str) -> None:
    message = f"{reason}: Keras' own steps are used, which give the same numbers more slowly."
    warnings.warn(message, StockStep, stacklevel=4)


def _lay_out(kernel) -> None:
    """Move a kernel's output channels first in memory, behind the shape that Keras sees.

    The permuted view that torch's convolution takes is then channels_last, as it wants it.
    """
    tensor = kernel._value
    last = tensor.dim() - 1
    moved = tensor.data.permute(last, *range(last)).contiguous()
    tensor.data = moved.permute(*range(1, last + 1), 0)


def _maker(kind: str):
    """Return a `make_<kind>_function` that chooses between the fast step and Keras'."""

    def make(model, force: bool = False):
        steps = getattr(model, ATTRIBUTE)
        if getattr(model, "steps_per_execution", 1) != 1:
            getattr(type(model), f"make_{kind}_function")(model, True)  # Keras refuses it on torch
        reason = steps.reason_for_stock(kind)
        if reason is None:
            if kind != "predict":
                _require_fitting_loss(model)
            model._called = True  # as Keras' own call does: exporting to ONNX asks for it
            setattr(model, f"{kind}_function", getattr(steps, kind))
            return
        current = getattr(model, f"{kind}_function")
        if current is None or getattr(current, "__self__", None) is steps:
            _warn(reason)
            force = True
        getattr(type(model), f"make_{kind}_function")(model, force)

    make.__name__ = f"make_{kind}_function"
    return make


def _require_fitting_loss(model) -> None:
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


class _Steps:
    """The fast steps of one model, made again when what they were made from has changed."""

    def __init__(self, model: keras.Model, options: StepOptions):
        self.model = model
        self.options = options
        self._made_for = None
        self._folded = None
        self._folded_for = None
        self._most = None  # samples that fit into memory at once, once too many were tried
        self._steps_taken = 0
        self._shares = None  # (loss, its shares on the device)

    def prepare(self) -> None:
        """Read the graph, unless nothing has changed since.

        Raises:
            UnknownStep: the model is not covered.
        """
        layers = self.model.layers
        state = tuple((layer.trainable, layer.dtype_policy.name) for layer in layers)
        if state == self._made_for:
            return
        options = self.options
        train = FlatFunction(self.model, True, options.precision, options.recompute)
        self._infer = FlatFunction(self.model, False, options.precision)
        self._tensors = train.tensors()
        self.device = self._tensors[0].device
        compiled = options.compiled
        if compiled is None:
            # Recomputation tells its second pass by state that a compiled graph would freeze.
            compiled = self.device.type == "cuda" and options.recompute is None
        self._train = torch.compile(train, fullgraph=True) if compiled else train
        self._variables = self.model.trainable_variables
        self._folded_for = None
        self._made_for = state

    def reason_for_stock(self, kind: str) -> str | None:
        """Say what keeps the fast step from being used; None when nothing does."""
        model = self.model
        if model.run_eagerly:
            return "run_eagerly=True"
        own = {f"{kind}_step", "compute_loss", "compute_metrics", "call"} & set(vars(model))
        if own or not type(model).__module__.startswith("keras."):
            return f"{', '.join(sorted(own)) or type(model).__name__} is not Keras' own"
        try:
            self.prepare()
        except UnknownStep as reason:
            return str(reason)
        # Looking for regularisers and metrics walks over all layers: once a fit, not once a step.
        self._has_only_its_loss = model._compile_loss is not None and not model.losses
        self._is_weighted = model._compile_loss is not None and bool(
            model._compile_loss._user_loss_weights
        )
        self._has_only_its_metric = (
            model.compiled and model._compile_metrics is None and len(model.metrics) == 1
        )
        return None

    def train(self, data) -> dict:
        """Take one training step, as Keras' `train_step` does."""
        optimizer, variables = self.model.optimizer, self._variables
        x, y, sample_weight = self._to_device(self._batch(data))
        outputs = self._forward(x)
        for variable in variables:
            variable._value.grad = None
        loss = self._loss(x, y, outputs, sample_weight, training=True)
        self._track(loss, len(x))
        if not variables:
            warnings.warn("The model does not have any trainable weights.", stacklevel=3)
        else:
            optimizer.scale_loss(loss).backward()
            with torch.no_grad():
                optimizer.apply([variable._value.grad for variable in variables], variables)
            for variable in variables:
                variable._value.grad = None
        self._steps_taken += 1
        return self._logs(x, y, outputs, sample_weight)

    def test(self, data) -> dict:
        """Take one evaluation step, as Keras' `test_step` does."""
        x, y, sample_weight = self._batch(data)
        # Copies: tensors of inference mode must not get into anybody's metrics.
        outputs = tree.map_structure(torch.clone, self._predict(x))
        y, sample_weight = self._to_device((y, sample_weight))
        with torch.no_grad():
            loss = self._loss(x, y, outputs, sample_weight, training=False)
            self._track(loss, len(x))
            return self._logs(x, y, outputs, sample_weight)

    def predict(self, data):
        """Return the outputs of one batch."""
        x, _, _ = self._batch(data)
        return self._predict(x)

    def _batch(self, data) -> tuple:
        x, y, sample_weight = unpack_x_y_sample_weight(data[0])
        leaves = tree.flatten(x)
        return (leaves[0] if len(leaves) == 1 else x), y, sample_weight

    def _to_device(self, values, dtype: torch.dtype | None = None):
        """Move every array once, without waiting for those in pinned memory."""

        def move(value):
            if not isinstance(value, torch.Tensor):
                value = np.asarray(value)
                value = torch.from_numpy(value if value.flags.writeable else value.copy())
            return value.to(self.device, non_blocking=True).to(dtype or value.dtype)

        return tree.map_structure(lambda v: v if v is None else move(v), values)

    def _takes(self, x) -> bool:
        """Tell whether an input has the shape the model was built for."""
        expected, shape = self.model.inputs[0].shape, getattr(x, "shape", ())
        return len(shape) == len(expected) and all(
            want is None or want == have for want, have in zip(expected, shape, strict=True)
        )

    def _pack(self, outputs: list[torch.Tensor]):
        return tree.pack_sequence_as(self.model._outputs_struct, outputs)

    def _forward(self, x):
        if not self._takes(x):
            # Keras adds an axis of one where that helps, or says what it expected.
            return self.model(x, training=True)
        return self._pack(self._train(x.to(torch.float32), self._tensors))

    def _predict(self, x):
        if not self._takes(x):
            with torch.no_grad():
                return self.model(x, training=False)
        tensors, parts, start = self._inference_tensors(), [], 0
        while start < len(x) or not parts:
            part = x[start : start + (self._most or len(x))]
            try:
                with torch.inference_mode():
                    part = self._to_device(part, torch.float32)
                    parts.append(self._infer(part, tensors))
            except RuntimeError as error:
                self._most = _half_after(error, len(part))
                continue
            start += len(part)
        if len(parts) == 1:
            return self._pack(parts[0])
        return self._pack([torch.cat(outputs) for outputs in zip(*parts, strict=True)])

    def _inference_tensors(self) -> list[torch.Tensor]:
        """Fold batch normalisation into the convolutions, unless no weight changed since."""
        weights = [variable._value for variable in self.model.variables]
        # batch_norm moves its statistics without a new version: hence the count of our steps.
        state = (self._steps_taken, *((w.data_ptr(), w._version) for w in weights))
        if state != self._folded_for:
            self._folded = self._infer.tensors()
            self._folded_for = state
        return self._folded

    def _loss(self, x, y, outputs, sample_weight, training: bool) -> torch.Tensor:
        model, own = self.model, self.model.loss
        if self._has_only_its_loss:
            if not self._is_weighted and _is_plain(own, y, outputs, sample_weight):
                return self._binary_cross_entropy(own, y, outputs)
            return model._compile_loss(y, outputs, sample_weight)
        return model._compute_loss(
            x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=training
        )

    def _binary_cross_entropy(self, loss: BinaryCrossEntropy, y, outputs) -> torch.Tensor:
        """What `loss` gives, in one operation instead of fifteen."""
        y = y.to(outputs.dtype)
        loss.require_outputs(outputs.shape[-1])
        if loss.shares is None:
            return F.binary_cross_entropy_with_logits(outputs, y)
        if self._shares is None or self._shares[0] is not loss:
            shares = torch.tensor(loss.shares, dtype=outputs.dtype, device=outputs.device)
            self._shares = loss, shares
        each = F.binary_cross_entropy_with_logits(outputs, y, reduction="none")
        return (each @ self._shares[1]).mean()

    def _track(self, loss: torch.Tensor, num_samples: int) -> None:
        """Update Keras' running mean of the loss, on the device."""
        tracker = self.model._loss_tracker
        with torch.no_grad():
            tracker.total._value.add_(loss.detach(), alpha=num_samples)
            tracker.count._value.add_(num_samples)

    def _logs(self, x, y, outputs, sample_weight) -> dict:
        model = self.model
        if self._has_only_its_metric:
            tracker = model._loss_tracker
            with torch.no_grad():
                return {"loss": tracker.total._value / tracker.count._value}
        return model.compute_metrics(x, y, outputs, sample_weight=sample_weight)


def _is_plain(loss, y, outputs, sample_weight) -> bool:
    return (
        isinstance(loss, BinaryCrossEntropy)
        and sample_weight is None
        and loss.from_logits
        and loss.reduction == "sum_over_batch_size"
        and isinstance(y, torch.Tensor)
        and isinstance(outputs, torch.Tensor)
        and y.shape == outputs.shape
    )


def _half_after(error: RuntimeError, num_samples: int) -> int:
    """Return half the number of samples after running out of memory; raise anything else."""
    is_memory = isinstance(error, torch.OutOfMemoryError) or _CPU_OUT_OF_MEMORY in str(error)
    if not is_memory or num_samples == 1:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = num_samples // 2
    warnings.warn(
        f"{num_samples} samples do not fit into memory at once; predicting {half} at a time.",
        stacklevel=2,
    )
    return half
