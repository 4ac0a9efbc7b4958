"""The networks of the report, one input of each view. Imports neither torch nor keras."""

from dataclasses import replace

from benchmarks.cases import DILATED, FLAT, SLAB, SLICE, STRIDED, WHOLE, Case
from benchmarks.cases import tiny as tiny_case

PATIENT_SLICES = WHOLE[0]  # a patient stands for one series of 60 slices

# The batch holds the voxels of one patient, whatever the view.
NETWORKS = {
    "slice": Case("slice", "resnet18_2d", SLICE, PATIENT_SLICES),
    "slab": Case("slab", FLAT, SLAB, PATIENT_SLICES // SLAB[0]),
    "series": Case("series", STRIDED, WHOLE, 1),
    "slab-dilated": Case("slab-dilated", DILATED, SLAB, PATIENT_SLICES // SLAB[0]),
    "series-dilated": Case("series-dilated", DILATED, WHOLE, 1),
}
MAIN = ("slice", "slab", "series")


def network(name: str, patients: int = 1, is_tiny: bool = False) -> Case:
    """Look a network up.

    Args:
        name: a key of `NETWORKS`.
        patients: how many patients' voxels a batch holds.
        is_tiny: shrink it, for trials.
    """
    case = NETWORKS[name]
    if is_tiny:
        return tiny_case(case)
    return replace(case, batch=case.batch * patients)


def view_of(name: str) -> str:
    """Return the view of a network: "slice", "slab" or "series".

    >>> view_of("series-dilated")
    'series'
    """
    return name.partition("-")[0]


def num_slices(case: Case) -> int:
    """Return how many slices a sample has."""
    return 1 if len(case.shape) == 3 else case.shape[0]


def samples_per_patient(name: str) -> int:
    """Return how many samples answer for one patient of 60 slices.

    A slab answers for its middle slice only, so there are as many slabs as slices.

    >>> samples_per_patient("slab"), samples_per_patient("series")
    (60, 1)
    """
    return 1 if view_of(name) == "series" else PATIENT_SLICES
