"""Host overhead with pytest-benchmark: `python -m pytest benchmarks/host.py --benchmark-columns=min,median`.

Inputs are tiny, so that a call costs its dispatch. As a program, `python -m benchmarks.host [--update]`, it counts the
instructions of host paths under callgrind, the same number on every run of one build, and compares them with
benchmarks/results/instructions.json (5 % allowed).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

import d2v_kernels as dk
from benchmarks.harness.record import RESULTS, ROOT, parse
from d2v_kernels.bench.case import FAMILIES, Place

PATHS = ("images", "speech 1.0", "speech 2.0")
REPEATS = 20
ALLOWED = 1.05


def ema(tensors: int, by_plan: bool) -> Callable[[], Any]:
    averages, sources = [torch.zeros(8) for _ in range(tensors)], [torch.ones(8) for _ in range(tensors)]
    plan = dk.EmaPlan(averages, sources)
    return lambda: plan.step(0.9) if by_plan else dk.update_ema_(averages, sources, 0.9)


def masks(rows: int, copies: int) -> Callable[[], Any]:
    sampler = dk.MaskSampler("block", grid=(14, 14), ratio=0.8, adjust=0.07, span=3, inverse=True)
    ids = torch.arange(rows)
    return lambda: sampler.draw(ids, 0, copies=copies)


def calls() -> dict[str, Callable[[], Any]]:
    """Tiny calls of public functions, by name."""
    place, cases = Place(torch.device("cpu")), (family.tiny_case() for family in FAMILIES.values())
    return {
        **{case.op: case.make(place, 0)["d2v"] for case in cases},
        **{f"update_ema-{way}-{n}": ema(n, way == "plan") for way in ("list", "plan") for n in (1, 400)},
        **{f"mask_sampler-{n}-{n}": masks(n, n) for n in (16, 1)},
    }


@pytest.mark.parametrize("name", list(calls()))
def test_host(benchmark, name: str) -> None:
    torch.set_num_threads(1)
    benchmark(calls()[name])


# ---- instructions


def build() -> str:
    """Compiles the driver for baseline x86-64, as valgrind does not know AVX-512."""
    target = ROOT / "build" / "host_paths"
    target.parent.mkdir(exist_ok=True)
    sources = [str(ROOT / "benchmarks/harness/host_paths.cpp"), str(ROOT / "csrc/core/masks.cpp")]
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", f"-I{ROOT / 'csrc/core'}"]
    subprocess.run(["g++", *flags, *sources, "-o", str(target)], check=True)
    return str(target)


def count(binary: str, name: str, repeats: int) -> int:
    """Instructions of the whole program."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", binary, name, str(repeats)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if found is None:
        raise SystemExit(f"callgrind printed no count:\n{run.stderr}")
    return int(found[1])


def main() -> None:
    """Exit code 1 when a path needs more than 5 % more instructions than stored."""
    options = parse("host", __doc__, None, native=False, update=(False, "store the counts of this build"))
    if shutil.which("valgrind") is None or shutil.which("g++") is None:
        print("instruction counts: skipped, valgrind or g++ is not installed")
        return
    file, binary = RESULTS / "instructions.json", build()
    # Per batch of each path, start-up subtracted.
    counts = {name: (count(binary, name, REPEATS) - count(binary, name, 0)) // REPEATS for name in PATHS}
    stored = json.loads(file.read_text()) if file.exists() and not options.update else counts
    for name, value in counts.items():
        print(f"{name:<12} {value:>12,} instructions per batch, stored {stored[name]:,}")
    if options.update:
        file.write_text(json.dumps(counts, indent=1) + "\n")
    if any(value > ALLOWED * stored[name] for name, value in counts.items()):
        raise SystemExit("a host path needs over 5 % more instructions than stored; --update if that is meant")


if __name__ == "__main__":
    main()
