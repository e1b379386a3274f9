"""Gradients reduced in bfloat16: sums in float32, the same bits on all ranks and again, near those of float32."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
from soak.cases import NO_DROPOUT, make_data, options
from soak.equality import rewind
from soak.jobs import assert_same_weights, find_port, largest_difference, losses, rank_environment
from soak.ranks import run_all
from support.ranks import run_ranks

from d2v.train.ranks.reduction import RoundedReduce

RANKS = 3
MANTISSA = 2.0**-8
"""Half of bfloat16's distance between numbers, relative."""


def gradients_of(rank: int, count: int) -> torch.Tensor:
    """Numbers of very different sizes, most of which cancel."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, generator=generator) * torch.logspace(-6, 2, count)


def reduce_buckets(rank: int, port: int, folder: str) -> None:
    """On one rank: means of many buckets that are on their way at the same time."""
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, RANKS, port)
    dist.init_process_group("gloo")
    reduce = RoundedReduce(torch.device("cpu"), datetime.timedelta(seconds=60))
    buckets = [gradients_of(rank, count) for count in 3 * [1, 2, 3, 1000, 1001, 70_000]]
    if rank == 1:
        buckets[-1][5] = torch.nan
    futures = [reduce(bucket) for bucket in buckets]
    found = [future.wait() for future in futures]
    assert all(f is b or f.data_ptr() == b.data_ptr() for f, b in zip(found, buckets, strict=True))
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def test_means_are_those_of_float32_but_for_two_roundings(tmp_path: Path) -> None:
    run_ranks(reduce_buckets, RANKS, find_port(), str(tmp_path))
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for other in others:
        assert all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(first, other, strict=True))
    assert first[-1].isnan().nonzero().tolist() == [[5]]
    for got in first[:-1]:
        own = torch.stack([gradients_of(rank, len(got)) for rank in range(RANKS)]).double()
        exact = own.mean(0)
        # One rounding of each summand, one of the mean; float32 sums besides. Sums in bfloat16 would err more.
        limit = MANTISSA * (own.abs().mean(0) + exact.abs()) * (1 + 2 * MANTISSA)
        assert bool(((got.double() - exact).abs() <= limit).all())


def test_runs(tmp_path: Path) -> None:
    """DDP and FSDP on two ranks: near float32, with the same bits again, with digests, and when taken up again."""
    data, steps = make_data("vision", tmp_path / "data"), 6
    more = ["--data.micro-batch", "2", *NO_DROPOUT, "--optim.clip", "1", "--run.keep-checkpoints", "9"]

    def command(name: str, *extra: str) -> list[str]:
        return options("vision", data, tmp_path / name, steps, *more, *extra, every=3, small=True)

    bf16, fsdp = ["--run.reduce-precision", "bf16"], ["--run.parallel", "fsdp"]
    runs = {
        "fp32": [], "ddp": bf16, "ddp-again": [*bf16, "--run.digest-every", "1"], "ddp-resumed": bf16,
        "fsdp": [*bf16, *fsdp], "fsdp-resumed": [*bf16, *fsdp],
    }  # fmt: skip
    first = [n for n in runs if "resumed" not in n]
    run_all([command(n, *runs[n]) for n in first], 2, tmp_path / "logs")
    for name in ("ddp", "fsdp"):
        rewind(tmp_path / name, tmp_path / f"{name}-resumed", 3)
    run_all([command(n, *runs[n]) for n in runs if "resumed" in n], 2, tmp_path / "logs-resumed")
    for name in ("ddp", "fsdp"):
        assert 0.0 < largest_difference(losses(tmp_path / name), losses(tmp_path / "fp32")) < 1e-3
        assert_same_weights(tmp_path / f"{name}-resumed", tmp_path / name)
    assert_same_weights(tmp_path / "ddp-again", tmp_path / "ddp")
    assert len({line.split('"gradients"')[1] for line in (tmp_path / "ddp-again" / "digests.jsonl").open()}) == steps


def test_a_resumed_run_keeps_its_precision() -> None:
    from d2v.train.run_dir import FREE_FIELDS

    assert "run.reduce_precision" not in FREE_FIELDS
