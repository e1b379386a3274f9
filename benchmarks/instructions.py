"""Instruction counts of host paths under callgrind: the same number on every run of one build.

`python -m benchmarks.instructions [--update]` compares with benchmarks/results/instructions.json (5 % allowed).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess

from .machine import ROOT

STORED = ROOT / "benchmarks" / "results" / "instructions.json"
PATHS = ("images", "speech 1.0", "speech 2.0")
REPEATS = 20
ALLOWED = 1.05


def build() -> str:
    """Compiles the driver for baseline x86-64, as valgrind does not know AVX-512."""
    target = ROOT / "build" / "host_paths"
    target.parent.mkdir(exist_ok=True)
    sources = [str(ROOT / "benchmarks/host_paths.cpp"), str(ROOT / "csrc/core/masks.cpp")]
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


def measure() -> dict[str, int]:
    """Instructions per batch of each path, start-up subtracted."""
    binary = build()
    return {name: (count(binary, name, REPEATS) - count(binary, name, 0)) // REPEATS for name in PATHS}


def main() -> None:
    """Exit code 1 when a path needs more than 5 % more instructions than stored."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="store the counts of this build")
    options = parser.parse_args()
    if shutil.which("valgrind") is None or shutil.which("g++") is None:
        print("instruction counts: skipped, valgrind or g++ is not installed")
        return
    counts = measure()
    stored = json.loads(STORED.read_text()) if STORED.exists() and not options.update else counts
    for name, value in counts.items():
        print(f"{name:<12} {value:>12,} instructions per batch, stored {stored[name]:,}")
    if options.update:
        STORED.write_text(json.dumps(counts, indent=1) + "\n")
    if any(value > ALLOWED * stored[name] for name, value in counts.items()):
        raise SystemExit("a host path needs over 5 % more instructions than stored; --update if that is meant")


if __name__ == "__main__":
    main()
