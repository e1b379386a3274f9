"""The device and the memory of a process, how far long work is; named ranges for profilers, and `--profile`: a trace of
a few updates of a run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from d2v_kernels import choose_products

INTERVAL = 5.0
"""Seconds between two lines about long work."""


@functools.cache
def find_decoders() -> dict[str, str]:
    """Versions of the installed packages that decide the bits of samples: Pillow 13 resizes otherwise than 12."""
    found = {}
    for name in ("av", "pillow", "scipy", "simplejpeg", "soundfile"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """What draws random numbers in here, of Python, NumPy or torch on the host and on `device`, changes none of those
    drawn later."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Reporter:
    """Says on standard error, every few seconds, how far work is; nothing about quick work."""

    def __init__(self, what: str, total: float, unit: str) -> None:
        """As in "tokenising: 3 of 20 MB"."""
        self.what, self.total, self.unit = what, total, unit
        self.start = self.said = time.monotonic()
        self.done = 0.0
        self._lock = threading.Lock()

    def add(self, done: float = 1) -> None:
        """Counts more work as done, by any thread."""
        with self._lock:
            self.show(self.done + done)

    def show(self, done: float) -> None:
        """Says how much is done, unless it just did."""
        self.done, now = done, time.monotonic()
        if now - self.said >= INTERVAL:
            self.said = now
            rate = done / (now - self.start)
            left = format_seconds((self.total - done) / rate) if rate else "?"
            self._print(f"{done:,.0f} of {self.total:,.0f} {self.unit}, {rate:,.1f} {self.unit}/s, {left} left")

    def finish(self) -> None:
        """Says how long it took, where anything was said before."""
        if self.said != self.start:
            seconds = time.monotonic() - self.start
            rate = self.done / max(seconds, 1e-9)
            self._print(f"{self.done:,.0f} {self.unit} in {format_seconds(seconds)}, {rate:,.1f} {self.unit}/s")

    def _print(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)


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


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def prepare_process(threads: int | None, keep_pages: bool, products: str) -> None:
    """Threads, memory and products of a process that trains: `run.threads`, `run.keep_pages` and `run.products`."""
    if threads is not None:
        torch.set_num_threads(threads)
    if keep_pages:
        keep_freed_pages()
    choose_products(products)


def keep_freed_pages() -> bool:
    """Has malloc keep what is freed: large tensors come from the heap, and the heap does not shrink.

    By default glibc gives a large tensor back to the system as soon as it is freed, and the next one costs a page fault
    for every 4 KiB of it. Returns whether this malloc knows the two settings; another one is left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; no C library by this name
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def memory_bytes(device: torch.device) -> int:
    """Peak bytes that tensors took on a GPU; on a CPU the resident memory of this process as it is now."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process; its peak where the system does not tell the present one."""
    import resource
    import sys

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- named ranges and traces ------------------------------------------------------------------------------------

RANGES = ("data", "student", "decoder", "teacher", "loss", "backward", "optimiser", "ema")
"""What `span` is called with by the model and the training loop, as d2v/NAME in a trace. The operators of d2v_kernels
are in it under their own names, d2v::NAME."""
WARM_UP = 2
"""Updates before the trace begins: the first ones load kernels and fill caches."""
TABLE_ROWS = 40
_NOTHING = contextlib.nullcontext()
_open_profilers = 0


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """Names what happens inside as d2v/`name` in a trace; does nothing while no `Profiler` is open.

    Off it costs the host about one microsecond, a range that is always on ten to twenty. Compiled code has none.
    """
    if torch.compiler.is_compiling() or not _open_profilers:
        return _NOTHING
    return torch.profiler.record_function(f"d2v/{name}")


class Profiler:
    """Records `updates` updates of a training loop with torch.profiler, after `WARM_UP` others.

    Writes into `folder`: trace.json.gz for chrome://tracing or ui.perfetto.dev, and table.txt, operators and named
    ranges by time. The run goes on afterwards. A run that ends earlier leaves what there is.

        with Profiler(folder / "profile", updates=5) as profiler:
            for batches in updates:
                ...
                profiler.step()
    """

    def __init__(self, folder: Path, updates: int) -> None:
        """updates: 0 records nothing and costs nothing. `ValueError`, beginning with the option, below 0."""
        if updates < 0:
            raise ValueError(f"profile: expected 0 updates or more, got {updates}")
        self.folder, self.updates = folder, updates
        self._profiler: Any = None
        self._steps = 0

    def __enter__(self) -> Profiler:
        global _open_profilers
        if self.updates:
            kinds = torch.profiler.ProfilerActivity
            activities = [kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])]
            schedule = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=self.updates, repeat=1)
            self._profiler = torch.profiler.profile(activities=activities, schedule=schedule).__enter__()
            _open_profilers += 1
        return self

    def step(self) -> None:
        """An update is done; after the last of the recorded ones the trace is written."""
        if self._profiler is None:
            return
        self._steps += 1
        self._profiler.step()
        if self._steps >= WARM_UP + self.updates:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        global _open_profilers
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        _open_profilers -= 1
        profiler.__exit__(None, None, None)
        if self._steps <= WARM_UP:  # nothing was recorded
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
        (self.folder / "table.txt").write_text(table, encoding="utf-8")
        # Under another name until it is whole.
        partial = self.folder / ".partial-trace.json.gz"
        profiler.export_chrome_trace(str(partial))
        partial.replace(self.folder / "trace.json.gz")
