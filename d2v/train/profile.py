"""Named ranges for profilers, and `--profile`: a trace of a few updates of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from d2v import runtime

RANGES = ("data", "student", "decoder", "teacher", "loss", "backward", "optimiser", "ema")
"""What `span` is called with by the model and the training loop, as d2v/NAME in a trace. The operators of d2v_kernels
stand in it under their own names, d2v::NAME."""
WARM_UP = 2
"""Updates before the trace begins: the first ones load kernels and fill caches."""
TABLE_ROWS = 40


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
        self.written: Path | None = None
        self._profiler: Any = None
        self._steps = 0

    def __enter__(self) -> Profiler:
        if self.updates:
            self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def step(self) -> None:
        """An update is done; after the last of the recorded ones the trace is written."""
        if self._profiler is None:
            return
        self._steps += 1
        self._profiler.step()
        if self._steps >= WARM_UP + self.updates:
            self._close()

    def _open(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        schedule = torch.profiler.schedule(wait=0, warmup=WARM_UP, active=self.updates, repeat=1)
        self._profiler = torch.profiler.profile(activities=activities, schedule=schedule)
        self._profiler.__enter__()
        runtime.open_profilers += 1

    def _close(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        runtime.open_profilers -= 1
        profiler.__exit__(None, None, None)
        if self._steps <= WARM_UP:  # nothing was recorded
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        averages = profiler.key_averages()
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self.folder / "table.txt").write_text(averages.table(sort_by=order, row_limit=TABLE_ROWS), encoding="utf-8")
        # Under another name until it is whole.
        partial = self.folder / ".partial-trace.json.gz"
        profiler.export_chrome_trace(str(partial))
        self.written = partial.replace(self.folder / "trace.json.gz")


def memory_bytes(device: torch.device) -> int:
    """Peak bytes that tensors took on a GPU; on a CPU the resident memory of this process as it is now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process; its peak where the system does not tell the present one."""
    import resource
    import sys

    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
