"""What sharded models send: a backward pass gathers the weights that have one, and no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist
from soak.jobs import find_port
from support.ranks import run_ranks
from torch.profiler import ProfilerActivity, profile

from d2v import recipes
from d2v.model.data2vec import Data2Vec
from d2v.train.distributed import Ranks, parallelise

DEPTH = 3


def count_gathers(rank: int, port: int, folder: str) -> None:
    """On one of two ranks: writes the all-gathers of a forward and of a backward pass, for two passes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    base = recipes.get("vision-tiny")
    config = dataclasses.replace(
        base,
        encoder=dataclasses.replace(base.encoder, width=16, heads=2, depth=DEPTH, prenet_depth=0),
        decoder=dataclasses.replace(base.decoder, layers=1, width=16, groups=2),
        mask=dataclasses.replace(base.mask, copies=2),
        target=dataclasses.replace(base.target, top_k=2),
        run=dataclasses.replace(base.run, parallel="fsdp"),
    )
    torch.manual_seed(0)
    model = Data2Vec(config)
    teacher = model.teacher.get_submodule("blocks.blocks")
    blocks = [*model.blocks.blocks, *teacher.children()]
    network = parallelise(model, blocks, config.run, Ranks(torch.device("cpu"), rank, 2, dist.group.WORLD))
    images = torch.randn(2, 3, config.stem.image_size, config.stem.image_size)
    counts = []
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as forward:
            loss = network(images).loss
        with profile(activities=[ProfilerActivity.CPU]) as backward:
            loss.backward()
        counts += [gathers(forward), gathers(backward)]
    Path(folder, str(rank)).write_text(" ".join(map(str, counts)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def gathers(trace: profile) -> int:
    """All-gathers in a trace; their ranges carry the module's name in brackets."""
    ranges = ("FSDP::all_gather", "FSDP::all_gather (")
    return sum(e.count for e in trace.key_averages() if e.key == ranges[0] or e.key.startswith(ranges[1]))


def test_a_backward_pass_gathers_no_block_of_the_teacher(tmp_path: Path) -> None:
    run_ranks(count_gathers, 2, find_port(), str(tmp_path))
    for rank in range(2):
        counts = [int(word) for word in (tmp_path / str(rank)).read_text(encoding="utf-8").split()]
        # Blocks of student and teacher and the rest forwards; those of the student and the rest backwards.
        assert counts == 2 * [2 * DEPTH + 1, DEPTH + 1]
