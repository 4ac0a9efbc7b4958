"""A training's curves for TensorBoard, by torch's SummaryWriter: tensorflow is not needed."""

import importlib.util
from pathlib import Path
from typing import Any

from ich_keras.errors import EnvironmentProblem, UsageError
from ich_keras.own_callbacks import LOOKS_ON


def require_tensorboard(folder: Path | str) -> Path:
    """Return the folder if TensorBoard's files can be written there.

    Raises:
        UsageError: a file is in the way.
        EnvironmentProblem: the package is not installed.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--tensorboard {folder} is a file; expected a folder.")
    if importlib.util.find_spec("tensorboard") is None:
        raise EnvironmentProblem(
            "TensorBoard is not installed.", "pip install 'ich_keras[tensorboard]'"
        )
    return folder


def tensorboard_callback(folder: Path | str) -> Any:
    """Return a callback that writes each epoch's losses, AUROC and learning rate.

        ich_keras.train(CACHE, RUN, callbacks=ich_keras.tensorboard_callback("logs/run"))

    The AUROC is that of `any` (or the first label). The callback only looks on: a resumed training
    need not be given it again. Given the same folder, it goes on there, and epochs that are trained
    again replace those of before.

    Args:
        folder: of the event files; made with the first epoch.

    Raises:
        UsageError, EnvironmentProblem: as `require_tensorboard`.
    """
    import keras

    folder = require_tensorboard(folder)

    class TensorBoardLog(keras.callbacks.Callback):
        async_safe = True  # it reads no logs of batches

        def __init__(self) -> None:
            super().__init__()
            self.writer: Any = None

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder), purge_step=epoch + 1)

        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            rate = keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
            values = {_curve(name): value for name, value in (logs or {}).items()}
            for name, value in {**values, "learning rate": rate}.items():
                self.writer.add_scalar(name, float(value), epoch + 1)
            self.writer.flush()

        def on_train_end(self, logs: dict | None = None) -> None:
            if self.writer is not None:
                self.writer.close()
                self.writer = None

    callback = TensorBoardLog()
    setattr(callback, LOOKS_ON, True)
    return callback


# Of the logs -> in TensorBoard, where what stands before the slash is a group of curves.
_NAMES = {"loss": "loss/train", "val_loss": "loss/valid"}
_AUROC = "val_auroc_"


def _curve(name: str) -> str:
    if name.startswith(_AUROC):
        return f"AUROC {name.removeprefix(_AUROC)}/valid"
    return _NAMES.get(name, name)
