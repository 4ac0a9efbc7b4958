"""Networks of few channels train rightly on processors with AVX2 alone."""

import os
import subprocess
import sys

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the fast steps are the torch backend's"
)

SCRIPT = """
import sys
import keras
import numpy as np
import torch
from ich_keras.models.loss import BinaryCrossEntropy
from ich_keras.models.backbone import backbone
from ich_keras.models.spec import ModelSpec
from ich_keras.models.steps import choose_step

torch.set_num_threads(int(sys.argv[1]))
rng = np.random.default_rng(0)
images = rng.normal(size=(8, 32, 32, 3))
truth = (rng.random((8, 6)) < 0.3).astype(np.float32)

def built(dtype):
    keras.config.set_floatx(dtype)
    spec = ModelSpec((32, 32, 3), int(sys.argv[3]), width=4, architecture=sys.argv[2])
    body = backbone(spec, dtype=dtype)
    outputs = keras.layers.Dense(6, dtype=dtype, name="fc")(body.output)
    return keras.Model(body.input, outputs)

def changes(model, weights, dtype):
    keras.config.set_floatx("float32")
    model.set_weights(weights)
    model.compile(keras.optimizers.SGD(1.0), BinaryCrossEntropy(dtype=dtype))
    if dtype == "float32":
        choose_step(model)
    model.train_on_batch(images.astype(dtype), truth)
    pairs = zip(model.get_weights(), weights, strict=True)
    return {v.path: a - b for v, (a, b) in zip(model.weights, pairs, strict=True)}

fast, exact = built("float32"), built("float64")
weights = [w * 0.5 if w.ndim > 1 else w for w in fast.get_weights()]
# A crash may need a few steps.
for _ in range(5):
    found = changes(fast, weights, "float32")
    for (name, one), other in zip(found.items(), changes(exact, weights, "float64").values()):
        if "downsample_0" in name or "conv2" in name:
            error = np.abs(one - other).max() / np.abs(other).max()
            assert error < 0.05, (name, error)
            print(name, error)
"""


@pytest.mark.parametrize(
    ("threads", "architecture", "depth", "shortcuts"),
    [(1, "resnet", 10, 3), (2, "resnet", 10, 3), (1, "seresnext", 14, 4)],
)
def test_strided_points_on_few_channels_have_right_gradients(
    threads, architecture, depth, shortcuts
):
    """oneDNN's gradient corrupts memory there: github.com/uxlfoundation/oneDNN/issues/6035."""
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": str(threads),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(threads), architecture, str(depth)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("downsample_0") == 5 * shortcuts
    assert done.stdout.count("conv2") == 5 * 4
