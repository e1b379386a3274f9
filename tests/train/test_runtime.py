"""Memory of a process that trains."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2v.runtime import keep_freed_pages, prepare_process

COUNT_FAULTS = """
import resource, sys, torch
from d2v.runtime import prepare_process

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

prepare_process(1, sys.argv[1] == "keep", "auto")
sizes = (24 << 20, 40 << 20, 32 << 20)
counts = []
for _ in range(5):  # the heap may still grow at first, round small blocks that lie in the way
    before = faults()
    for size in sizes * 2:
        torch.ones(size, dtype=torch.uint8)
    counts.append(faults() - before)
print(min(counts[1:]))
"""


def count_faults(how: str) -> int:
    """Fewest page faults of six large tensors after others of the same sizes, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_pages_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    kept, left = count_faults("keep"), count_faults("leave")
    assert left > 100  # with huge pages a fault may bring 2 MiB
    assert kept < left / 10


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def load(name: str | None) -> Any:
        if error is AttributeError:
            return SimpleNamespace()
        raise error("no C library by this name")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not keep_freed_pages()
    threads = torch.get_num_threads()
    prepare_process(threads, True, "auto")
    assert torch.get_num_threads() == threads
