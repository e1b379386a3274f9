"""The ranks of a run: who they are, what they tell each other outside the training step, how they share a model."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from d2v.config import Run
from d2v.runtime import choose_device
from d2v.train.ranks.heartbeat import Heartbeat
from d2v.train.ranks.reduction import RoundedReduce, RoundedReduceScatter

_T = TypeVar("_T")
_POLL_SECONDS = 0.05
# The option's name changed in torch 2.13.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)
# It warns of changing a block's outputs in place, which nothing here does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run; without a launcher, one rank and no communication."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Gloo: messages between hosts' memories, so that no GPU is waited for."""
    storage: dist.ProcessGroup | None = None
    """Gloo, for checkpoints alone, which are written beside the training."""
    node: dist.ProcessGroup | None = None
    """Gloo, of the ranks of this node, for checkpoints of its own; only with `run.local_checkpoint`."""
    store: dist.Store | None = None
    """The job's key-value store."""
    turns: Iterator[int] = field(default_factory=itertools.count)
    """Numbers of the calls of `first_before_others`, alike on all ranks."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and messages."""
        return self.rank == 0

    @property
    def is_parallel(self) -> bool:
        """Whether a process group exists."""
        return self.control is not None

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place, on the device of `value`, a tensor as `all_reduce` takes it."""
        if self.size > 1:
            all_reduce(value)
        return value

    def share(self, value: _T) -> _T:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

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

    def in_step(
        self, items: Iterable[_T], gather: Callable[[Any], list[Any]] | None = None
    ) -> Iterator[tuple[_T, bool]]:
        """Items, as often on every rank as on the one that has most: a rank that has run out gets its last item again,
        with False. For forwards of a sharded model, in which all ranks take part.

        gather: in place of `self.gather`, where another exchange may meet this one.
        """
        source, last = iter(items), None
        while True:
            item = next(source, None)
            if not any((gather or self.gather)(item is not None)):
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


def all_reduce(value: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, *, async_op: bool = False) -> Any:
    """`torch.distributed.all_reduce` of what it reduces rightly: every reduction over ranks that d2v asks for itself.

    Gloo takes a column for the numbers that lie behind its first one, adds 16-bit floats in 16 bits in an order that
    changes along the tensor, and its maximum of floats keeps a NaN of rank 0 alone.

    Raises:
        ValueError: not contiguous; neither float32, float64 nor int64; a maximum of floats.
    """
    types = [torch.int64] if op == dist.ReduceOp.MAX else [torch.float32, torch.float64, torch.int64]
    if not value.is_contiguous() or value.dtype not in types:
        names = " or ".join(str(t).removeprefix("torch.") for t in types)
        raise ValueError(
            f"reduction over ranks: expected a contiguous tensor of {names}, got {value.dtype} of shape "
            f"{tuple(value.shape)} and strides {value.stride()}"
        )
    return dist.all_reduce(value, op=op, group=group, async_op=async_op)


class StopFlag:
    """What any rank asks for, known to all one update later: the largest value counts.

    The exchange runs on host memory while the device computes; it is waited for an update later, when it is long done.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Tensor, Any] | None = None

    def exchange(self, value: int) -> int:
        """Tells the others `value`; returns the largest value of the previous call (one rank: of this one)."""
        if self._ranks.size == 1:
            return value
        largest = 0
        if self._pending is not None:
            told, work = self._pending
            work.wait()
            largest = int(told)
        told = torch.tensor([value])
        work = all_reduce(told, dist.ReduceOp.MAX, self._ranks.control, async_op=True)
        self._pending = told, work
        return largest


def meet(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The key-value store of a launched job, this process's rank, and the number of ranks.

    A job that torchrun has restarted gets the store of the attempt before it, with the addresses of processes that are
    gone: each attempt has its own names in it.
    """
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return dist.PrefixStore(f"d2v-attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, size


@contextlib.contextmanager
def open_ranks(run: Run) -> Iterator[Ranks]:
    """Joins the ranks that torchrun started, or is one rank alone; leaves it at the end.

    Raises `ValueError` for a device that is not there. A rank that is silent for `run.timeout` seconds ends the others
    (`Heartbeat`).
    """
    device = choose_device(run.device)
    launched = dist.is_torchelastic_launched()
    if not launched and run.parallel == "ddp":
        yield Ranks(device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=run.timeout)
    place, rank, size = meet(timeout) if launched else (dist.HashStore(), 0, 1)
    dist.init_process_group(backend, timeout=timeout, store=place, rank=rank, world_size=size)
    try:
        control, storage = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        store: Any = dist.distributed_c10d._get_default_store()
        with Heartbeat(rank, size, store, run) if size > 1 else contextlib.nullcontext():
            world = dist.PrefixStore("d2v-world", store) if size > 1 else None
            ranks = Ranks(device, rank, size, control, storage, store=world)
            yield replace(ranks, node=make_node_group(run, ranks)) if run.local_checkpoint is not None else ranks
    finally:
        dist.destroy_process_group()


def make_node_group(run: Run, ranks: Ranks) -> dist.ProcessGroup:
    """The ranks of this node; `ValueError` where a node holds no whole model."""
    own = os.environ.get("GROUP_RANK", "0")  # torchrun's number of the node
    places = ranks.gather(own)
    nodes = [[r for r, place in enumerate(places) if place == one] for one in dict.fromkeys(places)]
    shards = (run.shard_ranks or ranks.size) if run.parallel == "fsdp" else 1
    if any(node[0] % shards or len(node) % shards for node in nodes):
        raise ValueError(
            f"run.local_checkpoint: expected a whole model on every node, by ddp or run.shard_ranks that divide the "
            f"{len(nodes[0])} ranks of a node, got one that is split over {shards} ranks"
        )
    timeout = datetime.timedelta(seconds=run.timeout)
    groups = [dist.new_group(node, backend="gloo", timeout=timeout) for node in nodes]
    return next(group for node, group in zip(nodes, groups, strict=True) if ranks.rank in node)


# ---- one model on many ranks: DistributedDataParallel or fully sharded ---------------------------------------------


def parallelise(
    model: nn.Module, blocks: Sequence[nn.Module], run: Run, ranks: Ranks, *, may_skip: bool = False
) -> nn.Module:
    """What the trainer calls in place of `model`, on `ranks.device`.

    Args:
        model: equal on all ranks; sharded in place by `run.parallel` "fsdp".
        blocks: its transformer blocks, of student and teacher alike: the units that are compiled and sharded.
        run: parallel, shard_ranks, reduce_precision, compile, compile_scope, compile_cache.
        ranks: the ranks.
        may_skip: some trained parameters may take no part in an update.

    Raises:
        ValueError: a number of ranks that does not fit; a folder for compiled code that others can write.
    """
    if run.compile:
        if run.compile_cache is not None:
            keep_compiled(Path(run.compile_cache))
        for part in blocks if run.compile_scope == "blocks" else [model]:
            part.compile()
    if not ranks.is_parallel:
        return model
    if run.parallel == "ddp":
        # Without device_ids the inputs stay where they are: lengths and masks are read on the host. Buffers are fixed
        # positions, equal from the beginning.
        options: dict[str, Any] = {_SYNC_BUFFERS: False, "find_unused_parameters": may_skip}
        network = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
        if run.reduce_precision == "bf16" and not run.digest_every:  # which has a hook of its own
            reduce = make_reduction(run, ranks)
            network.register_comm_hook(None, lambda _, bucket: reduce(bucket.buffer()))
        return network
    shards = run.shard_ranks or ranks.size
    if ranks.size % shards:
        raise ValueError(f"run.shard_ranks: expected a divisor of the {ranks.size} ranks, got {shards}")
    # All ranks in one group, or (copies, shards) where `run.shard_ranks` says how many share a model.
    copies = ranks.size // shards
    shape, names = ((shards,), ("shard",)) if copies == 1 else ((copies, shards), ("replicate", "shard"))
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    # Student and teacher are sharded alike, so the moving average is local. Nothing stays gathered after a forward:
    # the teacher has no backward pass that would free it.
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    sharded = fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if run.reduce_precision == "bf16":
        for part in (part for part in model.modules() if isinstance(part, FSDPModule)):
            part.set_custom_reduce_scatter(RoundedReduceScatter())  # type: ignore[arg-type]
    trained = [b for b in blocks if isinstance(b, FSDPModule) and any(p.requires_grad for p in b.parameters())]
    if 0 < len(trained) < len(blocks):
        # By itself the backward pass begins with gathering what ran last: a block of the teacher, which has none.
        sharded.set_modules_to_backward_prefetch([trained[-1]])
    return model


def keep_compiled(folder: Path) -> None:
    """Has this process keep compiled code in a folder, and take it from there.

    `ValueError` where somebody else could have written it: it is executed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        owner = f"of user {status.st_uid} with mode {status.st_mode & 0o777:o}"
        raise ValueError(
            f"run.compile_cache: expected a folder of your own that nobody else can write, as its code is executed, "
            f"got {str(folder)!r} {owner}"
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())


def make_reduction(run: Run, ranks: Ranks) -> Callable[[Tensor], torch.futures.Future[Tensor]]:
    """What begins the mean of a flat float32 tensor over the ranks, in place: for a hook of DistributedDataParallel."""
    if run.reduce_precision == "bf16" and ranks.size > 1:
        return RoundedReduce(ranks.device, datetime.timedelta(seconds=run.timeout))

    def reduce(buffer: Tensor) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Any] = all_reduce(buffer.mul_(1.0 / ranks.size), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    return reduce


def accumulating(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of a forward and backward pass: gradients are summed over the ranks after the last micro-batch only."""
    if isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext() if last else network.no_sync()
    set_sync = getattr(network, "set_requires_gradient_sync", None)  # of a sharded module
    if set_sync is not None:
        set_sync(last)
    return contextlib.nullcontext()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """For forwards of parts of a sharded model, which all ranks call alike: in here it is whole but for its blocks,
    which gather themselves. Other models stay as they are."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
