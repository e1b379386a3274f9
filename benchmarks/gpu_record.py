"""What a GPU run was made on, and the file of its records."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from d2v_kernels import _native

from .machine import ROOT, machine_basics

_QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
          "temperature.gpu", "compute_cap", "memory.total")  # fmt: skip
_SOURCES = ("d2v_kernels", "csrc", "benchmarks", "tests/gpu", "CMakeLists.txt", "setup.py")
_SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".txt")


def gpu_state() -> dict[str, str]:
    """Name, driver, clocks and limits as nvidia-smi has them now; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = run.stdout.strip().splitlines()
    if run.returncode != 0 or not lines:
        return {}
    return dict(zip(_QUERY, (value.strip() for value in lines[0].split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_machine(emulated: bool) -> dict[str, Any]:
    """GPU, driver, clocks, versions, build record, commit and date; stored with every record."""
    properties: dict[str, Any] = {}
    if not emulated and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        properties = {"name": p.name, "multiprocessors": p.multi_processor_count, "l2_cache_bytes": p.L2_cache_size,
                      "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}  # fmt: skip
    return {
        **machine_basics(),
        "gpu": properties.get("name"),
        "gpu_properties": properties,
        "gpu_state": {} if emulated else gpu_state(),
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton") or _version("pytorch-triton"),
        "xformers": _version("xformers"),
        "build": _native.build_record(),
        "sources": source_hash(),
    }


def source_hash(more: tuple[str, ...] = ()) -> str:
    """What was measured, where there is no commit to name it: a digest of the sources' bytes, `more` paths too."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *more):
        place = ROOT / name
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in _SUFFIXES)
        for path in files:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_key(emulated: bool) -> str:
    """Records with another key belong to other sources, another GPU or another torch: they do not count as done."""
    gpu = "emulated" if emulated else torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return hashlib.sha256(f"{source_hash()} {gpu} {torch.__version__}".encode()).hexdigest()[:16]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def keep_records(path: Path, key: str) -> list[dict[str, Any]]:
    """Drops the records of other runs from the file, in one step; returns those that stay."""
    kept = [r for r in read_records(path) if r.get("key") == key]
    fresh = path.with_suffix(".part")
    fresh.write_text("".join(json.dumps(r) + "\n" for r in kept))
    fresh.replace(path)
    return kept
