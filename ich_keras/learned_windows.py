"""Windows that a network has learned: where they are now, and how they moved in a training."""

from pathlib import Path
from typing import Any

import pandas as pd

from ich_keras.ct.window import Window
from ich_keras.errors import DataError, StaleError, UsageError
from ich_keras.models.windows import WINDOWS, in_hu
from ich_keras.run_checksums import require_unchanged
from ich_keras.run_folder import RunFolder

_COLUMNS = {"epoch": int, "window": int, "level": float, "width": float}


def get_windows(network: Any) -> tuple[Window, ...]:
    """Return the windows that a network has learned.

    Args:
        network: a run, finished or not (its best weights count), or a Keras model with learnable
            windows: one in training, or one that was saved and loaded.

    Returns:
        Level and width of each window, HU, in the order of the channels. For sigmoid windows the
        lower end (level - width / 2) is where the grey value is 1/255, and the upper end where it
        is 254/255.

    Raises:
        UsageError: the network has no learnable windows.
        DataError: the weights are damaged, or a window is unusable (it has no width above 0).
        StaleError: there is no run, or one of its files was changed.

    >>> import ich_keras
    >>> spec = ich_keras.ModelSpec((32, 32, 1), depth=10, width=4, windows="linear")
    >>> get_windows(ich_keras.classifier(spec))[1]
    Window(level=80.0, width=200.0)
    """
    if not isinstance(network, RunFolder | Path | str):
        from ich_keras.models.window_layers import levels_and_widths

        return tuple(Window(*found) for found in levels_and_widths(network))
    from ich_keras.models.weights_file import read_weights

    run = RunFolder.at(network).require_begun()
    learned = run.recipe().network.windows
    if learned is None:
        raise UsageError(
            f"{run} has no learnable windows.", "Train one with --windows linear or sigmoid."
        )
    file = read_weights(run.best_weights)
    if run.is_finished:
        require_unchanged(run, file.digest)
    if len(file.layers.get(WINDOWS, ())) != 2:
        raise DataError(f"{file.path} holds no windows.", "Copy the original run folder again.")
    kernel, bias = file.layers[WINDOWS]
    found = in_hu(kernel, bias, learned.zero_hu, learned.unit_hu)
    return tuple(Window(*one) for one in found)


def window_rows(model: Any, epoch: int) -> list[dict]:
    """Return the rows of windows.csv for the windows of a network as they are now.

    Args:
        model: with learnable windows or without; then there are no rows.
        epoch: that was finished last; 0 before the first.

    Raises:
        DataError: a window is unusable.
    """
    from ich_keras.models.window_layers import levels_and_widths, window_layer

    if window_layer(model) is None:
        return []
    return [
        {"epoch": epoch, "window": number, "level": level, "width": width}
        for number, (level, width) in enumerate(levels_and_widths(model), 1)
    ]


def read_windows(run: RunFolder) -> pd.DataFrame | None:
    """Read how the windows of a run moved.

    Returns:
        A row per epoch (0 before the first) and window (from 1), with level and width, HU. None
        where no windows are learned, or nothing is recorded.

    Raises:
        StaleError: windows.csv is damaged.
    """
    if not run.windows_file.is_file():
        return None
    try:
        table = pd.read_csv(run.windows_file)[list(_COLUMNS)].astype(_COLUMNS)
    except (KeyError, ValueError) as error:
        raise StaleError(
            f"{run.windows_file} is damaged ({error}).", "Copy the original run folder again."
        ) from error
    return table


def moved_windows(run: RunFolder) -> list[tuple[Window, Window]]:
    """Return each window before the training and after it (of the epoch that was kept).

    Raises:
        StaleError, DataError: as `read_windows` and `get_windows`.
    """
    table = read_windows(run)
    if table is None:
        return []
    first = table[table["epoch"] == table["epoch"].min()]
    before = [Window(row.level, row.width) for row in first.itertuples()]
    return list(zip(before, get_windows(run), strict=True))


def window_lines(run: RunFolder) -> list[str]:
    """Say where the windows of a run went; nothing where none are learned.

    Raises:
        StaleError, DataError: as `moved_windows`.
    """
    learned = run.recipe().network.windows
    moved = moved_windows(run) if learned is not None else []
    if learned is None or not moved:
        return []
    went = ", ".join(f"{_shown(before)} to {_shown(after)}" for before, after in moved)
    return [f"learned ({learned.kind}; level/width in HU): {went}"]


def _shown(window: Window) -> str:
    return f"{window.level:.1f}/{window.width:.1f}"
