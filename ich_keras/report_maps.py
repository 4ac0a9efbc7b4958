"""Heat maps for the pages of a prediction: of one series at a time, a few labels at a time."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ich_keras.ct.verdict import TILTED, has_word
from ich_keras.data.thin_series import AVERAGE, ThinRule
from ich_keras.errors import UsageError
from ich_keras.explanation import explain_series
from ich_keras.prediction_members import Member
from ich_keras.relevance import Relevance, map_options

MOST_BYTES = 2**29  # of heat maps in memory
MOST_LABELS = 12  # of a page


class MapMaker:
    """Makes the heat maps of a run.

    Args:
        members: the runs of a prediction.
        method: see `ich_keras.relevance.MapOptions`.
        thin: what was done with thin series (`ich_keras.data.thin_series`).

    Raises:
        UsageError: several runs, another backend than torch, an unknown method, or a network that
            cannot be explained.
    """

    def __init__(self, members: Sequence[Member], method: str, thin: str = AVERAGE) -> None:
        if len(members) > 1:
            raise UsageError(
                f"heat maps are asked for of {len(members)} runs; they explain one.",
                "Leave them out, or predict with one run.",
            )
        self.options = map_options(method)
        self._run = (members[0].recipe, members[0].model)
        # A sequence head's part in an answer is in no map.
        self.is_of_slice_network = members[0].context is not None
        self._thin = ThinRule(members[0].distances, thin)
        Relevance(members[0].model, self.options)  # before hours of predictions, not behind them

    def __call__(
        self, series: Any, hu: np.ndarray, positions_mm: np.ndarray, labels: Sequence[str]
    ) -> Mapping[str, np.ndarray]:
        """Return the heat maps of a series.

        Args:
            series: its row in the index.
            hu: int16 (slices, rows, columns), HU, of the slices that were predicted.
            positions_mm: float64 (slices,), along the normal.
            labels: in the order in which they are wanted; of many, the first ones.

        Returns:
            Label -> float32 (slices, rows, columns), 0 to 1; made as they are taken.
        """
        return _Maps(self, series, hu, positions_mm, labels[:MOST_LABELS])

    def maps(
        self, series: Any, hu: np.ndarray, positions_mm: np.ndarray, labels: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Make the heat maps of these labels; of a thin series, of what the network saw of it."""
        blocks = self._thin.blocks(positions_mm, series.verdict)
        distance = abs(series.slice_spacing_mm)
        if blocks is not None:
            hu, distance = blocks.averaged(hu), float(self._thin.target_mm or distance)
        spacing = (
            distance if np.isfinite(distance) and distance > 0 else 1.0,
            series.row_spacing_mm,
            series.column_spacing_mm,
        )
        # Others have a little shear, too, and would be taken for tilted.
        is_tilted = has_word(series.verdict, TILTED)
        shear = (series.shear_row, series.shear_column) if is_tilted else (0.0, 0.0)
        found = explain_series(self._run, hu, spacing, labels, self.options, shear).values
        if blocks is None:
            return found
        return {label: values[blocks.owner] for label, values in found.items()}


class _Maps(Mapping[str, np.ndarray]):
    """Heat maps that are made as they are taken, as many at a time as memory is for."""

    def __init__(
        self,
        maker: MapMaker,
        series: Any,
        hu: np.ndarray,
        positions_mm: np.ndarray,
        labels: Sequence[str],
    ) -> None:
        self._maker, self._series, self._hu = maker, series, hu
        self._positions_mm, self._labels = positions_mm, list(labels)
        self._made: dict[str, np.ndarray] = {}

    def __getitem__(self, label: str) -> np.ndarray:
        if label not in self._made:
            first = self._labels.index(label)
            some = max(1, MOST_BYTES // (4 * self._hu.size))
            self._made = {}
            wanted = self._labels[first : first + some]
            self._made = self._maker.maps(self._series, self._hu, self._positions_mm, wanted)
        return self._made[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._labels)

    def __len__(self) -> int:
        return len(self._labels)
