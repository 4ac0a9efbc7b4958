"""What a training step keeps in memory, counted without computing anything."""

import torch

from ich_keras.keras_private import fake_tensor_mode, storage_number
from ich_keras.models.torch.function import FlatFunction


def activation_bytes(
    function: FlatFunction, input_shape: tuple[int, ...], batch_size: int = 1
) -> int:
    """Count what one training step keeps between its forward and its backward pass.

    Nothing is computed: the function runs on tensors without memory. Counted is every tensor that
    autograd saves, each storage once; neither parameters nor the input. With recomputation, what
    the largest part keeps while it is computed again comes on top. Exact in float32; in two-byte
    types 4 bytes per normalised channel are missing (torch's own account of its statistics).

    Args:
        function: in training.
        input_shape: (rows, columns, channels) or (slices, rows, columns, channels).
        batch_size: samples per step.
    """
    own = function.tensors()
    # Fake tensors know device and memory order, which decide what is copied, and hold no memory.
    with fake_tensor_mode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in own]
        return _kept_bytes(
            function, torch.empty((batch_size, *input_shape), device=own[0].device), tensors
        )


def _kept_bytes(function: FlatFunction, x: torch.Tensor, tensors: list[torch.Tensor]) -> int:
    values = function.begin(x)
    ignored = {_storage(tensor)[0] for tensor in (*tensors, x)}
    kept: dict[int, torch.UntypedStorage] = {}  # whole storages: a freed one's number may return
    most_again = 0
    for part in function.parts:
        saved: dict[int, torch.UntypedStorage] = {}

        def pack(
            tensor: torch.Tensor, saved: dict[int, torch.UntypedStorage] = saved
        ) -> torch.Tensor:
            number, storage = _storage(tensor)
            if number not in ignored:
                saved[number] = storage
            return tensor

        before = dict(_storage(values[n]) for n in part.read if values[n].requires_grad)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            part.run(values, tensors)
        if part.recomputed:
            kept |= before
            again = sum(s.nbytes() for n, s in saved.items() if n not in kept)
            most_again = max(most_again, again)
        else:
            kept |= saved
    return sum(storage.nbytes() for storage in kept.values()) + most_again


def _storage(tensor: torch.Tensor) -> tuple[int, torch.UntypedStorage]:
    storage = tensor.untyped_storage()
    return storage_number(storage), storage
