"""One model on many ranks: DistributedDataParallel or fully sharded, and what goes with it."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from d2v.config import Run
from d2v.train.distributed import World

# The option's name changed in torch 2.13.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)
# It warns of changing a block's outputs in place, which nothing here does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)


def parallelise(
    model: nn.Module, blocks: Sequence[nn.Module], run: Run, world: World, *, may_skip: bool = False
) -> nn.Module:
    """What the trainer calls in place of `model`, on `world.device`.

    Args:
        model: equal on all ranks; sharded in place by `run.parallel` "fsdp".
        blocks: its transformer blocks, of student and teacher alike: the units that are compiled and sharded.
        run: parallel, shard_ranks, compile, compile_scope.
        world: the ranks.
        may_skip: some trained parameters may take no part in an update.

    Raises:
        ValueError: a number of ranks that does not fit; one graph on several ranks, which has not been tried.
    """
    if run.compile_scope == "network" and world.is_parallel:
        raise ValueError(f"run.compile_scope: expected blocks on {world.size} ranks, got network")
    if run.compile:
        for part in blocks if run.compile_scope == "blocks" else [model]:
            part.compile()
    if not world.is_parallel:
        return model
    if run.parallel == "ddp":
        # Without device_ids the inputs stay where they are: lengths and masks are read on the host. Buffers are fixed
        # positions, equal from the beginning.
        options: dict[str, Any] = {_SYNC_BUFFERS: False, "find_unused_parameters": may_skip}
        return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
    mesh = make_mesh(run, world)
    # Student and teacher are sharded alike, so the moving average is local. Nothing stays gathered after a forward:
    # the teacher has no backward pass that would free it.
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    sharded = fully_shard(model, mesh=mesh, reshard_after_forward=True)
    trained = [b for b in blocks if isinstance(b, FSDPModule) and any(p.requires_grad for p in b.parameters())]
    if 0 < len(trained) < len(blocks):
        # By itself the backward pass begins with gathering what ran last: a block of the teacher, which has none.
        sharded.set_modules_to_backward_prefetch([trained[-1]])
    return model


def make_mesh(run: Run, world: World) -> DeviceMesh:
    """All ranks in one group, or (copies, shards) where `run.shard_ranks` says how many share a model."""
    shards = run.shard_ranks or world.size
    if world.size % shards:
        raise ValueError(f"run.shard_ranks: expected a divisor of the {world.size} ranks, got {shards}")
    if shards == world.size:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // shards, shards)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def accumulating(network: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of a forward and backward pass: gradients are summed over the ranks after the last micro-batch only."""
    if isinstance(network, DistributedDataParallel):
        return contextlib.nullcontext() if last else network.no_sync()
    set_sync = getattr(network, "set_requires_gradient_sync", None)  # of a sharded module
    if set_sync is not None:
        set_sync(last)
    return contextlib.nullcontext()
