"""Keras' global settings: what they are, and what they may not be while a network is trained.

They come from keras.json (in $KERAS_HOME, else ~/.keras), from environment variables, or from
code, and hold for every project of a user. Layers, loss and optimiser of this library name their
data format, types and epsilon themselves, so that a network is the same whatever the settings say.
What Keras itself reads from them while it trains is refused by name.
"""

import json
import os
from pathlib import Path
from typing import Any

from ich_keras.errors import UsageError

FLOATX = "float32"
_ROUNDING = ("float16", "bfloat16")
_PLACE = "keras.json (in $KERAS_HOME, else ~/.keras)"
# What Keras takes from the file; it fails to import with anything else.
_IN_FILE = {
    "floatx": ("float16", "float32", "float64"),
    "image_data_format": ("channels_last", "channels_first"),
}


def keras_settings() -> dict[str, Any]:
    """Return Keras' global settings by name, ready for JSON; imports Keras.

    >>> keras_settings()["image_data_format"]
    'channels_last'
    """
    import keras

    return {
        "image_data_format": keras.config.image_data_format(),
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "dtype_policy": keras.config.dtype_policy().name,
    }


def settings_file() -> Path:
    """Return the keras.json that Keras reads when it is imported; it need not exist."""
    home = Path.home()
    usual = (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"
    return Path(os.environ.get("KERAS_HOME", usual)).expanduser() / "keras.json"


def require_settings_file() -> None:
    """Refuse a keras.json with which Keras cannot be imported; a damaged one it passes over.

    Raises:
        UsageError: naming the file, the entry, its value and what was expected.
    """
    path = settings_file()
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} holds no settings of Keras.", "Remove it: Keras writes a new one."
        )
    for name in ("floatx", "epsilon", "image_data_format"):
        if name not in content:
            continue
        value, known = content[name], _IN_FILE.get(name)
        if known is None:
            fits, expected = isinstance(value, float), "a number with a decimal point"
        else:
            fits = isinstance(value, str) and value in known
            expected = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
        if not fits:
            raise UsageError(
                f"{path}: {name} is {value!r}; Keras expects {expected}.",
                "Correct the file, or remove it: Keras writes a new one.",
            )


def require_floatx(work: str, is_training: bool = True) -> None:
    """Refuse a floatx in which Keras would round numbers of ours.

    Keras keeps learning rates, running losses and the arrays given to `fit`, `evaluate` and
    `predict` in it, whatever the types of the layers.

    Args:
        work: what would be done, for the message.
        is_training: False allows float64, which changes no prediction.

    Raises:
        UsageError: naming the setting, its value and how to set it back.
    """
    import keras

    floatx = keras.config.floatx()
    if floatx == FLOATX or (not is_training and floatx not in _ROUNDING):
        return
    raise UsageError(
        f"Keras' global floatx is {floatx!r}, in which {work} would compute; expected {FLOATX!r}.",
        f"Call keras.config.set_floatx({FLOATX!r}), or set it in {_PLACE}.",
    )


def require_trainable_settings() -> None:
    """Refuse the settings under which a training would silently become another one.

    Raises:
        UsageError: floatx is not float32, or Keras would end the training early.
    """
    import keras

    require_floatx("training")
    for name, most in (
        ("max_epochs", keras.config.max_epochs()),
        ("max_steps_per_epoch", keras.config.max_steps_per_epoch()),
    ):
        if most is not None:
            raise UsageError(
                f"Keras' global {name} is {most}: Keras would end the training early; expected"
                " none.",
                f"Unset KERAS_{name.upper()}, or call keras.config.set_{name}(None).",
            )
