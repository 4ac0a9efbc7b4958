"""Work on executors that somebody else has made: those of `concurrent.futures`, or of a cluster.

Tasks are small, and what they hand back is, too: pixels go from the files to the cache's folder,
which all machines must see under the same path, as they must the DICOM files. A task may run twice,
as when a worker of a cluster is killed: it writes the same bytes.
"""

import contextlib
import itertools
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from typing import TypeVar

from ich_keras.errors import EnvironmentProblem

Item = TypeVar("Item")
Result = TypeVar("Result")

# Either a number of processes of this machine (0: this process), or somebody's executor.
Workers = int | Executor

CONNECT_SECONDS = 60
# Tasks under way or waiting: enough for a large cluster, and little to hold.
AHEAD = 512
_ON_A_CLUSTER = (
    "The workers need the same versions, and a file system on which they find the files and the"
    " cache's folder under the same paths."
)


def map_on(
    executor: Executor,
    function: Callable[[Item], Result],
    items: Iterable[Item],
    is_doubtful: Callable[[Result], bool] | None = None,
) -> Iterator[Result]:
    """Yield function(item) in order, as `executor.map` does; the first tasks start at once.

    Args:
        executor: runs the function.
        function: a function of a module; called with one item.
        items: read only as far as needed.
        is_doubtful: whether a result may be the fault of the machine that it comes from, such as
            a file that is not there. It is then found again in this process.
    """
    rest = iter(items)

    def begin(count: int) -> list[tuple]:
        # A name of its own for each task: some executors take equal ones for the same.
        return [
            (item, executor.submit(_task, function, item, uuid.uuid4().hex))
            for item in itertools.islice(rest, count)
        ]

    begun = deque(begin(AHEAD))

    def results() -> Iterator[Result]:
        try:
            while begun:
                item, future = begun.popleft()
                result = future.result()
                begun.extend(begin(1))
                if is_doubtful is not None and is_doubtful(result):
                    result = function(item)
                yield result
        finally:
            for _, future in begun:
                future.cancel()

    return results()


def _task(function: Callable[[Item], Result], item: Item, name: str) -> Result:
    try:
        return function(item)
    except FileNotFoundError as error:
        raise EnvironmentProblem(
            f"{error.filename} is not there for a worker on {socket.gethostname()}.", _ON_A_CLUSTER
        ) from error


@contextlib.contextmanager
def broken_told(work: str, hint: str) -> Iterator[None]:
    """Turn the errors of an executor whose workers have died into one for people.

    Args:
        work: what a worker was doing.
        hint: what to do about it.

    Raises:
        EnvironmentProblem: a worker died.
    """
    try:
        yield
    except (BrokenExecutor, CancelledError) as error:
        raise EnvironmentProblem(work, hint) from error


@contextlib.contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """Connect to a Dask cluster for the length of a block.

    Args:
        address: of its scheduler, such as tcp://node1:8786, or the path of its scheduler file.

    Yields:
        An executor. A task whose worker is killed runs again on another one.

    Raises:
        EnvironmentProblem: Dask is not installed, the scheduler does not answer, it has no workers,
            or workers kept dying.
    """
    try:
        import distributed
    except ImportError as error:
        raise EnvironmentProblem(
            "`--executor dask` needs dask and distributed, which are not installed.",
            "pip install 'ich_keras[dask]'",
        ) from error
    place = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        client = distributed.Client(**place, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise EnvironmentProblem(
            f"no Dask scheduler answers at {address} ({error}).",
            "Start one (`dask scheduler`, `dask worker`), and give the address that it prints.",
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError as error:
            raise EnvironmentProblem(
                f"the Dask scheduler at {address} has no workers.", f"Start some. {_ON_A_CLUSTER}"
            ) from error
        try:
            yield client.get_executor(pure=False)
        except distributed.KilledWorker as error:
            raise EnvironmentProblem(
                f"workers of the Dask cluster at {address} kept dying ({error}).",
                "They may lack memory: see their logs. The same command resumes.",
            ) from error
