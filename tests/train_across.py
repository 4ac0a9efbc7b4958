"""`ich-train` with a narrow network called "tiny", for tests that start it in processes.

With TRAIN_IN_FLOAT64 naming a file, the network computes in float64, and the weights after the last
epoch go there, as an `.npz`; weights files, which hold float32, are not written. With FAIL=KIND,
process 1 dies ("kill") or raises ("raise") at the end of its second epoch.
"""

import os
import signal

import numpy as np

from ich_keras import fitting, training
from ich_keras.cli.train import train_main
from ich_keras.errors import EnvironmentProblem
from ich_keras.models.presets import PRESETS, Preset
from ich_keras.models.spec import ModelSpec

DUMP = "TRAIN_IN_FLOAT64"

TINY = Preset(ModelSpec((32, 32, 3), depth=10, width=8), "tiny")


def in_float64(path: str, patch=setattr) -> None:
    """Let the next training compute in float64 and dump its weights."""
    from ich_keras.models import classifier, options, resnet

    def dump(folder, model, epoch, state):
        np.savez(path, *[variable.numpy() for variable in model.weights])

    patch(classifier, "PRECISIONS", {**options.PRECISIONS, "float32": "float64"})
    patch(resnet, "DTYPE", "float64")
    patch(classifier, "DTYPE", "float64")
    patch(fitting, "_keep_best", lambda *_: None)
    patch(fitting, "save_state", dump)
    patch(training, "finish", lambda *_: None)


def failing(kind: str) -> None:
    """Let process 1 fail at the end of its second epoch; the first one has saved one by then."""
    come_together = fitting.come_together

    def fail(model, group, when):
        if group.rank.number == 1 and when == "after epoch 2":
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise EnvironmentProblem("the disk is on fire.", "Put it out.")
        come_together(model, group, when)

    fitting.come_together = fail


if __name__ in ("__main__", "__mp_main__"):
    PRESETS["tiny"] = TINY
    if os.environ.get(DUMP):
        in_float64(os.environ[DUMP])
    if os.environ.get("FAIL"):
        failing(os.environ["FAIL"])
if __name__ == "__main__":
    train_main()
