"""Every kernel compiles for GPUs of other makers and generations than those whose machine code is read."""

from __future__ import annotations

import json

import pytest
from triton_kernels.conftest import run_child
from triton_kernels.test_machine_code import BUDGETS
from triton_kernels.test_products_code import KERNELS as PRODUCTS
from triton_kernels.test_products_code import LEAST_SHARED

KERNELS = {*BUDGETS, *PRODUCTS}
LDS = 64 * 1024
"""Local memory of a workgroup on gfx9."""


@pytest.mark.parametrize("target", ["gfx942", pytest.param("gfx90a", marks=pytest.mark.long)])
def test_amd(needs_triton, triton_cache, target: str) -> None:
    done = run_child("-m", "support.triton_compile", "amd", target, TRITON_CACHE_DIR=triton_cache)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {name for _, _, name, _ in found} == KERNELS
    assert all(local <= LDS for *_, local in found), found


@pytest.mark.long
def test_sm_120(needs_triton, triton_cache, tmp_path) -> None:
    done = run_child("-m", "support.triton_compile", str(tmp_path), "120", TRITON_CACHE_DIR=triton_cache)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert {kernel["name"] for kernel in kernels} == set(BUDGETS)
    done = run_child(
        "-m", "triton_kernels.products_compile", str(tmp_path), "120", TRITON_CACHE_DIR=triton_cache
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads((tmp_path / "report.json").read_text())["kernels"]
    assert {kernel["name"] for kernel in kernels} == PRODUCTS
    assert all(kernel["shared"] <= LEAST_SHARED for kernel in kernels), kernels
