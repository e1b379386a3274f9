"""What an update takes on 1 to thousands of GPUs, by arithmetic.

Every figure is an estimate from the assumptions of `Cluster`; nothing here was measured on a GPU. Work comes from
`d2v.train.flops`, parameters and kept activations from `d2v.tools.paper`. docs/scaling.md explains the formulas and
says what breaks first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d2v.config import Config
from d2v.config.fields import build_section, check_ranges, setting
from d2v.tools.paper import Sizes, count_sizes
from d2v.train.flops import find_peak

Parallel = Literal["ddp", "fsdp", "hybrid"]
BUCKET = 25 << 20
"""Bytes of gradients that DistributedDataParallel exchanges at a time."""


@dataclass(frozen=True)
class Cluster:
    """GPUs, nodes and assumptions, of an H100 where nothing else is given; none of them was measured here."""

    peak: float = setting(find_peak("H100"), above=0)
    """FLOP/s of a GPU, dense bfloat16, as quoted in d2v.train.flops."""
    mfu: float = setting(0.4, above=0, high=1)
    """Share of the peak that a large enough micro-batch reaches."""
    memory: float = setting(80e9, above=0)
    """Bytes of a GPU."""
    memory_rate: float = setting(0.8 * 3.35e12, above=0)
    """Bytes a second that optimiser and average move: 80 % of the quoted 3.35 TB/s."""
    issue: float = setting(132 * 4 * 1.98e9, above=0)
    """Warp instructions a second: multiprocessors, four schedulers each, the highest clock. For `benchmarks.step`."""
    node: int = setting(8, low=1)
    """GPUs of a node."""
    nvlink: float = setting(450e9, above=0)
    """Bytes a second and direction of a GPU inside a node."""
    network: float = setting(3200.0, above=0)
    """Gbit/s and direction of a node: eight adapters of 400."""
    bandwidth: float = setting(0.7, above=0, high=1)
    """Share of either rate that a collective reaches."""
    overlap: float = setting(0.9, low=0, high=1)
    """Share of the computing time under which communication can hide."""
    near: float = setting(1e-6, low=0)
    """Seconds of a hop inside a node."""
    far: float = setting(5e-6, low=0)
    """Seconds of a hop between nodes."""
    launch: float = setting(5e-6, low=0)
    """Seconds of the host for a kernel, without CUDA graphs."""
    reserve: float = setting(2e9, low=0)
    """Bytes of a GPU for CUDA, NCCL and the allocator."""
    transient: float = setting(0.15, low=0)
    """Short-lived tensors, as a share of the kept activations."""

    @property
    def network_rate(self) -> float:
        """Bytes a second and direction of a node."""
        return self.network / 8.0 * 1e9


MACHINES = {  # From data sheets as commonly quoted: FLOP/s, bytes, bytes a second (80 % of it reached), links of a GPU.
    "h200": Cluster(peak=find_peak("H200") or 0.0, memory=141e9, memory_rate=0.8 * 4.8e12),
    "h100": Cluster(),
    "a100": Cluster(peak=find_peak("A100") or 0.0, memory_rate=0.8 * 2.039e12, issue=108 * 4 * 1.41e9, nvlink=300e9,
                    network=1600.0),
    "b200": Cluster(peak=find_peak("B200") or 0.0, memory=180e9, memory_rate=0.8 * 8e12, issue=148 * 4 * 1.85e9,
                    nvlink=900e9),
    # A compute unit issues two times 32 lanes a cycle; seven links of 64 GB/s.
    "mi300x": Cluster(peak=1307.4e12, memory=192e9, memory_rate=0.8 * 5.3e12, issue=304 * 2 * 2.1e9,
                      nvlink=448e9),
}  # fmt: skip


def find_machine(machine: str | Mapping[str, Any]) -> Cluster:
    """A machine by its name in `MACHINES`, or of fields of `Cluster`; those that are not given are an H100's.

    `ValueError`: no such machine or field, or a value that it cannot have.
    """
    if isinstance(machine, str):
        if machine not in MACHINES:
            raise ValueError(
                f"machine: expected one of {', '.join(MACHINES)} (plans are for GPUs), or a .toml file with the "
                f"figures of your own, got {machine!r}"
            )
        return MACHINES[machine]
    cluster: Cluster = build_section(Cluster, dict(machine), "machine")
    check_ranges(cluster, "machine")
    return cluster


# ---- communication


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends to sum `size` bytes over the ranks: 2 (n-1) / n of them (reduce-scatter, all-gather)."""
    return 2.0 * (ranks - 1) / ranks * size


def gather_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends to gather, or to reduce and scatter, `size` bytes: (n-1) / n of them."""
    return (ranks - 1) / ranks * size


def _transfer(volume: float, ranks: int, cluster: Cluster) -> float:
    """Seconds for a ring in which a rank sends `volume` bytes. A node's boundary carries the ring once, over all of its
    adapters, so it is the slower of a GPU's links and a node's network that counts."""
    rate = cluster.nvlink if ranks <= cluster.node else min(cluster.nvlink, cluster.network_rate)
    return volume / (rate * cluster.bandwidth)


def all_reduce_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """A sum over the ranks, bucket by bucket, by trees: 2 log2 hops a bucket."""
    if ranks == 1:
        return 0.0
    inside, nodes = min(ranks, cluster.node), math.ceil(ranks / cluster.node)
    hops = 2.0 * (math.log2(inside) * cluster.near + math.log2(nodes) * cluster.far)
    return _transfer(all_reduce_bytes(size, ranks), ranks, cluster) + math.ceil(size / BUCKET) * hops


def gather_seconds(size: float, ranks: int, calls: int, cluster: Cluster) -> float:
    """All-gathers, or reduce-scatters, of `size` bytes in so many calls, each a ring through all ranks."""
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / cluster.node)
    between = nodes if nodes > 1 else 0
    hops = between * cluster.far + (ranks - 1 - max(between - 1, 0)) * cluster.near
    return _transfer(gather_bytes(size, ranks), ranks, cluster) + calls * hops


def volumes(sizes: Sizes, parallel: Parallel, ranks: int, forwards: int, cluster: Cluster) -> dict[str, float]:
    """Bytes that a rank sends in an update, by kind. The moving average sends nothing.

    ddp: the gradients, float32, once an update. fsdp, hybrid: weights are gathered in float32, of the student for
    forward and backward, of the teacher's blocks for the forward alone, in every micro-batch (what stands outside the
    blocks is one unit with the student's, gathered twice); gradients are reduced and scattered once an update.
    """
    gradients = 4.0 * sizes.trained
    if parallel == "ddp":
        return {"all-reduce": all_reduce_bytes(gradients, ranks)}
    shards = shard_ranks(parallel, ranks, cluster)
    outside = sizes.averaged - sizes.averaged_blocks
    result = {
        "all-gather, student": 2.0 * forwards * gather_bytes(4.0 * sizes.trained, shards),
        "all-gather, teacher": forwards * gather_bytes(4.0 * (sizes.averaged + outside), shards),
        "reduce-scatter": gather_bytes(gradients, shards),
    }
    if shards < ranks:
        result["all-reduce between nodes"] = all_reduce_bytes(gradients / shards, ranks // shards)
    return result


def shard_ranks(parallel: Parallel, ranks: int, cluster: Cluster) -> int:
    """Ranks that hold a model together."""
    return {"ddp": 1, "fsdp": ranks, "hybrid": min(ranks, cluster.node)}[parallel]


# ---- one update


@dataclass(frozen=True)
class Estimate:
    """An update on `gpus` GPUs; every figure is an estimate."""

    config: Config
    parallel: Parallel
    gpus: int
    batch: int
    kappa: float
    """Batch over the configuration's: above 1 only where there are more GPUs than samples, a sample each."""
    micro: int
    forwards: int
    memory: float
    """Bytes of the fullest GPU."""
    compute: float
    """Seconds."""
    optimiser: float
    exposed: float
    """Seconds of communication that computing does not hide."""
    launch_bound: bool
    """The host cannot launch kernels as fast as the GPU would run them."""

    @property
    def seconds(self) -> float:
        """Of an update."""
        return self.compute + self.optimiser + self.exposed

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs."""
        return self.batch / self.seconds

    @property
    def updates(self) -> float:
        """For the samples of the configuration's updates."""
        return self.config.run.steps / self.kappa

    @property
    def hours(self) -> float:
        """Of these updates."""
        return self.updates * self.seconds / 3600.0


def estimate(config: Config, gpus: int, parallel: Parallel, cluster: Cluster) -> Estimate:
    """Time and memory of an update; the rank with most samples decides."""
    sizes, data = count_sizes(config), config.data
    batch = max(data.global_batch, gpus)
    share = math.ceil(batch / gpus)
    micro = min(data.micro_batch or share, share)
    pieces = [micro] * (share // micro) + ([share % micro] if share % micro else [])
    floor = _launches(sizes) * cluster.launch
    work = [(sizes.forward + sizes.backward) * b / (cluster.peak * cluster.mfu) for b in pieces]
    compute = [max(w, floor) for w in work]
    part = sizes.backward / (sizes.forward + sizes.backward)
    shards = shard_ranks(parallel, gpus, cluster)
    return Estimate(
        config=config, parallel=parallel, gpus=gpus, batch=batch, kappa=batch / data.global_batch,
        micro=micro, forwards=len(pieces),
        memory=memory_bytes(sizes, parallel, gpus, micro, len(pieces), cluster),
        compute=sum(compute),
        # Norm, scaling and AdamW move 40 bytes a trained parameter, the average 14 (12 without a bfloat16 copy).
        optimiser=(40.0 * sizes.trained + (14.0 if shards == 1 else 12.0) * sizes.averaged) / shards
        / cluster.memory_rate,
        exposed=_exposed(sizes, parallel, gpus, compute, part, cluster),
        launch_bound=min(work) < floor,
    )  # fmt: skip


def _launches(sizes: Sizes) -> float:
    """Kernels of a forward and backward: 60 a student block, 20 a teacher block, 150 for the rest; assumed."""
    return 80.0 * sizes.blocks + 150.0


def _exposed(sizes: Sizes, parallel: Parallel, gpus: int, compute: list[float], part: float, cluster: Cluster) -> float:
    """Seconds of communication that are not hidden: what exceeds the computing beside it, and what has none beside it
    (the last bucket of gradients; the first unit of weights)."""
    gradients = 4.0 * sizes.trained
    if parallel == "ddp":
        needed = all_reduce_seconds(gradients, gpus, cluster)
        last = needed * min(1.0, BUCKET / gradients)
        return max(last, needed - cluster.overlap * part * compute[-1])
    shards = shard_ranks(parallel, gpus, cluster)
    outside = sizes.averaged - sizes.averaged_blocks
    ahead = gather_seconds(4.0 * (sizes.trained + sizes.averaged), shards, 2 * sizes.blocks + 1, cluster)
    back = gather_seconds(4.0 * (sizes.trained + outside), shards, sizes.blocks + 1, cluster)
    first = gather_seconds(4.0 * (sizes.trained - sizes.trained_blocks + outside), shards, 1, cluster)
    reduced = gather_seconds(gradients, shards, sizes.blocks + 1, cluster)
    if shards < gpus:
        # Every adapter of a node carries its own GPU's shard.
        rate = cluster.network_rate * min(1.0, cluster.node / shards) * cluster.bandwidth
        copies = gpus // shards
        reduced += shards * all_reduce_bytes(gradients / shards, copies) / rate
        reduced += (sizes.blocks + 1) * 2.0 * math.log2(copies) * cluster.far
    total = 0.0
    for number, seconds in enumerate(compute):
        again = back + (reduced if number == len(compute) - 1 else 0.0)
        total += max(first, ahead - cluster.overlap * (1.0 - part) * seconds)
        total += max(0.0, again - cluster.overlap * part * seconds)
    return total


def memory_bytes(sizes: Sizes, parallel: Parallel, gpus: int, micro: int, forwards: int, cluster: Cluster) -> float:
    """Bytes of a GPU: weights, gradients, moments (16 a trained parameter), averages (4, and 2 for the working copy
    without sharding), casts, activations, what is gathered at a time, and the reserve."""
    shards = shard_ranks(parallel, gpus, cluster)
    static = 16.0 * sizes.trained + 4.0 * sizes.averaged
    activations = micro * sizes.activations * (1.0 + cluster.transient) + sizes.casts + cluster.reserve
    if parallel == "ddp":
        return static + 2.0 * sizes.averaged + activations
    outside = sizes.trained - sizes.trained_blocks + sizes.averaged - sizes.averaged_blocks
    gathered = 4.0 * (outside + 2.0 * sizes.trained_blocks / sizes.blocks)
    # Gradients that are not yet summed stay whole between micro-batches.
    whole = 4.0 * sizes.trained if forwards > 1 else 0.0
    return static / shards + gathered + whole + activations


def largest_micro(config: Config, parallel: Parallel, gpus: int, cluster: Cluster) -> int:
    """Most samples of a micro-batch that fit; 0: none."""
    sizes = count_sizes(config)
    rest = memory_bytes(sizes, parallel, gpus, 0, 2, cluster)
    return max(0, int((cluster.memory - rest) / (sizes.activations * (1.0 + cluster.transient))))


def efficiency(found: Estimate, cluster: Cluster) -> float:
    """Samples a second and GPU, over those of one GPU with the same batch and micro-batch."""
    alone = estimate(found.config, 1, "ddp", cluster)
    return found.samples_per_second / found.gpus / alone.samples_per_second


def calibrate(config: Config, gpus: int, parallel: Parallel, seconds: float, cluster: Cluster) -> Cluster:
    """The cluster with the share of the peak at which an update takes the `seconds` that were measured, the host's
    launches included. `ValueError` where it cannot take so few."""
    cluster = dataclasses.replace(cluster, launch=0.0)
    low, high = 1e-9, 1.0
    if seconds < (least := estimate(config, gpus, parallel, dataclasses.replace(cluster, mfu=high)).seconds):
        raise ValueError(f"measured: expected at least {least:.3g} s, an update at the GPU's peak, got {seconds:.3g}")
    for _ in range(60):
        middle = math.sqrt(low * high)
        found = estimate(config, gpus, parallel, dataclasses.replace(cluster, mfu=middle))
        low, high = (middle, high) if found.seconds > seconds else (low, middle)
    return dataclasses.replace(cluster, mfu=high)
