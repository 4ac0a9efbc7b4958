"""Where experiments are worked on, and how."""

from dataclasses import dataclass
from pathlib import Path

from experiments.declare import Source
from experiments.scales import Scale

OTHER = "other"  # the second set of phantoms, for the stand-ins


@dataclass(frozen=True)
class Place:
    """Where experiments are worked on, and how.

    Args:
        work: caches, splits and run folders; large.
        out: results; small, and enough to make tables and figures again.
        scale: how large they are.
        source: DICOM files; None draws phantoms.
        device: "auto", "cpu" or "cuda".
        threads: processor threads, in all.
        jobs: runs trained at the same time.
    """

    work: Path
    out: Path
    scale: Scale
    source: Source | None = None
    device: str = "auto"
    threads: int = 1
    jobs: int = 1

    def run_dir(self, key: str, seed: int) -> Path:
        """Return the run folder."""
        return self.work / "runs" / f"{key}-s{seed}"

    def result_dir(self, key: str, seed: int) -> Path:
        """Return the folder of a run's stored result."""
        return self.out / "runs" / f"{key}-s{seed}"

    def cache_dir(self, is_other: bool = False) -> Path:
        """Return the folder of the cache, or of the cache of the second set of phantoms."""
        return self.work / (f"{OTHER}-cache" if is_other else "cache")
