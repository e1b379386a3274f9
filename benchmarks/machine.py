"""What a measurement was made on: stored with every result."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v_kernels import info

ROOT = Path(__file__).resolve().parents[1]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return run.stdout.strip() or "unknown"


def _last_level_cache() -> int | None:
    try:
        return int(os.sysconf("SC_LEVEL3_CACHE_SIZE")) or None
    except (ValueError, OSError):
        return None


def machine_basics() -> dict[str, Any]:
    """CPU, system, versions, commit and date: what a record of any device has."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def machine_record() -> dict[str, Any]:
    """CPU, caches, versions, ISA level of the native library, commit and date."""
    report = info.collect()
    return {
        **machine_basics(),
        "last_level_cache_bytes": _last_level_cache(),
        "isa": report["build"].get("isa", "none"),
        "gpu": report["gpu"],
    }
