"""Memory over a long run."""

from __future__ import annotations

import time
from pathlib import Path

from soak.cases import RANDOM, make_data, options
from soak.jobs import has_reached, read_metrics, running, wait_until


def grow(folder: Path, *, steps: int = 2_000, limit: float = 8.0) -> dict[str, float]:
    """Resident memory of a trainer of tiny updates, with a checkpoint every 100 of them and one loader worker.

    Returns MiB at a quarter of the run and the largest later on. Raises `AssertionError` where memory grows by more
    than `limit` MiB in the last three quarters: 5 kB an update, less than a tensor of activations.
    """
    data, run = make_data("vision", folder / "data"), folder / "run"
    command = options("vision", data, run, steps, *RANDOM, "--data.workers", "1", every=100, small=True)
    with running(command, folder / "log") as job:
        wait_until(has_reached(run, steps // 4), job, f"update {steps // 4}", 600)
        pid = job.trainers()[0]
        early = largest = resident_mib(pid)
        while job.is_running() and (now := resident_mib(pid)):
            largest = max(largest, now)
            time.sleep(0.05)
        assert job.codes(60) == [0], job.tail()
    assert read_metrics(run)[-1]["step"] == steps
    assert largest - early <= limit, f"expected at most {limit} MiB more than {early:.1f}, got {largest - early:.1f}"
    return {"MiB at a quarter": early, "largest later": largest}


def resident_mib(pid: int) -> float:
    """Resident memory of a process in MiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
