"""The ways to run one network: ours, stock Keras, plain torch and MONAI."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import keras
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from benchmarks.cases import (
    COMPILED,
    MONAI,
    NOT_COMPILED,
    OURS,
    PLAIN,
    STOCK,
    TRAIN,
    UPDATE,
    Case,
    Setting,
)
from benchmarks.plain import channels_last, has_monai, monai_network, plain_network
from ich_keras.labels import NUM_LABELS
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.steps import choose_step

LEARNING_RATE = 3e-4


class KerasVariant:
    """A compiled Keras model under `fit` and `predict`."""

    def __init__(self, model: keras.Model, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.model, self.batch = model, batch

    def _loader(self, steps: int) -> DataLoader:
        return DataLoader([self.batch] * steps, batch_size=None)

    def train(self, steps: int) -> None:
        """Fit one epoch of `steps` batches."""
        self.model.fit(self._loader(steps), epochs=1, shuffle=False, verbose=0)

    def predict(self, steps: int) -> None:
        """Predict `steps` batches and copy the results to the host."""
        self.model.predict(self._loader(steps), verbose=0)

    @cached_property
    def _gradients(self) -> list[torch.Tensor]:
        return [torch.randn_like(variable.value) for variable in self.model.trainable_variables]

    def update(self, steps: int) -> None:
        """Apply existing gradients."""
        variables = self.model.trainable_variables  # Keras walks over all layers to list them
        with torch.no_grad():
            for _ in range(steps):
                self.model.optimizer.apply(self._gradients, variables)

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that are not activations."""
        return [*(variable.value for variable in self.model.variables), *self.batch]


class TorchVariant:
    """A module in a plain loop: autocast, fused Adam, gradients set to None."""

    def __init__(
        self,
        module: torch.nn.Module,
        batch: tuple[torch.Tensor, torch.Tensor],
        precision: str,
        layout: torch.memory_format,
        compiled: bool = False,
    ) -> None:
        images, truth = batch
        self.module = module.to(images.device, memory_format=layout)
        self.forward = torch.compile(self.module) if compiled else self.module
        self.batch = images.movedim(-1, 1).contiguous(memory_format=layout), truth
        self.optimizer = torch.optim.Adam(module.parameters(), LEARNING_RATE, fused=True)
        self._autocast = partial(
            torch.autocast, images.device.type, torch.bfloat16, enabled=precision == "bfloat16"
        )

    def train(self, steps: int) -> None:
        """Take training steps."""
        self.module.train()
        images, truth = self.batch
        for _ in range(steps):
            with self._autocast():
                logits = self.forward(images)
            loss = functional.binary_cross_entropy_with_logits(logits.float(), truth)
            loss.backward()
            self.optimizer.step()
            # At the end, as ours does; otherwise gradients count as memory in use before a step.
            self.optimizer.zero_grad(set_to_none=True)

    def predict(self, steps: int) -> None:
        """Predict `steps` batches and copy the results to the host."""
        self.module.eval()
        with torch.inference_mode(), self._autocast():
            torch.cat([self.forward(self.batch[0]) for _ in range(steps)]).float().cpu()

    def update(self, steps: int) -> None:
        """Apply existing gradients."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.randn_like(parameter)
        for _ in range(steps):
            self.optimizer.step()

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that are not activations."""
        return [*self.module.parameters(), *self.module.buffers(), *self.batch]


Variant = KerasVariant | TorchVariant


def random_batch(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images float32 (N, *shape, channels last) and labels float32 (N, 6) on the device."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand((case.batch, *case.shape), generator=draw)
    truth = (torch.rand((case.batch, NUM_LABELS), generator=draw) < 0.3).float()
    return images.to(device), truth.to(device)


def variants_of(case: Case, setting: Setting) -> dict[str, Callable[[], Variant]]:
    """Return the variants of a case in the order of their turns: name -> function to build it."""
    precision, is_cuda = case.precision or setting.precision, setting.device == "cuda"
    batch = random_batch(case, setting.device)
    layout = channels_last(case.spec.rank)
    if UPDATE in case.modes:
        # No convolution reads the weights, and on the CPU torch's fused Adam copies other layouts.
        layout = torch.contiguous_format

    def ours(**options: Any) -> KerasVariant:
        model = classifier(case.spec, output="logits", precision=precision)
        return KerasVariant(compile_classifier(model, LEARNING_RATE, **options), batch)

    def plain(network: Callable[..., torch.nn.Module], compiled: bool = False) -> TorchVariant:
        return TorchVariant(network(case.spec), batch, precision, layout, compiled)

    found: dict[str, Callable[[], Variant]] = {OURS: ours, PLAIN: partial(plain, plain_network)}
    if is_cuda and TRAIN in case.modes:
        found[NOT_COMPILED] = partial(ours, compiled=False)
        found[COMPILED] = partial(plain, plain_network, compiled=True)
    if setting.has_stock:
        found[STOCK] = lambda: KerasVariant(_stock(case, precision), batch)
    if has_monai(case.spec, case.shape[0]):
        found[MONAI] = partial(plain, monai_network)
    if case.recomputes:
        for part in ("stage", "block"):
            found[f"{OURS}, recompute {part}"] = partial(ours, recompute=part)
    return found


def _stock(case: Case, precision: str) -> keras.Model:
    """Build our network with Keras' own steps, optimiser and loss."""
    model = choose_step(classifier(case.spec, output="logits", precision=precision), "stock")
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    )
    return model
