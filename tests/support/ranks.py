"""Ranks of a test as processes that start fast: forks of one that has imported what ranks import.

A fresh interpreter spends about seven seconds of a core on that, which is longer than most of these tests take.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch.multiprocessing as processes
from soak.jobs import find_port, rank_environment

from d2v.cli import main

IMPORTED = [
    "d2v.evaluate.watch", "d2v.options", "d2v.train.pretraining", "torch._dynamo", "torch.utils.tensorboard", "tyro",
]  # fmt: skip


def start_ranks(function: Callable[..., None], ranks: int, *arguments: Any) -> processes.ProcessContext:
    """`function(rank, *arguments)` in `ranks` processes, which are not waited for.

    Environment variables are those of the first call in this process: what a rank needs it must set itself.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    return processes.start_processes(function, arguments, nprocs=ranks, join=False, start_method="forkserver")


def run_ranks(function: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """The same to their end; raises what `torch.multiprocessing.spawn` does."""
    context = start_ranks(function, ranks, *arguments)
    while not context.join():
        pass


def run_d2v(options: Sequence[str], ranks: int) -> None:
    """`d2v *options` on `ranks` ranks without a launcher; raises where one of them ends with an error."""
    run_ranks(_run_rank, ranks, ranks, find_port(), options)


def _run_rank(rank: int, ranks: int, port: int, options: Sequence[str]) -> None:
    os.environ |= rank_environment(rank, ranks, port)
    assert main(options) == 0
