"""What the logits of a network depend on: gradients by features, or by its input.

The network runs as the flat function of `function`, in float32 whatever it was built or trained
in, with batch normalisation as in prediction.
"""

from collections.abc import Sequence

import keras
import numpy as np
import torch

from ich_keras.keras_private import tensor_of
from ich_keras.models.graph import read_graph
from ich_keras.models.receptive import CellAxis, cell_axes
from ich_keras.models.torch.function import FlatFunction
from ich_keras.models.torch.layout import channels_last


class LogitGradients:
    """A network cut in two: up to some features, and from there to its logits.

    It keeps the weights as they are when it is made.

    Args:
        model: from `ich_keras.models.cut.cut_model`: gives [features, logits].

    Raises:
        UnknownStep: the model is not covered by `ich_keras.models.graph`.
    """

    def __init__(self, model: keras.Model):
        graph = read_graph(model)
        self._rank = len(model.inputs[0].shape) - 2
        self.axes: tuple[CellAxis, ...] = cell_axes(graph, graph.outputs[0], self._rank)
        self._function = FlatFunction(model, training=False, precision="float32")
        self._tensors = self._function.tensors()
        self._device = tensor_of(model.weights[0]).device

    def __call__(
        self, inputs: np.ndarray, labels: Sequence[int]
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Compute the features of a batch, and the gradients of some logits by them.

        Args:
            inputs: float32 (n, [slices,] rows, columns, channels).
            labels: numbers of logits.

        Returns:
            (features, float32 (n, [slices,] cells, cells, channels); for each label the gradient,
            of the same shape; all logits, float32 (n, labels)).
        """
        x = torch.from_numpy(np.ascontiguousarray(inputs, np.float32)).to(self._device)
        leaf, (logits,) = self._function.from_first_output(x, self._tensors)
        gradients = []
        for number, label in enumerate(labels):
            (gradient,) = torch.autograd.grad(
                logits[:, label].sum(), leaf, retain_graph=number + 1 < len(labels)
            )
            gradients.append(self._as_array(gradient))
        return self._as_array(leaf), gradients, logits.detach().cpu().numpy()

    def _as_array(self, value: torch.Tensor) -> np.ndarray:
        return channels_last(value.detach(), self._rank).cpu().numpy()
