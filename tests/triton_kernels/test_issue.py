"""Warp instructions for each KiB that the Triton kernels move, and for each pair of the attention kernels."""

from __future__ import annotations

import pytest
from codegen import issue
from codegen.issue_rows import ROWS, SMALL
from codegen.toolchain import find_cuobjdump


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    found = find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump in nvidia-cuda-cuobjdump, in triton or in a CUDA toolkit")
    return found


def test_kernels_keep_within_their_bounds(compiled, cuobjdump) -> None:
    if compiled.is_older:
        pytest.skip("of the installed Triton only")
    counts = issue.count_triton(cuobjdump, compiled.folder, compiled.kernels)
    assert len(counts) == sum(not row.source.endswith(".cu") for row in ROWS)
    assert not issue.problems(counts)
    assert not issue.loose(counts)
    assert not issue.undocumented(counts), "make counts writes the table anew"


def test_every_kernel_has_a_row(compiled) -> None:
    rows = {row.pattern for row in ROWS}
    missing = {k["name"] for k in compiled.kernels if f"_{k['name']}" not in rows} - SMALL.keys()
    assert not missing, "add a row"
