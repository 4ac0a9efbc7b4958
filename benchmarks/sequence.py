"""`python -m benchmarks sequence`: what a sequence head costs beside its slice network.

Prediction of whole series by the slice network alone and with a head; a step of training end to
end, beside a step of the slice network alone on the same slices, and beside the same with one chunk
of all slices, which keeps the activations of all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pandas as pd
import torch

from benchmarks import harness
from benchmarks.cases import PREDICT, TRAIN, SequenceCase, Setting
from benchmarks.records import Place, table, write_csv
from ich_keras.context import Context, answers, filled
from ich_keras.features import tapped_logits
from ich_keras.inference import probabilities
from ich_keras.keras_private import forget_compiled, tensor_of
from ich_keras.labels import SIX
from ich_keras.models.classifier import classifier, compile_classifier
from ich_keras.models.optimizer import Adam
from ich_keras.models.sequence import SequenceSpec, sequence_head, sequence_losses
from ich_keras.models.torch.chunked import ChunkedNetwork, chunked_gradients, padded
from ich_keras.progress import Tell

ALONE, WITH_HEAD = "slice network alone", "with the head"
CHUNKED, IN_ONE = "end to end, in chunks", "end to end, one chunk"
_SLICE_MM = 5.0


class Way(NamedTuple):
    """One way to predict, or to train on, a series.

    Args:
        run: does it once.
        tensors: that always exist: weights and the series; None for prediction.
    """

    run: Callable[[], Any]
    tensors: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """The time of one way to predict, or to train on, a series.

    Args:
        mode: "predict" or "train".
        way: what answers, or learns.
        head: its kind.
        preset: of the slice network.
        precision: of the slice network; heads compute in float32.
        slices: of a series.
        chunk: slices per pass of the slice network.
        ms_median, ms_q25, ms_q75: milliseconds per series.
        slices_per_s: by the median.
        time_ratio: against the slice network alone; above 1 takes longer.
        saved_bytes: activations kept at once for the backward pass; None for prediction.
    """

    mode: str
    way: str
    head: str
    preset: str
    precision: str
    slices: int
    chunk: int
    ms_median: float
    ms_q25: float
    ms_q75: float
    slices_per_s: float
    time_ratio: float
    saved_bytes: int | None = None


def measure(
    cases: list[SequenceCase], setting: Setting, repeats: int, path: Path, place: Place, tell: Tell
) -> list[Row]:
    """Measure cases one after the other; the file is complete after each.

    Args:
        cases: what to measure.
        setting: how the benchmark runs.
        repeats: timed runs of each way.
        path: of the CSV.
        place: machine and versions.
        tell: called with each case's table.
    """
    torch.set_num_threads(setting.threads)
    rows: list[Row] = []
    for case in cases:
        found = [
            *_rows(case, setting, PREDICT, _predictions(case, setting), repeats),
            *_rows(case, setting, TRAIN, _steps(case, setting), repeats),
        ]
        rows += found
        write_csv(path, rows, place)
        tell(_readable(found) + "\n")
        keras.backend.clear_session()
        forget_compiled()
    return rows


def _rows(
    case: SequenceCase,
    setting: Setting,
    mode: str,
    ways: dict[str, Way],
    repeats: int,
) -> list[Row]:
    stopwatch = harness.stopwatch_of(setting.device)
    timings = harness.alternate(
        {n: way.run for n, way in ways.items()}, repeats, stopwatch=stopwatch
    )
    alone = timings[ALONE].median
    return [
        Row(
            mode=mode,
            way=way,
            head=case.head,
            preset=case.preset,
            precision=setting.precision,
            slices=case.slices,
            chunk=case.chunk,
            ms_median=timings[way].median,
            ms_q25=timings[way].q25,
            ms_q75=timings[way].q75,
            slices_per_s=1e3 * case.slices / timings[way].median,
            time_ratio=timings[way].median / alone,
            saved_bytes=None if one.tensors is None else harness.most_saved_bytes(*one),
        )
        for way, one in ways.items()
    ]


def _series(case: SequenceCase) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.standard_normal((case.slices, *case.shape), np.float32)


def _head(case: SequenceCase) -> keras.Model:
    width = case.spec.num_features
    return sequence_head(SequenceSpec(case.head, width), SIX, "logits")


def _predictions(case: SequenceCase, setting: Setting) -> dict[str, Way]:
    """Return both ways to predict a series, which is in memory."""
    model = classifier(case.spec, precision=setting.precision)
    x = torch.from_numpy(_series(case)).to(setting.device)
    batches = list(x.split(case.chunk))
    places = pd.DataFrame(
        {"series_uid": "series", "position_mm": np.arange(case.slices) * _SLICE_MM}
    )
    context = Context(_head(case), SIX, np.full(len(SIX), 0.5, np.float32), "")
    return {
        ALONE: Way(lambda: probabilities(model, batches, case.slices)),
        WITH_HEAD: Way(lambda: answers(model, batches, places, context)),
    }


def _steps(case: SequenceCase, setting: Setting) -> dict[str, Way]:
    """Return the ways to train on a series: chunks are steps of their own without a head."""
    x = torch.from_numpy(_series(case)).to(setting.device)
    chunks = list(x.split(case.chunk))
    random = np.random.default_rng(1)
    truth = (random.random((case.slices, len(SIX))) < 0.1).astype(np.float32)
    parts = np.split(truth, range(case.chunk, case.slices, case.chunk))

    alone = compile_classifier(
        classifier(case.spec, output="logits", precision=setting.precision), compiled=False
    )

    def train_alone() -> None:
        for chunk, labels in zip(chunks, parts, strict=True):
            alone.train_on_batch(chunk, labels)

    step, weights = _joint_step(case, setting, truth)
    return {
        ALONE: Way(train_alone, [x, *map(tensor_of, alone.weights)]),
        CHUNKED: Way(lambda: step(chunks), [x, *weights]),
        IN_ONE: Way(lambda: step([x]), [x, *weights]),
    }


def _joint_step(
    case: SequenceCase, setting: Setting, truth: np.ndarray
) -> tuple[Callable[[list[torch.Tensor]], None], list[torch.Tensor]]:
    """Return a step of slice network and head together, and their weights."""
    model = classifier(case.spec, precision=setting.precision)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    network, head = ChunkedNetwork(tapped_logits(model)), _head(case)
    nothing = np.zeros((case.slices, 1), np.float32)
    inputs = filled([(nothing, nothing, np.arange(case.slices) * _SLICE_MM)])
    mask = inputs["mask"]
    places = {name: keras.ops.convert_to_tensor(inputs[name]) for name in ("places_mm", "mask")}
    slices = np.full((1, mask.shape[1], len(SIX)), np.nan, np.float32)
    slices[0, : case.slices] = truth
    known = {"slices": slices, "series": truth.max(axis=0, keepdims=True)}
    known = {name: keras.ops.convert_to_tensor(one) for name, one in known.items()}
    losses = sequence_losses(SIX)["loss"]
    variables = [*network.variables, *head.trainable_variables]
    optimizer = Adam(1e-5)
    optimizer.build(variables)

    def loss_of(logits: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        own = {"features": padded(features, mask), "logits": padded(logits, mask)}
        found = head(places | own, training=True)
        of_slices, of_series = (losses[name](known[name], found[name]) for name in known)
        return of_slices + of_series

    def step(chunks: list[torch.Tensor]) -> None:
        _, gradients = chunked_gradients(network, head.trainable_variables, lambda: chunks, loss_of)
        with torch.no_grad():
            optimizer.apply(gradients, variables)

    return step, [tensor_of(variable) for one in (model, head) for variable in one.weights]


def _readable(rows: list[Row]) -> str:
    names = ("mode", "way", "ms_median", "slices_per_s", "time_ratio", "kept_mib")
    cells = [
        (
            row.mode,
            row.way,
            f"{row.ms_median:.1f}",
            f"{row.slices_per_s:.0f}",
            f"{row.time_ratio:.2f}",
            "" if row.saved_bytes is None else f"{row.saved_bytes / 2**20:.1f}",
        )
        for row in rows
    ]
    first = rows[0]
    return f"{first.head} on {first.preset}, {first.slices} slices\n{table(names, cells)}"
