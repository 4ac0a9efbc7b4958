"""Keras' callbacks of the user, which a training calls beside its own."""

from collections.abc import Iterable
from typing import Any

from ich_keras.errors import UsageError
from ich_keras.ranks import Rank

# Set on a callback that only looks on: it is not recorded, and need not be given again.
LOOKS_ON = "ich_keras_looks_on"


def own_callbacks(given: Any) -> tuple[Any, ...]:
    """Return the callbacks that were given: one, several or None.

    Raises:
        UsageError: one is no `keras.callbacks.Callback`, or restores states of its own.
    """
    if given is None:
        return ()
    import keras

    is_one = isinstance(given, keras.callbacks.Callback) or not isinstance(given, Iterable)
    found = (given,) if is_one or isinstance(given, str) else tuple(given)
    for callback in found:
        if not isinstance(callback, keras.callbacks.Callback):
            is_class = isinstance(callback, type)
            call = " Call the class: it is not an instance yet." if is_class else ""
            raise UsageError(
                f"callbacks holds {callback!r}; expected instances of"
                f" keras.callbacks.Callback.{call}",
                "For instance callbacks=[keras.callbacks.CSVLogger('log.csv')].",
            )
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise UsageError(
                "callbacks holds a BackupAndRestore: a training keeps its own states.",
                "Leave it out; ich_keras.resume goes on after an interruption.",
            )
    return found


def callbacks_name(callbacks: Iterable[Any]) -> str | None:
    """Return the classes of the callbacks that may change a training; None without any."""
    names = [type(callback).__name__ for callback in callbacks if not hasattr(callback, LOOKS_ON)]
    return ", ".join(names) or None


def require_callbacks_alone(callbacks: Iterable[Any], rank: Rank) -> None:
    """Refuse callbacks that may change the training of one process but not that of the others.

    Raises:
        UsageError: there are several processes.
    """
    names = callbacks_name(callbacks)
    if names is not None and not rank.is_alone:
        raise UsageError(
            f"callbacks ({names}) with {rank.of} processes: only the first one validates, so the"
            " others would not be told the same.",
            "Train in one process, or leave the callbacks out.",
        )


def require_settable_rate(callbacks: Iterable[Any], schedule: str, warmup_steps: int) -> None:
    """Refuse Keras' callbacks that set the learning rate where a schedule already does.

    Raises:
        UsageError: the rate follows a cosine, or is warmed up.
    """
    if schedule == "constant" and not warmup_steps:
        return
    given = tuple(callbacks)
    if not given:
        return
    import keras

    setting = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)
    for callback in given:
        if isinstance(callback, setting):
            of = f"the schedule {schedule!r}"
            of += f" with {warmup_steps} warm-up steps" if warmup_steps else ""
            raise UsageError(
                f"callbacks holds a {type(callback).__name__}, which sets the learning rate, but"
                f" that follows {of}.",
                'Use schedule="constant" without warm-up steps, or leave the callback out.',
            )


def require_same_callbacks(wanted: str | None, callbacks: Iterable[Any]) -> None:
    """Refuse to resume a training with other callbacks than it began with.

    Raises:
        UsageError: the classes differ.
    """
    given = callbacks_name(callbacks)
    if given != wanted:
        raise UsageError(
            f"the callbacks differ: the training began with {wanted or 'none'}; now"
            f" {given or 'none'} {'are' if given else 'is'} given.",
            "Resume it from Python: ich_keras.resume(RUN, CACHE, callbacks=[...])."
            if wanted
            else "Resume it without callbacks.",
        )
