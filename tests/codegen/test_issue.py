"""Warp instructions for each KiB that the CUDA kernels move, and bytes in flight, against what an H200 can issue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from codegen import issue
from codegen.issue_rows import BF16, FLIGHT, ROWS, SHARE, SMALL, Row
from codegen.sass import Flow, disassemble, instructions
from codegen.toolchain import KERNELS, build_machine_code


@pytest.fixture(scope="module")
def cuobjdump(toolkit) -> str:
    if toolkit.cuobjdump is None:
        pytest.skip("no cuobjdump in the toolkit, in nvidia-cuda-cuobjdump or in triton")
    return toolkit.cuobjdump


@pytest.mark.parametrize("file", [k.name for k in KERNELS])
def test_kernels_keep_within_their_bounds(file, builds, cuobjdump) -> None:
    counts = issue.count_cuda(cuobjdump, builds[f"{file}-90"], file)
    assert not issue.problems(counts)
    assert not issue.loose(counts)
    assert not issue.undocumented(counts), "make counts writes the table anew"


@pytest.mark.parametrize("file", [k.name for k in KERNELS])
def test_every_kernel_has_a_row(file, builds, cuobjdump) -> None:
    (cubin,) = builds[f"{file}-90"].glob("*.cubin")
    patterns = [row.pattern for row in ROWS if row.source == file]
    for name in issue.resources(cuobjdump, cubin):
        kernel = re.search(r"\d([a-z_]+_kernel)", name)
        assert kernel, name
        assert kernel[1] in SMALL or any(kernel[1] in pattern for pattern in patterns), f"{kernel[1]}: add a row"


def test_rows_beyond_the_bounds_say_why() -> None:
    assert len({row.kernel for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert (row.share > SHARE or row.least < FLIGHT) == bool(row.why), row.kernel


def test_budgets() -> None:
    assert [round(issue.GPUS[a].budget) for a in (80, 90, 100)] == [341, 249, 156]


COPY = """
__global__ void __launch_bounds__(256) copy(const float4* x, float4* out, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) {
    float4 v = x[i];
#ifdef PLANTED
#pragma unroll
    for (int k = 0; k < 240; ++k) v.x = fmaf(v.x, v.y, v.z);
#endif
    out[i] = v;
  }
}
"""


@pytest.mark.parametrize("planted", [False, True])
def test_a_planted_block_is_found(planted, toolkit, cuobjdump, tmp_path: Path) -> None:
    """240 instructions in a loop of 1 KiB; without them it is bytes in flight that are missing."""
    source = tmp_path / "copy.cu"
    source.write_text(("#define PLANTED\n" if planted else "") + COPY)
    folder = build_machine_code(toolkit, tmp_path, source, "90")
    row = Row("copy", "copy.cu", "copy", least=40 * 1024)
    counts = issue.count(cuobjdump, folder / "copy.cubin", next(folder.glob("*.ptx")).read_text(), [row])
    assert counts[row].bytes == 1024
    assert counts[row].instructions < 20 or planted
    assert (counts[row].warps, counts[row].flight) == (64, 32 * 1024)
    found = issue.problems(counts)
    assert any("of the budget" in line for line in found) == planted, found
    tight = issue.problems({Row("copy", "copy.cu", "copy", least=70 * 1024): counts[row]})
    assert any("in flight, 35 needed" in line for line in tight), tight


FLOW = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA 0x60 ;
        /*0030*/                   LDS R8, [R9] ;
        /*0040*/                   SYNCS.ARRIVE R8 ;
        /*0050*/                   FADD R8, R8, R8 ;
        /*0060*/               @P1 BRA 0xb0 ;
        /*0070*/                   FADD R12, R4, R5 ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R12 ;
        /*0090*/               @P2 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   IADD3 R4, R4, 0x1, RZ ;
        /*00c0*/                   BRA 0x70 ;
        /*00d0*/                   BRA 0xd0;
"""


def test_flow() -> None:
    """A loop with code out of line behind the exit; the filler's own loop is not reached."""
    code = list(instructions(FLOW))
    flow = Flow(code)
    ((head, body),) = flow.loops()
    assert [i.address for i in flow.longest(head, body)] == [
        0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0xB0, 0xC0, 0x70, 0x80, 0x90
    ]  # fmt: skip
    assert [i.address for i in flow.longest(head, body, "SYNCS")] == [0x10, 0x20, 0x60, 0xB0, 0xC0, 0x70, 0x80, 0x90]
    way = issue.main_loop(flow, "loop")
    assert (len(way), sum(i.bytes for i in way)) == (11, 1024)
    assert len(issue.main_loop(flow, "whole")) == 13
    assert issue.bytes_under_way(way) == 512


def test_copies_to_shared_memory_are_waited_for_by_groups() -> None:
    code = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   DEPBAR.LE SB0, 0x1 ;
    """
    assert issue.bytes_under_way(list(instructions(code))) == 2 * 512


def test_residence() -> None:
    assert issue.resident_warps(256, 128, 0) == 16
    assert issue.resident_warps(256, 32, 0) == 64
    assert issue.resident_warps(256, 64, 100 * 1024) == 16
    assert issue.resident_warps(32, 40, 0) == 32


def test_kernels_of_rows_exist_once(builds, cuobjdump) -> None:
    """A pattern that found two kernels would count either."""
    (cubin,) = builds["layers.cu-90"].glob("*.cubin")
    assert sum(f"19average_bulk_kernelI{BF16}Li8E" in name for name in disassemble(cuobjdump, cubin)) == 1
