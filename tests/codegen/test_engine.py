"""The engine that runs CUDA sources on the CPU: right kernels pass in silence, planted defects are reported.

And the kernels themselves on it, under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from codegen.toolchain import KERNEL_TESTS

# Fibers that an error abandoned keep what they held.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "", "UBSAN_OPTIONS": ""}

# defect: sanitizer, what the report must say
REPORTED = {
    "read-past-the-end": ("address", "heap-buffer-overflow engine_test.cpp:{copy_rows}"),
    "shared-index-too-large": ("address", "index 32 out of bounds for type 'float [32]'"),
    "misaligned-vector": ("address", "misaligned address"),
    "barrier-missing-after-write": ("thread", "data race engine_test.cpp:{sum_twice}"),
    "barrier-missing-before-reuse": ("thread", "data race engine_test.cpp:{sum_twice}"),
    "addition-not-atomic": ("thread", "data race engine_test.cpp:{sum_columns}"),
    "buffer-of-another-overwritten-too-early": ("thread", "data race"),
    "fence-missing": ("thread", "data race engine_test.cpp:{sum_by_last_block}"),
    "bulk-not-waited-for": ("thread", "data race engine_bulk.h:{double_tiles}"),
    "cluster-barrier-missing": ("thread", "data race engine_bulk.h:{sum_cluster}"),
}
# defect: what the engine itself must say
REFUSED = {
    "barrier-in-both-branches": "divergent barrier: thread (32,0,0) in __syncthreads at engine_test.cpp:",
    "barrier-not-reached": "divergent barrier: a thread has returned while others wait at engine_test.cpp:",
    "lane-gone": "cannot go on: 1 of 32 threads have returned",
    "lane-outside-mask": "reads a lane that the mask leaves out",
    "shuffle-at-two-places": "divergent warp collective: thread (16,0,0) in __shfl_xor_sync",
    "half-a-warp": "cannot go on: 0 of 16 threads have returned",
    "too-much-shared": "more shared memory than a block has",
    "shared-not-asked-for": "invalid launch: 49152 bytes of dynamic and 1024 of static shared memory",
    "too-many-threads": "invalid launch: a grid of (1,1,1) blocks of 1025 threads",
    "copy-misaligned": "misaligned asynchronous copy",
    "grid-too-high": "invalid launch: a grid of (1,65536,1) blocks",
    "bulk-not-initialised": "expect_bytes at engine_bulk.h:",
    "bulk-too-few-bytes": "a phase ends with 1 tiles on the way: fewer bytes were expected than copied",
    "bulk-not-all-bytes": "more bytes arrive than were expected",
    "bulk-too-many-bytes": "cannot go on: 0 of 64 threads have returned\n  waits: thread (0,0,0) in wait_bytes at",
    "bulk-overwritten-too-early": "waits: thread (1,0,0) in wait_bytes at engine_bulk.h:",
    "bulk-misaligned": "misaligned bulk copy at engine_bulk.h:",
    "cluster-block-gone": "block 0 has ended",
    "cluster-block-unknown": "load_peer at engine_bulk.h:",
    "cluster-not-launched": "the launch has no clusters",
    "cluster-does-not-divide": "in clusters of 2",
}


def start(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *arguments]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 300}
    done = subprocess.run(command, check=False, **options)
    if "unexpected memory mapping" in done.stderr:
        # Older ThreadSanitizers cannot live with the address randomisation of newer kernels.
        done = subprocess.run(["setarch", "-R", *command], check=False, **options)
    return done


@pytest.mark.parametrize("sanitizer", ["plain", "portable-switch", "address", "thread"])
def test_right_kernels_pass(builds, sanitizer: str) -> None:
    done = start(builds[f"engine_test-{sanitizer}"])
    assert done.stdout == "all right\n", done.stdout + done.stderr
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("defect", REPORTED)
def test_sanitizer_reports(builds, defect: str) -> None:
    sanitizer, message = REPORTED[defect]
    done = start(builds[f"engine_test-{sanitizer}"], defect)
    assert done.returncode != 0, "nothing was reported"
    if "{" not in message:
        assert message in done.stderr
        return
    what, _, rest = message.partition("}")[0].rpartition(" ")
    file, _, kernel = rest.partition(":{")
    summaries = [line for line in done.stderr.splitlines() if line.startswith("SUMMARY:")]
    assert summaries, done.stderr
    assert all(what in s and file in s and s.endswith(f"in {kernel}") for s in summaries), summaries


@pytest.mark.parametrize("build", ["plain", "portable-switch", "address"])
@pytest.mark.parametrize("defect", REFUSED)
def test_engine_refuses(builds, defect: str, build: str) -> None:
    done = start(builds[f"engine_test-{build}"], defect)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("engine: "), done.stdout
    assert REFUSED[defect] in done.stdout


def test_a_missing_barrier_changes_the_result(builds) -> None:
    """Shared memory begins as NaN, so what nobody wrote shows without any sanitizer."""
    done = start(builds["engine_test-plain"], "barrier-missing-after-write")
    assert done.stdout == "wrong result: sum_twice\n"
    silent = start(builds["engine_test-plain"], "barrier-missing-before-reuse")
    assert silent.stdout == "", "if this one shows as well, ThreadSanitizer is no longer the only one to find it"


@pytest.mark.parametrize(
    ("defect", "kernel"),
    [
        ("copy-not-waited-for", "double_rows"),
        ("buffer-overwritten-too-early", "double_rows"),
        ("bulk-not-waited-for", "double_tiles"),
        ("cluster-barrier-missing", "sum_cluster"),
    ],
)
def test_a_copy_out_of_order_changes_the_result(builds, defect: str, kernel: str) -> None:
    """What is on the way is NaN until it is waited for, whichever thread reads it: no sanitizer is needed.

    The same for what another block of the cluster has not written yet.
    """
    done = start(builds["engine_test-plain"], defect)
    assert done.stdout == f"wrong result: {kernel}\n"


def test_unknown_defect_is_no_success(builds) -> None:
    assert start(builds["engine_test-plain"], "no-such-thing").returncode == 2


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("kernels", KERNEL_TESTS)
def test_kernels_are_clean(builds, kernels: str, sanitizer: str) -> None:
    done = start(builds[f"{kernels}_test-{sanitizer}"])
    assert done.stdout == "all right\n", done.stdout[-4000:] + done.stderr[-4000:]
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("kernels", "sanitizer", "defect", "message", "place"),
    [
        ("ema", "address", "count-too-large", "heap-buffer-overflow", "vec.cuh"),
        ("ema", "thread", "tensor-listed-twice", "data race", "vec.cuh"),
        ("layers", "address", "lengths-too-long", "heap-buffer-overflow", "copies.h"),
        ("layers", "thread", "workspace-overlaps-output", "data race", "vec.cuh"),
        ("tokens", "address", "index-too-short", "heap-buffer-overflow", "tokens_copy.cuh"),
        ("tokens", "address", "rows-too-short", "heap-buffer-overflow", "vec.cuh"),
        ("tokens", "thread", "outputs-overlap", "data race", "vec.cuh"),
    ],
)
def test_kernels_with_a_defect_are_reported(builds, kernels, sanitizer, defect, message, place) -> None:
    done = start(builds[f"{kernels}_test-{sanitizer}"], defect)
    assert done.returncode != 0
    assert f"{message} " in done.stderr
    assert place in done.stderr


def test_an_index_out_of_range_stops_the_kernel(builds) -> None:
    done = start(builds["tokens_test-address"], "index-out-of-range")
    assert re.fullmatch(r"engine: \S*tokens_sum.cuh:\d+: index out of range\n", done.stdout)
