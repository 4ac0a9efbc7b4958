"""Volumes: the slices of one SeriesInstanceUID that are one scan in one reconstruction.

Each slice of a volume then has neighbours of its own kind. What cannot be told apart stays
together, and the verdict says so ("duplicate").
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from ich_keras.ct.geometry import SAME_POSITION_MM, neighbour_distances_mm, slice_normal
from ich_keras.ct.header import FACT_TAGS, TIME_TAGS
from ich_keras.ct.journal import Entry
from ich_keras.ct.kind import is_elsewhere
from ich_keras.ct.verdict import MIN_SLICES, spacing_faults

# How far direction cosines (0.06 degrees) and pixel spacings (mm) of one volume may differ.
SAME_VOLUME_TOLERANCE = 1e-3
KERNEL = FACT_TAGS.index("ConvolutionKernel")
THICKNESS = FACT_TAGS.index("SliceThickness")
# A fact that has more values in one series is noted per slice or rotation, and separates no scans.
MAX_PARTS = 100
# PS3.5 6.2, TM: hours, minutes, seconds and their fraction.
_TIME = re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?", re.ASCII)

Volume = list[Entry]


def volumes_of(entries: list[Entry]) -> list[Volume]:
    """Split the slices of one SeriesInstanceUID into volumes, the largest first.

    Slices are ordered by UID, not by path: renamed files give the same volumes.
    """
    groups: dict[tuple, list[tuple[np.ndarray, Volume]]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.sop_instance_uid):
        exact = (
            entry.patient_id,
            entry.study_instance_uid,
            entry.rows,
            entry.columns,
            entry.is_localizer,
            is_elsewhere(entry.body_part),
        )
        near = np.array([*entry.orientation, entry.row_spacing_mm, entry.column_spacing_mm])
        for reference, volume in groups[exact]:
            if abs(near - reference).max() <= SAME_VOLUME_TOLERANCE:
                volume.append(entry)
                break
        else:
            groups[exact].append((near, [entry]))
    volumes = []
    for group in groups.values():
        for _, volume in group:
            # One normal for all parts of a volume: cosines are rounded differently.
            stack = _Stack(slice_normal(volume[0].orientation))
            for scan in stack.scans(volume):
                volumes += stack.reconstructions(scan)
    return sorted(volumes, key=lambda volume: (-len(volume), volume[0].sop_instance_uid))


class _Stack:
    """Separates slices that share a normal, by where they lie along it.

    Args:
        normal: float64 (3,), of the slices.
    """

    def __init__(self, normal: np.ndarray) -> None:
        self._normal = normal

    def scans(self, volume: Volume) -> list[Volume]:
        """Separate acquisitions at the same positions: a head scanned twice, or a perfusion.

        Adjacent acquisitions, such as the rotations or halves of one scan, stay together even if
        they share some slices. A single slice at an occupied position (scanned again, or watched
        for the contrast medium) is a scan of its own. Not separated here: scans that
        AcquisitionNumber does not distinguish: none, or a different one for every slice.
        """
        parts = _grouped(volume, [entry.acquisition for entry in volume])
        if max(map(len, parts.values())) == 1:
            return [volume]

        def belongs(part: Volume, scan: Volume) -> bool:
            return 2 * self._num_shared(part, scan) <= min(len(part), len(scan)) and not (
                self._is_woven(part, scan) and self._is_irregular(part + scan)
            )

        return _joined(sorted(parts.values(), key=_rank), belongs)

    def reconstructions(self, scan: Volume) -> list[Volume]:
        """Separate what overlaps and differs in a fact of its header: a kernel, a thickness, ...

        Parts that lie beside each other stay together: the base of the skull in a sharper kernel or
        in thinner slices is of one head with the rest.
        """
        for place in range(len(scan[0].facts)):
            by_value = _grouped(scan, [entry.facts[place] for entry in scan])
            if 1 < len(by_value) <= min(MAX_PARTS, len(scan) / 2 + 1):
                parts = [by_value[value] for value in sorted(by_value)]
                found = _joined(
                    parts, lambda a, b: not self._num_shared(a, b) and not self._is_woven(a, b)
                )
                if len(found) > 1:
                    return [part for one in found for part in self.reconstructions(one)]
        return self._repetitions(scan)

    def _repetitions(self, scan: Volume) -> list[Volume]:
        """Separate slices at the same positions by the time at which they were made.

        A scan begins where a position comes back. That tells scans apart only if there are no more
        of them than slices at one position: there are more where rotations overlap, or where
        reconstructions were made side by side.
        """
        most = self._most_at_one_position(scan)
        if most == 1:
            return [scan]
        for place in range(len(TIME_TAGS)):
            times = [_time(entry, place) for entry in scan]
            if not all(map(_TIME.fullmatch, times)):
                continue
            at_times = _grouped(scan, times)
            scans: list[Volume] = []
            for time in sorted(at_times, key=_seconds):
                part = at_times[time]
                if scans and not self._num_shared(part, scans[-1]):
                    scans[-1] += part
                else:
                    scans.append(list(part))
                if len(scans) > most:
                    break
            if 1 < len(scans) <= most and all(
                self._most_at_one_position(one) == 1 for one in scans
            ):
                return scans
        return [scan]

    def _along(self, volume: Volume) -> np.ndarray:
        """Return the places of slices along their normal, ascending, mm; float64 (slices,)."""
        positions = np.array([entry.position for entry in volume])
        return np.sort(positions @ self._normal)

    def _num_shared(self, ones: Volume, others: Volume) -> int:
        """Count the slices of the first that share a position with a slice of the second."""
        one, other = self._along(ones), self._along(others)
        after = np.searchsorted(other, one).clip(1, len(other)) - 1
        nearest = np.minimum(abs(one - other[after]), abs(one - other[(after + 1) % len(other)]))
        return int((nearest <= SAME_POSITION_MM).sum())

    def _is_woven(self, ones: Volume, others: Volume) -> bool:
        """Return whether two regular stacks lie in one another, as thin slices between thick ones.

        A few slices, or a stack with holes that the other one fills, are not volumes of their own.
        """
        stacks = self._along(ones), self._along(others)
        least = min(map(len, stacks))
        if least < MIN_SLICES or any(
            spacing_faults(neighbour_distances_mm(stack)) for stack in stacks
        ):
            return False
        inside = [
            int(((one > other[0]) & (one < other[-1])).sum())
            for one, other in (stacks, stacks[::-1])
        ]
        return sum(inside) > least

    def _is_irregular(self, volume: Volume) -> bool:
        return bool(spacing_faults(neighbour_distances_mm(self._along(volume))))

    def _most_at_one_position(self, volume: Volume) -> int:
        """Return how many slices lie at the position that holds the most."""
        along = self._along(volume)
        # Slices that follow each other within the tolerance share a position.
        begins = np.flatnonzero(np.diff(along, prepend=-np.inf) > SAME_POSITION_MM)
        return int(np.diff(begins, append=len(along)).max())


def _rank(acquisition: Volume) -> tuple:
    """Order acquisitions by their numbers, which follow time; those without one come last."""
    first = acquisition[0]
    # An IS has at most 12 characters (PS3.5 6.2); anything longer is not a number.
    is_number = first.acquisition.isdecimal() and len(first.acquisition) <= 12
    return int(first.acquisition) if is_number else math.inf, first.sop_instance_uid


def _time(entry: Entry, place: int) -> str:
    return entry.times[place] if entry.times else ""


def _seconds(time: str) -> float:
    return float(f"{time.partition('.')[0]:0<6}.{time.partition('.')[2] or 0}")


def _grouped(volume: Volume, values: list[str]) -> dict[str, Volume]:
    parts: dict[str, Volume] = defaultdict(list)
    for entry, value in zip(volume, values, strict=True):
        parts[value].append(entry)
    return parts


def _joined(parts: list[Volume], belongs: Callable[[Volume, Volume], bool]) -> list[Volume]:
    """Join parts to volumes. Each goes to the latest volume that it belongs to, or begins one."""
    volumes: list[Volume] = []
    for part in parts:
        # The latest first: a rotation starts where the previous one ended.
        for volume in reversed(volumes):
            if belongs(part, volume):
                volume += part
                break
        else:
            volumes.append(list(part))
    return volumes
