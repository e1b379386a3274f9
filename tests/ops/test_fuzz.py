"""Random calls of every operator (support/fuzz.py): no wrong value, crash, hang, wrong acceptance or bare refusal."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_kernels import _native

PROGRAM = Path(__file__).resolve().parents[1] / "support" / "fuzz.py"
ROOT = PROGRAM.parents[2]
SILENCE = 60.0
"""Seconds without a word after which a call hangs."""


def read_run(first: int, calls: int, seed: int) -> tuple[int, list[str]]:
    """Runs calls until one crashes or hangs: number of the next call, and what was found."""
    command = [sys.executable, str(PROGRAM), "--seed", str(seed), "--first", str(first), "--calls", str(calls)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert child.stdout is not None
    found, number, last, rest = [], first, "", b""
    with child, selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while ready.select(SILENCE):
            block = os.read(child.stdout.fileno(), 1 << 16)
            if not block:
                break
            *lines, rest = (rest + block).split(b"\n")
            for line in (raw.decode() for raw in lines):
                word, _, text = line.partition(" ")
                number = int(text) if word == "number" else number
                found += [text] if word == "finding" else []
                last = line
            if last == "end":
                return first + calls, found
        hung = not _ended(child)
        child.kill()
    return number + 1, [*found, f"{'hang' if hung else f'crash ({child.returncode})'}: number {number}, {last}"]


def _ended(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def findings(first: int, calls: int, seed: int) -> list[str]:
    """Of so many calls; the process is started anew after a crash or hang."""
    found: list[str] = []
    end = first + calls
    while first < end:
        first, new = read_run(first, end - first, seed)
        found += new
    return found


@pytest.mark.parametrize(
    "calls", [pytest.param(400, id="400"), pytest.param(20_000, id="20000", marks=pytest.mark.long)]
)
def test_random_calls(calls: int) -> None:
    if not _native.is_loaded(_native.CPU_LIBRARY):
        pytest.skip("the native library is not built")
    found = findings(0, calls, seed=1 if calls > 400 else 0)
    assert not found, f"{len(found)} findings:\n" + "\n".join(found[:50])
