"""What a training has seen, so that nobody scores it on the same images by mistake.

A run keeps one number per slice of its training and validation series: the first 64 bits of the
hash of its pixels; and one per study, of its StudyInstanceUID. Neither gives back what it is of.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ich_keras.data.cache.cache import CTCache
from ich_keras.data.cache.tables import PIXEL_HASH
from ich_keras.data.pixels import shows_head
from ich_keras.data.split_record import Split
from ich_keras.errors import StaleError
from ich_keras.files import atomic_path

PARTS = ("train", "valid")  # validation chose the weights
_DIGITS = 16
_NAMES = ("pixels", "studies")


@dataclass(frozen=True, eq=False)
class Seen:
    """What a training has seen.

    Args:
        pixels: uint64 (slices,), sorted; empty where the cache had no hashes.
        studies: uint64 (studies,), sorted.
    """

    pixels: np.ndarray
    studies: np.ndarray

    @classmethod
    def of(cls, cache: CTCache, split: Split) -> Self:
        """Return what a training on this split sees."""
        members = set().union(*(split.members[part] for part in PARTS))
        slices = cache.slices
        own = slices["series_uid"][slices[split.key].isin(members)]
        rows = slices[slices["series_uid"].isin(own)]
        pixels = rows.get(PIXEL_HASH, [])
        return cls(_numbers(pixels), _numbers(map(_hashed, rows["study_instance_uid"].unique())))

    def save(self, path: Path) -> None:
        """Write it as .npz.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, pixels=self.pixels, studies=self.studies)

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read it; None if there is no such file, as in runs of older versions.

        Raises:
            StaleError: it is damaged.
        """
        if not path.is_file():
            return None
        try:
            # numpy leaves a damaged file open if it opens it itself.
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as content:
                found = [content[name] for name in _NAMES]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StaleError(
                f"{path} cannot be read ({error}).", "Copy the original run folder again."
            ) from error
        if any(one.dtype != np.uint64 or one.ndim != 1 for one in found):
            raise StaleError(f"{path} is damaged.", "Copy the original run folder again.")
        return cls(*found)

    def rows_in(self, cache: CTCache) -> tuple[np.ndarray, np.ndarray]:
        """Find what a training has seen in another cache.

        Returns:
            Rows of `cache.slices`, int64: those of studies that it saw, and those with pixels that
            it saw and that show a head (two images of air may well be equal).
        """
        studies = _each(map(_hashed, cache.slices["study_instance_uid"]))
        of_studies = np.flatnonzero(np.isin(studies, self.studies))
        if PIXEL_HASH not in cache.slices or not len(self.pixels):
            return of_studies, np.zeros(0, np.int64)
        equal = np.flatnonzero(np.isin(_each(cache.slices[PIXEL_HASH]), self.pixels))
        heads = [row for row in equal.tolist() if shows_head(cache.slices_hu([row]))[0]]
        return of_studies, np.array(heads, np.int64)


def _hashed(uid: str) -> str:
    # "" is no study: series without one share it.
    return hashlib.sha256(uid.encode()).hexdigest() if uid else ""


def _each(hashes: object) -> np.ndarray:
    texts = list(hashes)  # type: ignore[call-overload]
    return np.array([int(text[:_DIGITS], 16) if text else 0 for text in texts], np.uint64)


def _numbers(hashes: object) -> np.ndarray:
    found = np.unique(_each(hashes))
    return found[found != 0]
