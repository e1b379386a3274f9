"""What 8 to 512 GPUs should give, by arithmetic.

Every figure is an estimate from the assumptions of `Cluster`; nothing here was measured on a GPU. Work comes from
`d2v.train.flops`, parameters and kept activations from the recipe's own model, whose forward runs on tensors without
memory. docs/scaling.md explains the formulas and says what breaks first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2v import recipes
from d2v.config import Config
from d2v.model import layers
from d2v.model.data2vec import Data2Vec
from d2v.model.masking import make_mask_sampler
from d2v.model.transformer import Block
from d2v.train.flops import count_flops, find_peak
from d2v_kernels import Masks

from ..training.cases import StepCase, make_config, make_inputs, shape_of

Parallel = Literal["ddp", "fsdp", "hybrid"]
LENGTHS = {"vision": 0.0, "speech": 20.0, "text": 512.0}
"""Of a sample: seconds of audio (the published longest crop), tokens."""
BUCKET = 25 << 20
"""Bytes of gradients that DistributedDataParallel exchanges at a time."""


@dataclass(frozen=True)
class Cluster:
    """Assumptions; none of them was measured here."""

    peak: float = find_peak("H100") or 0.0
    """FLOP/s of a GPU, dense bfloat16, as quoted in d2v.train.flops."""
    mfu: float = 0.4
    """Share of the peak that a large enough micro-batch reaches."""
    memory: float = 80e9
    """Bytes of a GPU."""
    memory_rate: float = 0.8 * 3.35e12
    """Bytes a second that optimiser and average move: 80 % of the quoted 3.35 TB/s."""
    node: int = 8
    """GPUs of a node."""
    nvlink: float = 450e9
    """Bytes a second and direction of a GPU inside a node."""
    network: float = 3200.0
    """Gbit/s and direction of a node: eight adapters of 400."""
    bandwidth: float = 0.7
    """Share of either rate that a collective reaches."""
    overlap: float = 0.9
    """Share of the computing time under which communication can hide."""
    near: float = 1e-6
    """Seconds of a hop inside a node."""
    far: float = 5e-6
    """Seconds of a hop between nodes."""
    launch: float = 5e-6
    """Seconds of the host for a kernel, without CUDA graphs."""
    reserve: float = 2e9
    """Bytes of a GPU for CUDA, NCCL and the allocator."""
    transient: float = 0.15
    """Short-lived tensors, as a share of the kept activations."""

    @property
    def network_rate(self) -> float:
        """Bytes a second and direction of a node."""
        return self.network / 8.0 * 1e9


@dataclass(frozen=True)
class Sizes:
    """What a recipe's model counts."""

    config: Config
    trained: int
    """Parameters with a gradient."""
    averaged: int
    """Parameters of the teacher."""
    trained_blocks: int
    """Of the trained ones, those in transformer blocks, the units of sharding."""
    averaged_blocks: int
    blocks: int
    """Transformer blocks of the student; the teacher has as many."""
    activations: float
    """Bytes of a sample that a forward keeps, bfloat16 autocast."""
    casts: float
    """Bytes of the lower-precision copies of weights that a forward keeps, whatever the samples."""
    forward: float
    """FLOPs of a sample: student and teacher forward."""
    backward: float
    """FLOPs of a sample: backward of student and decoder."""


@functools.cache
def count_sizes(recipe: str) -> Sizes:
    """Counts a recipe's parameters, activations and work; no weight is allocated."""
    config = recipes.get(recipe)
    case = StepCase(recipe, 2, LENGTHS[config.stem.modality])
    (one, masks), (two, _), model = (*(_kept_bytes(case, samples) for samples in (1, 2)), _meta_model(config))
    shape = shape_of(config, masks, 1, make_inputs(dataclasses.replace(case, samples=1), config, 0).shape[-1])
    total = count_flops(config, shape)
    # Student, positions and decoder are what grows with the copies; the stem's backward is counted with the forward.
    student = total - count_flops(config, shape._replace(copies=0, masked=0))
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    inside = [p for b in blocks for p in b.parameters()]
    return Sizes(
        config=config,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        averaged=sum(p.numel() for p in model.teacher.parameters()),
        trained_blocks=sum(p.numel() for p in inside if p.requires_grad),
        averaged_blocks=sum(p.numel() for p in inside if not p.requires_grad),
        blocks=config.encoder.prenet_depth + config.encoder.depth,
        activations=float(two - one),
        casts=float(2 * one - two),
        forward=total - student * 2.0 / 3.0,
        backward=student * 2.0 / 3.0,
    )


def _meta_model(config: Config) -> Data2Vec:
    with torch.device("meta"):
        return Data2Vec(config)


def _kept_bytes(case: StepCase, samples: int) -> tuple[int, Masks]:
    """Bytes that a forward under bfloat16 autocast keeps for its backward pass, weights not counted; and its masks."""
    case = dataclasses.replace(case, samples=samples)
    # Float32 as the run's precision: the teacher's working copies, which keep no activation, are not made.
    config = make_config(case, "fp32")
    inputs, masks, measured = draw_batch(case, config)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with on_paper():
        model = Data2Vec(config).train()
        object.__setattr__(model.stem, "measure", lambda *_: measured)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks, forms_of_gpus():
            out = model(inputs, masks=masks)
        own = _pieces([*model.parameters(), *model.buffers()])
        found = _pieces(kept)
    del out
    return sum(size for piece, size in found.items() if piece not in own), masks


class _Paper(FakeTensorMode):
    """A deep copy of a module copies the mode of its tensors, and with it weak references to memory: numbers that
    PyTorch takes along as they are and then frees once for every copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Paper:
        return self


@contextlib.contextmanager
def on_paper() -> Iterator[None]:
    """Tensors without memory."""
    with (
        mock.patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight),  # it reads what it has drawn
        _Paper(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # copying parameters asks for their addresses
        yield


def draw_batch(case: StepCase, config: Config) -> tuple[Tensor, Masks, Any]:
    """Inputs, masks, and what the stem measures of the inputs: its checks read them, so they run before there are
    tensors without memory."""
    inputs = make_inputs(case, config, 0)
    measured = _meta_model(config).stem.measure(inputs, None)
    tokens = None if config.stem.modality == "vision" else measured[0]
    masks = make_mask_sampler(config, tokens=tokens).draw(list(range(case.samples)), 0, copies=config.mask.copies)
    return inputs, masks, measured


@contextlib.contextmanager
def forms_of_gpus() -> Iterator[None]:
    """Meanwhile convolutions and norms take the forms that they have on GPUs, which keep more than those of CPUs."""
    with (
        mock.patch.object(layers, "_suits_products", return_value=False),
        mock.patch.object(layers, "_keeps_layout", return_value=True),
        mock.patch.object(layers.LayerNorm, "forward", torch.nn.LayerNorm.forward),
    ):
        yield


def _pieces(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every piece of memory, once."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


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

    recipe: str
    parallel: Parallel
    gpus: int
    batch: int
    kappa: float
    """Batch over the recipe's: above 1 only where there are more GPUs than samples, a sample each."""
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
    def hours(self) -> float:
        """For the samples of the published number of updates."""
        return recipes.get(self.recipe).run.steps / self.kappa * self.seconds / 3600.0


def estimate(recipe: str, gpus: int, parallel: Parallel, cluster: Cluster) -> Estimate:
    """Time and memory of an update; the rank with most samples decides."""
    sizes = count_sizes(recipe)
    data = sizes.config.data
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
        recipe=recipe, parallel=parallel, gpus=gpus, batch=batch, kappa=batch / data.global_batch,
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


def largest_micro(recipe: str, parallel: Parallel, gpus: int, cluster: Cluster) -> int:
    """Most samples of a micro-batch that fit; 0: none."""
    sizes = count_sizes(recipe)
    rest = memory_bytes(sizes, parallel, gpus, 0, 2, cluster)
    return max(0, int((cluster.memory - rest) / (sizes.activations * (1.0 + cluster.transient))))


def efficiency(found: Estimate, cluster: Cluster) -> float:
    """Samples a second and GPU, over those of one GPU with the recipe's batch and micro-batch."""
    alone = estimate(found.recipe, 1, "ddp", cluster)
    return found.samples_per_second / found.gpus / alone.samples_per_second


def sample_of(config: Config) -> tuple[str, float]:
    """What is counted a second, and how many of it a sample has."""
    kinds: dict[str, tuple[str, float]] = {
        "vision": ("images", 1.0), "speech": ("s of audio", LENGTHS["speech"]), "text": ("tokens", LENGTHS["text"]),
    }  # fmt: skip
    return kinds[config.stem.modality]
