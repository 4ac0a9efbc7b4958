"""Runs one job in this process."""

from collections.abc import Iterator

import torch

from benchmarks.report.jobs import CPU, FEED, GPU, LOADER, WORKERS, job_called, jobs_of
from benchmarks.report.loading import feed, loader, workers
from benchmarks.report.tasks import TASKS, Conditions, Found

__all__ = ["Conditions", "perform"]


def perform(name: str, precision: str, conditions: Conditions) -> Iterator[Found]:
    """Run a job.

    Args:
        name: of the job.
        precision: the fast one of this machine.
        conditions: how to measure.

    Yields:
        The columns of each measurement, as soon as it is made.

    Raises:
        KeyError: there is no such job.
    """
    kind = CPU if conditions.device == "cpu" else GPU
    job = job_called(name, jobs_of(kind, precision))
    torch.set_num_threads(conditions.threads)
    yield from (TASKS | {LOADER: loader, FEED: feed, WORKERS: workers})[job.task](job, conditions)
