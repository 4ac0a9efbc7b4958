"""Shared by all tests: the backend, set before keras is imported; real data, if any; phantoms."""

import os
from pathlib import Path

import hypothesis
import pytest

# Two processes of tests share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Loading torchvision after tensorflow crashes the interpreter (torch 2.14, tensorflow 2.21).
import torchvision  # noqa: F401

import ich_keras  # noqa: F401 (sets torch as the default backend before any test imports keras)
from ich_keras.environment import choose_device
from ich_keras.errors import IchError

# The same cases on every machine, so that a failure in CI is one anywhere.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# The tests run on the CPU even on a machine with a GPU: their expected numbers come from a CPU.
# Only tests/test_cuda.py uses the GPU.
try:
    DEVICE = choose_device(os.environ.get("ICH_TEST_DEVICE", "cpu"))
except IchError as error:
    raise pytest.UsageError(f"ICH_TEST_DEVICE: {error}") from error

SHARED = Path(
    os.environ.get("ICH_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


def pytest_collection_modifyitems(config, items):
    """On the GPU, run only the tests made for it: the others expect the CPU's numbers."""
    if DEVICE != "cpu":
        left_out = [item for item in items if item.path.name != "test_cuda.py"]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def real_rsna_slices() -> Path:
    """Three real RSNA slices with their facts; not part of the repository."""
    folder = SHARED / "rsna_slices"
    if not folder.is_dir():
        pytest.skip(f"real RSNA slices are not at {folder} (set ICH_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def real_ge_series() -> Path:
    """A real GE head series of 28 slices; not part of the repository."""
    folder = SHARED / "ge_head_series"
    if not folder.is_dir():
        pytest.skip(f"the real GE series is not at {folder} (set ICH_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory) -> Path:
    """A small synthetic data set in the RSNA layout: 24 series of 64x64 pixels."""
    from ich_keras.phantom.dicom import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms") / "data"
    write_phantoms(folder, 24, seed=1, matrix=64)
    return folder


@pytest.fixture(scope="session")
def phantom_cache_folder(phantom_folder, tmp_path_factory) -> Path:
    """The phantom series cached at 48x48 pixels, with labels."""
    from ich_keras.workflow import make_cache, prepare_index

    folder = tmp_path_factory.mktemp("cache") / "cache"
    index = prepare_index(phantom_folder / "images", phantom_folder / "stage_2_train.csv")
    make_cache(index, folder, size=48)
    return folder


@pytest.fixture(scope="session")
def phantom_cache(phantom_cache_folder):
    """The opened cache of the phantom series."""
    from ich_keras.data.cache.cache import CTCache

    return CTCache.open(phantom_cache_folder)
