"""Every private name of Keras and torch that this project uses, each in one place.

Private names may change in any release. `NAMES` lists them and why they are needed, and
tests/test_keras_private.py reports which of them the installed Keras and torch lack. No other file
may use one. Neither package is imported before a function here is called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Name -> why it is needed, and what is expected of it. The first word says of what: "model" is a
# compiled functional model, "optimizer" a built Adam(amsgrad=True), "variable" and "tensor" a
# variable and a symbolic tensor of the model, "node" a node of its graph, "array" a torch tensor.
NAMES = {
    "variable._value": "the torch parameter itself; `value` may return a copy cast by autocast",
    "model._nodes_by_depth": "depth -> nodes: the graph of a functional model, for reading it",
    "node.operation": "the layer or operation that a node calls",
    "node.arguments.args": "what an operation was called with",
    "node.input_tensors": "the symbolic tensors that a node reads",
    "node.outputs": "the symbolic tensors that a node makes",
    "node.is_input": "whether a node is an input of the model",
    "tensor._keras_history.operation": "the layer that made a symbolic tensor",
    "model._outputs_struct": "the structure in which the model returns its outputs",
    "model._dtype_policy": "what `dtype_policy` sets, unless the global policy is a map: that would"
    " be changed for everybody",
    "model._called": "set by Keras' own call; its export to ONNX asks for it",
    "model._compile_loss": "the loss of compile(); None for a model without one",
    "model._compile_loss._user_loss_weights": "the loss_weights of compile()",
    "model._compile_metrics": "the metrics of compile(); None for a model without any",
    "model._compute_loss": "the loss with everything that layers add to it",
    "model._loss_tracker.total": "the running sum behind the loss that fit() shows",
    "model._loss_tracker.count": "the number of samples in that sum",
    "optimizer._get_variable_index": "the position of a variable's slots",
    "optimizer._momentums": "the first moments, by that position",
    "optimizer._velocities": "the second moments",
    "optimizer._velocity_hats": "the largest second moments, with amsgrad",
    "optimizer._backend_update_step": "overridden: the update itself",
    "optimizer._apply_weight_decay": "overridden: weight decay also has two rates",
    "keras.src.ops.core.StopGradient": "the operation behind ops.stop_gradient",
    "keras.src.ops.numpy.GetItem": "the operation behind tensor[...]",
    "keras.src.ops.numpy.Pad": "the operation behind ops.pad, with `pad_width` and `mode`",
    "keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE": "turns float64 into float32; changed"
    " where float64 is wanted",
    "keras.src.backend.torch.core.get_device": "the device that Keras chose at import",
    "torch._higher_order_ops.scan": "a loop whose length an exported program leaves open",
    "torch._fused_adam_": "one kernel for the whole Adam step",
    "torch._dynamo.explain": "counts the graph breaks of torch.compile",
    "torch._dynamo.reset": "forgets compiled graphs, which hold memory",
    "torch._subclasses.fake_tensor.FakeTensorMode": "tensors without memory, to count with",
    "torch.utils._python_dispatch.TorchDispatchMode": "sees every operation that torch runs",
    "torch.cpu._is_avx512_bf16_supported": "whether the processor computes in bfloat16",
    "torch.cpu._is_amx_tile_supported": "the same, by matrix units",
    "array._version": "grows with every change in place",
    "array.untyped_storage._cdata": "the address of a storage: two views of it share the number",
}

# What torch's allocator says on the CPU, where running out of memory is a plain RuntimeError.
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# The module that defines the operations of a graph that are not layers.
OPERATIONS_MODULE = "keras.src"


def tensor_of(variable: Any) -> Any:
    """Return the backend's own array of a Keras variable: on torch, the parameter."""
    return variable._value


def nodes_by_depth(model: Any) -> dict[int, list[Any]] | None:
    """Return the nodes of a functional model, the deepest first computed; None for others."""
    return getattr(model, "_nodes_by_depth", None)


def maker_of(tensor: Any) -> Any:
    """Return the layer or operation that made a symbolic tensor."""
    return tensor._keras_history.operation


def operation_kind(operation: Any) -> str:
    """Return the class name of one of Keras' own operations; "" for others."""
    kind = type(operation)
    return kind.__name__ if kind.__module__.startswith(OPERATIONS_MODULE) else ""


def outputs_structure(model: Any) -> Any:
    """Return the structure (a tensor, list or dictionary) of a model's outputs."""
    return model._outputs_struct


def set_policy(layer: Any, name: str) -> None:
    """Give a layer or model a dtype policy of its own, by name."""
    import keras

    layer._dtype_policy = keras.dtype_policies.get(name)


def mark_as_called(model: Any) -> None:
    """Mark a model as called, as Keras' own call does."""
    model._called = True


def compiled_loss(model: Any) -> Any | None:
    """Return Keras' wrapper of the loss given to compile(); None without one.

    It is called with (labels, outputs, sample weights).
    """
    return model._compile_loss


def has_loss_weights(model: Any) -> bool:
    """Return whether compile() was given loss_weights."""
    loss = model._compile_loss
    return loss is not None and bool(loss._user_loss_weights)


def has_metrics(model: Any) -> bool:
    """Return whether compile() was given metrics."""
    return model._compile_metrics is not None


def whole_loss(model: Any, **settings: Any) -> Any:
    """Compute the loss as Keras' steps do, with regularisers and any compute_loss of the user."""
    return model._compute_loss(**settings)


def loss_sums(model: Any) -> tuple[Any, Any]:
    """Return the arrays behind the loss that fit() shows: its sum, and the number of samples."""
    tracker = model._loss_tracker
    return tensor_of(tracker.total), tensor_of(tracker.count)


def slot_place(optimizer: Any, variable: Any) -> int:
    """Return the position of a variable's slots in a built optimiser."""
    return optimizer._get_variable_index(variable)


def adam_slots(optimizer: Any, place: int) -> list[Any]:
    """Return the moments of one weight: first, second and, with amsgrad, the largest second."""
    slots = [optimizer._momentums[place], optimizer._velocities[place]]
    return [*slots, optimizer._velocity_hats[place]] if optimizer.amsgrad else slots


def keras_device() -> str:
    """Return the device that Keras runs on, on the torch backend: "cpu", "cuda" or "cuda:0"."""
    from keras.src.backend.torch.core import get_device

    return str(get_device())


@contextmanager
def keep_float64() -> Iterator[None]:
    """Let Keras compute in float64 where its rules would fall back to float32.

    On torch and jax its type promotion turns float64 into float32, so batch normalisation rounds
    whatever the layers' dtype. The table behind that rule is changed for the block.
    """
    from keras.src.backend.common.dtypes import BIT64_TO_BIT32_DTYPE as table

    before = table["float64"]
    table["float64"] = "float64"
    try:
        yield
    finally:
        table["float64"] = before


def fused_adam(*arrays: Any, **settings: Any) -> None:
    """Run torch's fused Adam kernel in place (`torch.optim.Adam(fused=True)`)."""
    import torch

    torch._fused_adam_(*arrays, **settings)


def scan(step: Any, start: "torch.Tensor", given: "torch.Tensor") -> "torch.Tensor":
    """Run step(state, now) -> (state, out) over the first axis, and return all that came out.

    torch.export keeps it as a loop, whatever the length.
    """
    from torch._higher_order_ops import scan as run

    return run(step, start, given, dim=0)[1]


def fake_tensor_mode() -> Any:
    """Return a mode in which torch's tensors know shape, device and order, and hold no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def version_of(tensor: "torch.Tensor") -> int:
    """Return a number that grows whenever a tensor is changed in place."""
    return tensor._version


def storage_number(storage: "torch.UntypedStorage") -> int:
    """Return the number of a storage; it may be reused once the storage is freed."""
    return storage._cdata


def dispatch_mode() -> Any:
    """Return the class whose subclasses see every operation that torch runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def num_graph_breaks(function: Callable[..., Any], *args: Any) -> int:
    """Count where `torch.compile` would have to cut a function in two."""
    import torch

    return torch._dynamo.explain(function)(*args).graph_break_count


def forget_compiled() -> None:
    """Make torch discard what it compiled."""
    import torch

    torch._dynamo.reset()


def has_bfloat16_cpu() -> bool:
    """Return whether the processor has instructions for bfloat16."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
