"""A full disk, as a limit on the size of files imitates it."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Let this process write no file beyond a size for the length of a block."""
    resource = pytest.importorskip("resource", reason="Windows has no limit on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
