"""The device of a process, named ranges for profilers, durations for people."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist

open_profilers = 0
"""Profilers that record at present; `Profiler` counts them."""
_NOTHING = contextlib.nullcontext()


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """Names what happens inside as d2v/`name` in a trace; does nothing while no `Profiler` is open.

    Off it costs the host about one microsecond, a range that is always on ten to twenty. Compiled code has none.
    """
    if torch.compiler.is_compiling() or not open_profilers:
        return _NOTHING
    return torch.profiler.record_function(f"d2v/{name}")


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def choose_device(device: str) -> torch.device:
    """`run.device` as a torch device of this process; `ValueError` where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected cuda to be available, got a PyTorch that sees no GPU")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = dist.get_node_local_rank(fallback_rank=0)
    if local >= torch.cuda.device_count():
        raise ValueError(f"run.device: expected a GPU for local rank {local}, got {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
