"""The training, test and prediction step of one model, by the flat function."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
from keras import tree
from keras.utils import unpack_x_y_sample_weight

from ich_keras.errors import UsageError
from ich_keras.keras_private import (
    CPU_OUT_OF_MEMORY,
    compiled_loss,
    has_loss_weights,
    has_metrics,
    loss_sums,
    outputs_structure,
    tensor_of,
    version_of,
    whole_loss,
)
from ich_keras.models.graph import UnknownStep, read_graph
from ich_keras.models.torch.cross_entropy import PlainLoss
from ich_keras.models.torch.distributed import GradientSum
from ich_keras.models.torch.function import FlatFunction
from ich_keras.models.torch.operations import Across

Flat = Callable[[torch.Tensor, list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class StepOptions:
    """How the fast steps run.

    Args:
        precision: "float32", "bfloat16" or "float16" for all but the head; None leaves each layer
            the type it was built with.
        recompute: "stage" or "block" trades time for memory in training; see `FlatFunction`.
        compiled: run the flat function of training through `torch.compile`; None does so on CUDA.
        across: the processes that train together; None for one alone. Set by `distribute`.
    """

    precision: str | None = None
    recompute: str | None = None
    compiled: bool | None = None
    across: Across | None = None


@dataclass(frozen=True)
class Functions:
    """What is made from a model's graph, and made again when its state has changed.

    Args:
        state: whether each layer is trained, and its policy.
        train: the function of training, compiled or not.
        tensors: what it takes.
        infer: the function of evaluation and prediction.
        folded: makes what `infer` takes.
        variables: the Keras variables that are trained.
        gradients: adds up those of all processes; None for one alone.
    """

    state: tuple[tuple[bool, str], ...]
    train: Flat
    tensors: list[torch.Tensor]
    infer: Flat
    folded: Callable[[], list[torch.Tensor]]
    variables: list[Any]
    gradients: GradientSum | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.tensors[0].device


@dataclass(frozen=True)
class Compilation:
    """What the user's `compile` asked for, as far as the fast steps depend on it.

    Args:
        has_only_its_loss: a loss, and no layer adds to it.
        is_weighted: the loss has weights of its own.
        has_only_its_metric: no metric but the running loss.
    """

    has_only_its_loss: bool = False
    is_weighted: bool = False
    has_only_its_metric: bool = False


class FastSteps:
    """The fast steps of one model.

    Args:
        model: functional.
        options: how they run.
    """

    def __init__(self, model: keras.Model, options: StepOptions) -> None:
        self.model = model
        self.options = options
        self.functions: Functions | None = None
        self.compilation = Compilation()
        self._folded: list[torch.Tensor] = []
        self._folded_for: tuple[Any, ...] | None = None
        # Samples that fit into memory at once; known only after too many were tried.
        self._most: int | None = None
        self._steps_taken = 0
        self._plain_loss = PlainLoss()

    def reason_for_stock(self, kind: str) -> str | None:
        """Say what keeps a fast step from being used; None when nothing does.

        Args:
            kind: "train", "test" or "predict".
        """
        model = self.model
        if model.run_eagerly:
            return "run_eagerly=True"
        own = {f"{kind}_step", "compute_loss", "compute_metrics", "call"} & set(vars(model))
        if own or not type(model).__module__.startswith("keras."):
            return f"{', '.join(sorted(own)) or type(model).__name__} is not Keras' own"
        if self._is_prepared():
            return None
        try:
            read_graph(model)
        except UnknownStep as reason:
            return str(reason)
        return None

    def prepare(self) -> None:
        """Make the functions, unless nothing has changed since, and read what `compile` set.

        Raises:
            UnknownStep: the model is not covered.
        """
        if not self._is_prepared():
            self.functions = self._make_functions()
            self._folded_for = None
        # Looking for regularisers and metrics walks over all layers: once a fit, not once a step.
        model = self.model
        has_loss = compiled_loss(model) is not None
        self.compilation = Compilation(
            has_only_its_loss=has_loss and not model.losses,
            is_weighted=has_loss_weights(model),
            has_only_its_metric=(
                model.compiled and not has_metrics(model) and len(model.metrics) == 1
            ),
        )

    def _state(self) -> tuple[tuple[bool, str], ...]:
        return tuple((layer.trainable, layer.dtype_policy.name) for layer in self.model.layers)

    def _is_prepared(self) -> bool:
        return self.functions is not None and self.functions.state == self._state()

    def _make_functions(self) -> Functions:
        options = self.options
        across = options.across
        train = FlatFunction(self.model, True, options.precision, options.recompute, across)
        infer = FlatFunction(self.model, False, options.precision)
        tensors = train.tensors()
        compiled = options.compiled
        if compiled is None:
            # Recomputation tells its second pass by state that a compiled graph would freeze;
            # synchronised normalisation talks to other processes in the middle of the graph.
            compiled = (
                tensors[0].device.type == "cuda"
                and options.recompute is None
                and not (across is not None and across.synchronised)
            )
        variables = self.model.trainable_variables
        if self.functions is not None and self.functions.gradients is not None:
            self.functions.gradients.detach()
        return Functions(
            state=self._state(),
            train=torch.compile(train, fullgraph=True) if compiled else train,
            tensors=tensors,
            infer=infer,
            folded=infer.tensors,
            variables=variables,
            gradients=None
            if across is None
            else GradientSum(across.group, [tensor_of(variable) for variable in variables]),
        )

    def _ready(self) -> Functions:
        if self.functions is None:
            self.functions = self._make_functions()
        return self.functions

    def train(self, data: Any) -> dict[str, Any]:
        """Take one training step, as Keras' `train_step` does."""
        if self.options.across is not None:
            return self._train_across(data, self.options.across)
        optimizer, variables = self.model.optimizer, self._ready().variables
        x, y, sample_weight = self._to_device(_batch(data))
        outputs = self._forward(x)
        for variable in variables:
            tensor_of(variable).grad = None
        loss = self._loss(x, y, outputs, sample_weight, training=True)
        self._track(loss, len(x))
        if not variables:
            warnings.warn("The model does not have any trainable weights.", stacklevel=3)
        else:
            optimizer.scale_loss(loss).backward()
            self._update(variables)
        self._steps_taken += 1
        return self._logs(x, y, outputs, sample_weight)

    def _update(self, variables: list[Any]) -> None:
        with torch.no_grad():
            gradients = [tensor_of(variable).grad for variable in variables]
            self.model.optimizer.apply(gradients, variables)
        for variable in variables:
            tensor_of(variable).grad = None

    def _train_across(self, data: Any, across: Across) -> dict[str, Any]:
        """Take this process's part in one training step of all."""
        functions = self._ready()
        assert functions.gradients is not None
        x, y, sample_weight = self._to_device(_batch(data))
        if sample_weight is not None:
            raise UsageError(
                "several processes take no sample weights and no class weights.",
                "Train in one process, or without them.",
            )
        share = across.group.take_share(len(x))
        for variable in functions.variables:
            tensor_of(variable).grad = None
        if share.own:
            loss = self._loss(x, y, self._forward(x), None, training=True)
        elif across.synchronised:
            # The others wait for this process at each normalisation, forth and back.
            loss = torch.stack([output.sum() for output in tree.flatten(self._forward(x))]).sum()
        else:
            loss = functions.gradients.no_loss()
        loss = functions.gradients.begin(loss)
        self.model.optimizer.scale_loss(loss).backward()
        functions.gradients.finish()
        self._track(across.group.add_up(loss.detach()), share.total)
        self._update(functions.variables)
        self._steps_taken += 1
        return self._logs(None, None, None, None)

    def test(self, data: Any) -> dict[str, Any]:
        """Take one evaluation step, as Keras' `test_step` does."""
        x, y, sample_weight = _batch(data)
        # Copies: tensors of inference mode must not get into anybody's metrics.
        outputs = tree.map_structure(torch.clone, self._predict(x))
        y, sample_weight = self._to_device((y, sample_weight))
        with torch.no_grad():
            loss = self._loss(x, y, outputs, sample_weight, training=False)
            self._track(loss, len(x))
            return self._logs(x, y, outputs, sample_weight)

    def predict(self, data: Any) -> Any:
        """Return the outputs of one batch."""
        x, _, _ = _batch(data)
        return self._predict(x)

    def _to_device(self, values: Any, dtype: torch.dtype | None = None) -> Any:
        """Move every array once, without waiting for those in pinned memory."""
        device = self._ready().device

        def move(value: Any) -> torch.Tensor:
            if not isinstance(value, torch.Tensor):
                value = np.asarray(value)
                value = torch.from_numpy(value if value.flags.writeable else value.copy())
            return value.to(device, non_blocking=True).to(dtype or value.dtype)

        return tree.map_structure(lambda v: v if v is None else move(v), values)

    def _takes(self, x: Any) -> bool:
        """Tell whether an input has the shape the model was built for."""
        expected, shape = self.model.inputs[0].shape, getattr(x, "shape", ())
        return len(shape) == len(expected) and all(
            want is None or want == have for want, have in zip(expected, shape, strict=True)
        )

    def _pack(self, outputs: list[torch.Tensor]) -> Any:
        return tree.pack_sequence_as(outputs_structure(self.model), outputs)

    def _forward(self, x: Any) -> Any:
        if not self._takes(x):
            # Keras adds an axis of one where that helps, or says what it expected.
            return self.model(x, training=True)
        functions = self._ready()
        return self._pack(functions.train(x.to(torch.float32), functions.tensors))

    def _predict(self, x: Any) -> Any:
        if not self._takes(x):
            with torch.no_grad():
                return self.model(x, training=False)
        infer, tensors = self._ready().infer, self._inference_tensors()
        parts: list[list[torch.Tensor]] = []
        start = 0
        while start < len(x) or not parts:
            part = x[start : start + (self._most or len(x))]
            try:
                with torch.inference_mode():
                    part = self._to_device(part, torch.float32)
                    parts.append(infer(part, tensors))
            except RuntimeError as error:
                self._most = _half_after(error, len(part))
                continue
            start += len(part)
        if len(parts) == 1:
            return self._pack(parts[0])
        return self._pack([torch.cat(outputs) for outputs in zip(*parts, strict=True)])

    def _inference_tensors(self) -> list[torch.Tensor]:
        """Fold batch normalisation into the convolutions, unless no weight changed since."""
        weights = [tensor_of(variable) for variable in self.model.variables]
        # batch_norm moves its statistics without a new version: hence the count of our steps.
        state = (self._steps_taken, *((w.data_ptr(), version_of(w)) for w in weights))
        if state != self._folded_for:
            self._folded = self._ready().folded()
            self._folded_for = state
        return self._folded

    def _loss(
        self, x: Any, y: Any, outputs: Any, sample_weight: Any, training: bool
    ) -> torch.Tensor:
        model, own = self.model, self.model.loss
        if not self.compilation.has_only_its_loss:
            return whole_loss(
                model, x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=training
            )
        is_alone = sample_weight is None and not self.compilation.is_weighted
        if is_alone and self._plain_loss.covers(own, y, outputs):
            return self._plain_loss(own, y, outputs)
        loss: Any = compiled_loss(model)
        return loss(y, outputs, sample_weight)

    def _track(self, loss: torch.Tensor, num_samples: int) -> None:
        """Update Keras' running mean of the loss, on the device."""
        total, count = loss_sums(self.model)
        with torch.no_grad():
            total.add_(loss.detach(), alpha=num_samples)
            count.add_(num_samples)

    def _logs(self, x: Any, y: Any, outputs: Any, sample_weight: Any) -> dict[str, Any]:
        if self.compilation.has_only_its_metric:
            total, count = loss_sums(self.model)
            with torch.no_grad():
                return {"loss": total / count}
        return self.model.compute_metrics(x, y, outputs, sample_weight=sample_weight)


def _batch(data: Any) -> tuple[Any, Any, Any]:
    x, y, sample_weight = unpack_x_y_sample_weight(data[0])
    leaves = tree.flatten(x)
    return (leaves[0] if len(leaves) == 1 else x), y, sample_weight


def _half_after(error: RuntimeError, num_samples: int) -> int:
    """Return half the number of samples after running out of memory; raise anything else."""
    is_memory = isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)
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
