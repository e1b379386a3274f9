"""The processes of a run: who they are, and the few things that they tell each other outside the training step."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2v.config import Run
from d2v.runtime import choose_device
from d2v.train.heartbeat import Heartbeat

_T = TypeVar("_T")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class World:
    """The ranks of a run; without a launcher, one rank and no communication."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Gloo: messages between hosts' memories, so that no GPU is waited for."""
    storage: dist.ProcessGroup | None = None
    """Gloo, for checkpoints alone, which are written beside the training."""
    store: dist.Store | None = None
    """The job's key-value store."""
    turns: Iterator[int] = field(default_factory=itertools.count)
    """Numbers of the calls of `first_before_others`, alike on all ranks."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and speaks."""
        return self.rank == 0

    @property
    def is_parallel(self) -> bool:
        """Whether a process group exists."""
        return self.control is not None

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place, on the device of `value`."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def share(self, value: _T) -> _T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def in_step(self, items: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
        """Items, as often on every rank as on the one that has most: a rank that has run out gets its last item again,
        with False. For forwards of a sharded model, in which all ranks take part."""
        source, last = iter(items), None
        while True:
            item = next(source, None)
            if not any(self.gather(item is not None)):
                return
            last = last if item is None else item
            assert last is not None
            yield last, item is not None

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 passes through the block before the others enter it; where it fails, they leave quietly."""
        if self.store is None:
            yield
            return
        key = f"turn-{next(self.turns)}"
        if self.is_first:
            outcome = "failed"
            try:
                yield
                outcome = "passed"
            finally:
                self.store.set(key, outcome)
            return
        # No collective: rank 0 may take longer than any timeout, and the heartbeat tells whether it lives.
        while not self.store.check([key]):
            time.sleep(_POLL_SECONDS)
        if self.store.get(key) == b"failed":
            raise SystemExit(1)
        yield

    @contextlib.contextmanager
    def saying_once(self) -> Iterator[None]:
        """For failures that all ranks reach alike: rank 0 raises them, the others leave quietly."""
        try:
            yield
        except (ValueError, RuntimeError):
            if self.is_first:
                raise
            raise SystemExit(1) from None


class Agreement:
    """What any rank asks for, known to all one update later: the largest value counts.

    The exchange runs on host memory while the device computes; it is waited for an update later, when it is long done.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, value: int) -> int:
        """Tells the others `value`; returns the largest value of the previous call (one rank: of this one)."""
        if self._world.size == 1:
            return value
        previous = self.finish()
        told = torch.tensor([value])
        work = dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._world.control, async_op=True)
        self._pending = told, work
        return previous

    def finish(self) -> int:
        """The largest value of the last call."""
        if self._pending is None:
            return 0
        told, work = self._pending
        self._pending = None
        work.wait()
        return int(told)


@contextlib.contextmanager
def open_world(run: Run) -> Iterator[World]:
    """Joins the ranks that torchrun started, or makes a world of one; leaves it at the end.

    Raises `ValueError` for a device that is not there. A rank that is silent for `run.timeout` seconds ends the others
    (`d2v.train.heartbeat`).
    """
    device = choose_device(run.device)
    launched = dist.is_torchelastic_launched()
    if not launched and run.parallel == "ddp":
        yield World(device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone: dict[str, Any] = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    timeout = datetime.timedelta(seconds=run.timeout)
    dist.init_process_group(backend, timeout=timeout, **alone)
    try:
        rank, size = dist.get_rank(), dist.get_world_size()
        control, storage = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        name = f"rank {rank} on {socket.gethostname()}"
        with Heartbeat(rank, size, name, run.timeout) if size > 1 else contextlib.nullcontext():
            default: Any = dist.distributed_c10d._get_default_store()
            store = dist.PrefixStore("d2v-world", default) if size > 1 else None
            yield World(device, rank, size, control, storage, store)
    finally:
        dist.destroy_process_group()
