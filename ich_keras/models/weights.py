"""Where weights come from: files of ours, checked before and after they are loaded."""

import warnings
from pathlib import Path

import h5py
import numpy as np

from ich_keras.errors import DataError, UsageError

SUFFIX = ".weights.h5"


def load_weights(model, path: str | Path) -> None:
    """Load a `.weights.h5` file into a model of the same network.

    Args:
        model: a `keras.Model`.
        path: the file, as written by a run (`best.weights.h5`) or by `model.save_weights`.

    Raises:
        UsageError: no such file, or not a file name of that kind.
        DataError: the file is damaged, of another network, or holds values that are not finite.
    """
    path = require_weights_file(path)
    if not h5py.is_hdf5(path):
        raise DataError(f"{path} is not an HDF5 file.", "It is damaged or was named wrongly.")
    try:
        with warnings.catch_warnings():
            # "Skipping nested container": Keras would leave those layers at random and go on.
            warnings.simplefilter("error", UserWarning)
            model.load_weights(path)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, UserWarning) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path} is damaged or does not fit the network {model.name}: {reason}",
            "Weights and preset must belong together.",
        ) from error
    require_finite(model, str(path))


def require_weights_file(path: str | Path) -> Path:
    """Return the path when it can be a weights file, before anything long begins.

    Raises:
        UsageError: no such file, or not a file name of that kind.
    """
    path = Path(path)
    if not str(path).endswith(SUFFIX):
        raise UsageError(
            f"weights {str(path)!r}; expected a file ending in {SUFFIX}.",
            "Give the best.weights.h5 of a run.",
        )
    if not path.is_file():
        raise UsageError(f"the weights file {path} does not exist.")
    return path


def require_finite(model, source: str) -> None:
    """Refuse weights that are not finite; Keras loads and saves them without a word.

    Raises:
        DataError: naming the first variable at fault.
    """
    import keras

    for variable in model.weights:
        if not np.isfinite(keras.ops.convert_to_numpy(variable)).all():
            raise DataError(f"{source}: {variable.path} holds values that are not finite.")
