"""Several processes that train one network: what they tell each other, over torch.distributed.

Each process takes a step on its part of the batch. Their losses and gradients are weighted by the
sizes of the parts and added up, so that the step is that of one process on the whole batch.
"""

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ich_keras.errors import LostProcess
from ich_keras.ranks import Rank

# How long one process may keep the others waiting within a step: longer than a worker process may
# take for a batch (`WORKER_TIMEOUT_SECONDS` in data/loader.py), whose error says more.
TIMEOUT = datetime.timedelta(minutes=20)
# Gradients are added up in arrays of this many bytes, as torch's DistributedDataParallel does.
BUCKET_BYTES = 25 * 2**20
_START = "start"
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Share:
    """The part of a batch that this process has.

    Args:
        start: place of its first sample in the whole batch.
        own: its samples; may be 0.
        total: those of the whole batch.
    """

    start: int
    own: int
    total: int


class Group:
    """The processes of one training, as seen from one of them.

    Args:
        rank: which one.
        store: torch's key-value store that all of them reach.

    Raises (all methods that tell or ask the others):
        LostProcess: another process has ended, or has not answered for `TIMEOUT`.
    """

    def __init__(self, rank: Rank, store: Any) -> None:
        self.rank = rank
        self.share = Share(0, 0, 0)
        self._store = store

    def announce(self, start: dict[str, Any]) -> None:
        """Tell those that wait in `wait_for_start` what is trained (ready for JSON)."""
        with _connected():
            self._store.set(_START, json.dumps(start))

    def wait_for_start(self) -> dict[str, Any]:
        """Wait, however long it takes, for what the first process announces."""
        # Not by the store's own wait: it has a time limit, and a signal would have to wait for it.
        with _connected():
            while not self._store.check([_START]):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            return json.loads(self._store.get(_START))

    def take_share(self, own: int) -> Share:
        """Learn the sizes of all parts of a batch, and keep this process's share as `share`.

        Args:
            own: samples of this process.
        """
        # On the CPU also where the network is on a GPU: nothing there has to be waited for.
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.rank.of)]
        with _connected():
            dist.all_gather(counts, torch.tensor([own]))
        sizes = [int(count) for count in counts]
        self.share = Share(sum(sizes[: self.rank.number]), own, sum(sizes))
        return self.share

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, in their order; any that can be pickled."""
        values: list[Any] = [None] * self.rank.of
        with _connected():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the first process's value; any that can be pickled."""
        values = [value]
        with _connected():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    @torch.no_grad()
    def take_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the first process's tensors into this one's."""
        for tensor in tensors:
            received = tensor.detach().clone(memory_format=torch.contiguous_format)
            with _connected():
                dist.broadcast(received, src=0)
            tensor.copy_(received)

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a contiguous tensor, in place, by the sum over all processes; return it."""
        with _connected():
            dist.all_reduce(tensor)
        return tensor

    def begin_to_add_up(self, tensor: torch.Tensor) -> Any:
        """Begin `add_up`; the work that is returned is given to `finish`."""
        with _connected():
            return dist.all_reduce(tensor, async_op=True)

    def finish(self, work: Any) -> None:
        """Wait for what was begun."""
        with _connected():
            work.wait()

    def leave(self) -> None:
        """Wait for the others, and part from them."""
        global _joined
        with _connected():
            dist.barrier()
            dist.destroy_process_group()
        _joined = None


# The group until it is left; the store stays, for that of a second training in the same process.
_joined: Group | None = None
_store: Any = None
_joins = 0


def join(rank: Rank, device: str) -> Group:
    """Meet the other processes, at the address in the environment; once in a process.

    Args:
        rank: this process.
        device: "cpu" or "cuda", which is then this process's own GPU.

    Raises:
        LostProcess: they do not meet.
    """
    global _joined, _store, _joins
    if _joined is None:
        # Small things are told over the CPU.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        with _connected():
            if _store is None:
                _store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
            store = dist.PrefixStore(f"ich_keras/{_joins}", _store)
            dist.init_process_group(
                backend, store=store, rank=rank.number, world_size=rank.of, timeout=TIMEOUT
            )
        _joins += 1
        _joined = Group(rank, store)
    return _joined


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Say in our words that another process is gone; gloo raises plain RuntimeErrors."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostProcess(
            "another process of this training ended, or does not answer.",
            "See what it said. If it said nothing it was killed, perhaps for its memory.",
        ) from error


class GradientSum:
    """Adds up the gradients of all processes while the backward pass still runs.

    Each parameter reports its gradient as soon as it is there. A bucket that is full is sent at
    once; the backward pass goes on meanwhile. Behind a `torch.compile`d function all gradients come
    together at its end, so nothing overlaps there.

    Args:
        group: of the training.
        parameters: leaf tensors, in the order of the network: gradients come from its end.
    """

    def __init__(self, group: Group, parameters: Sequence[torch.Tensor]) -> None:
        self._group = group
        self._buckets = _in_buckets(parameters)
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[torch.Tensor, Any]] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._reporter(number))
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket
        ]

    def begin(self, loss: torch.Tensor) -> torch.Tensor:
        """Return this process's share of the loss over the whole batch, for the backward pass."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []
        share = self._group.share
        return loss * (share.own / share.total)

    def no_loss(self) -> torch.Tensor:
        """Return a loss that `begin` weighs with zero, for a process without samples."""
        sums = [parameter.sum() for bucket in self._buckets for parameter in bucket]
        return torch.stack(sums).sum()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the sums in place of the gradients; call it after the backward pass."""
        while len(self._sent) < len(self._buckets):
            self._send()
        for bucket, (total, work) in zip(self._buckets, self._sent, strict=True):
            self._group.finish(work)
            parts = total.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter))
        self._sent = []

    def detach(self) -> None:
        """Leave the parameters alone."""
        for handle in self._handles:
            handle.remove()

    def _reporter(self, number: int) -> Any:
        def report(parameter: torch.Tensor) -> None:
            self._missing[number] -= 1
            # In one order, the same for all processes, whichever bucket is full first.
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

        return report

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        # A parameter that the loss does not reach has no gradient, in any process.
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        total = torch.cat([part.reshape(-1) for part in parts])
        self._sent.append((total, self._group.begin_to_add_up(total)))


def _in_buckets(parameters: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group parameters of one type, the last first."""
    buckets: list[list[torch.Tensor]] = []
    size = BUCKET_BYTES
    for parameter in reversed(parameters):
        is_other = buckets and buckets[-1][0].dtype is not parameter.dtype
        if size >= BUCKET_BYTES or is_other:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets
