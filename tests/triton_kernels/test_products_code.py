"""What Triton makes of the kernels that multiply matrices, for GPUs that are not here, and their launch choices."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path

import pytest
from codegen import issue
from codegen.issue_rows import PAIRS
from codegen.toolchain import find_cuobjdump
from support.workers import make_once
from triton_kernels.conftest import ARCHITECTURES, OLDER, OLDER_ARCHITECTURES, compile_kernels
from triton_kernels.test_machine_code import float_extrema, narrow_casts

from d2v_kernels import _env

pytestmark = pytest.mark.skipif(_env.triton_interpreter(), reason="of a process without the interpreter")
CONVOLUTIONS = {"convolution_kernel", "convolution_weights_kernel"}
KERNELS = {"attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel", *CONVOLUTIONS}
ALL_FLOAT32 = {"convolution_weights_kernel"}
"""Kernels whose results are float32."""
LEAST_SHARED = 99 * 1024  # what one block gets on the smallest GPUs named (sm_86, sm_89, sm_120)


@pytest.fixture(scope="module", params=["installed", "3.6.0"])
def compiled(request, needs_triton, triton_cache, shared_folder, tmp_path_factory) -> tuple[Path, dict]:
    before, architectures = "", ARCHITECTURES
    if request.param != "installed":
        if not OLDER.is_dir():
            pytest.skip(f"no triton {request.param} in {OLDER}")
        before, architectures = str(OLDER), OLDER_ARCHITECTURES

    make = functools.partial(compile_kernels, "triton_kernels.products_compile", architectures, before, triton_cache)
    folder = make_once(shared_folder, f"products-{request.param}", lambda: make(tmp_path_factory.mktemp("products")))
    report = json.loads((folder / "report.json").read_text())
    assert {k["architecture"] for k in report["kernels"]} == set(architectures)
    return folder, report


def test_kernels(compiled) -> None:
    """16-byte loads of rows, tensor cores in every product, shared memory that any GPU named has."""
    folder, report = compiled
    assert {k["name"] for k in report["kernels"]} == KERNELS
    for kernel in report["kernels"]:
        ptx, where = (folder / f"{kernel['file']}.ptx").read_text(), kernel["file"]
        wide = re.findall(r"ld\.global[\w.:]*\.v(?:4\.\w32|2\.\w64)|cp\.async\.c[ag].*\], 0x10", ptx)
        assert wide, where
        assert not re.search(r"ld\.global[\w.:]*\.b16", ptx), f"{where}: rows of half precision two bytes at a time"
        assert re.search(r"wgmma\.mma|mma\.sync|tcgen05\.mma", ptx), where
        assert not re.search(r"\s(atom|red)\.", ptx), f"{where}: atomics"
        assert kernel["shared"] <= LEAST_SHARED, f"{where}: {kernel['shared']} bytes of shared memory"


def test_only_the_running_maximum_drops_nan(compiled) -> None:
    """The forward's max.f32, which loses none of the results' (interpreted/test_semantics.py); casts round to even."""
    folder, report = compiled
    for kernel in report["kernels"]:
        ptx = (folder / f"{kernel['file']}.ptx").read_text()
        assert float_extrema(ptx) == ({"max.f32"} if kernel["name"] == "attention_kernel" else set()), kernel["file"]
        assert not kernel["licences"], kernel["file"]
        casts = narrow_casts(ptx)
        assert bool(casts) != (kernel["name"] in ALL_FLOAT32), kernel["file"]
        assert all(".rn." in name for name in casts), kernel["file"]


def test_no_local_memory(compiled) -> None:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump in nvidia-cuda-cuobjdump, in triton or in a CUDA toolkit")
    folder, report = compiled
    for kernel in report["kernels"]:
        cubin = str(folder / f"{kernel['file']}.cubin")
        done = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True)
        found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", done.stdout + done.stderr)
        assert found, done.stdout + done.stderr
        assert found.groups() == ("0", "0"), (
            f"triton {report['triton']}, {kernel['file']}: stack, local {found.groups()}"
        )


def test_instructions_a_pair(compiled) -> None:
    """As few as the table of docs/gpu-first-run.md says, and not a tenth fewer than the bound."""
    tool, (folder, report) = find_cuobjdump(), compiled
    if tool is None or report["triton"] == OLDER.name.removeprefix("triton-"):
        pytest.skip("of the installed Triton, and with cuobjdump only")
    counts, stored = issue.count_products(tool, folder, report["kernels"]), issue.documented(issue.PAIR_COUNTS)
    assert counts.keys() == PAIRS.keys()
    for (case, name), most in PAIRS.items():
        assert 0.9 * most < counts[case, name].per_pair <= most, (case, name, counts[case, name])
        assert stored[f"{case}: {name}"] == pytest.approx(counts[case, name].per_pair, rel=0.1), "make counts"


def test_other_sizes_compile_nothing_new(compiled) -> None:
    assert compiled[1]["compiled_for_other_sizes"] == 0


@pytest.mark.parametrize("width", [1, 16, 31, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("size", [2, 4])
def test_launch_of_attention(needs_triton, width, size) -> None:
    from d2v_kernels.triton import attention

    for kernel in ("forward", "dq", "dkdv"):
        tile = attention.attention_tile(kernel, width, size)
        for n in (tile.queries, tile.keys, tile.channels, tile.warps):
            assert n & (n - 1) == 0
        assert tile.queries >= 16 and tile.keys >= 16 and tile.channels >= max(16, width)  # smallest product
        assert tile.keys % 16 == 0  # one call of Philox decides on sixteen keys
        assert tile.stages >= 1
    assert attention.attention_tile("forward", 64, 2) == attention.AttentionTile(64, 64, 64, 4, 2)
    assert attention.attention_tile("forward", 80, 2).channels == 128


@pytest.mark.parametrize("narrow", [1, 3, 16, 24, 48, 64, 80, 768])
@pytest.mark.parametrize("taps", [1, 7, 9, 19, 25])
@pytest.mark.parametrize("size", [2, 4])
def test_launch_of_convolutions(needs_triton, narrow, taps, size) -> None:
    from d2v_kernels.triton import convolution

    product, weights = convolution.convolution_tile(narrow, size), convolution.weights_tile(taps * narrow, narrow, size)
    for tile, summed in ((product, product.columns), (weights, weights.rows)):
        for n in (tile.rows, tile.columns, tile.outputs, tile.warps):
            assert n & (n - 1) == 0
        assert min(tile.rows, tile.columns, tile.outputs) >= 16  # smallest product
        loaded = tile.rows * tile.columns + summed * tile.outputs
        assert tile.stages * loaded * size <= LEAST_SHARED
    assert convolution.convolution_tile(48, 2) == convolution.ConvolutionTile(128, 64, 64, 4, 2)
    assert convolution.weights_tile(24 * 7, 24, 2) == convolution.ConvolutionTile(64, 256, 32, 8, 2)
