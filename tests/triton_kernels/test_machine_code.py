"""What Triton makes of every kernel at the published settings, for GPUs that are not here.

16-byte accesses of global memory where bytes matter, no local memory, and registers that leave room for enough warps.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass

import pytest
from codegen.toolchain import find_cuobjdump
from triton_kernels.conftest import ARCHITECTURES, OLDER_ARCHITECTURES


@dataclass(frozen=True)
class Budget:
    """Most registers of a thread; whether all loads and all stores of the large operands are 16 bytes wide."""

    registers: int
    wide_loads: bool = True
    wide_stores: bool = True


# Registers: 128 with up to 8 warps is two or more programs on an SM; one-warp kernels want 64 and bear 128.
BUDGETS = {
    "row_kernel": Budget(128),
    "one_read_kernel": Budget(128),
    "statistics_kernel": Budget(80, wide_stores=False),
    "merge_kernel": Budget(72, wide_stores=False),
    "combine_kernel": Budget(128),
    "update_ema_kernel": Budget(80),
    "gather_kernel": Budget(48),
    "inverse_gather_kernel": Budget(80),
    "restore_kernel": Budget(80),
    "restore_noise_kernel": Budget(64),
    "fill_sums_kernel": Budget(64, wide_stores=False),
    "column_sums_kernel": Budget(64, wide_stores=False),
    "partial_loss_kernel": Budget(104, wide_stores=False),
    "merge_loss_kernel": Budget(80, wide_stores=False),
    "finish_loss_kernel": Budget(64, wide_loads=False, wide_stores=False),
    "loss_backward_kernel": Budget(80),
    "forward_kernel": Budget(104),
    "backward_kernel": Budget(168),
    "gelu_kernel": Budget(48),
    "gelu_backward_kernel": Budget(64),
    "norm_kernel": Budget(112),
    "norm_backward_kernel": Budget(176),
}
# Kernels with a maximum of floats, which are counts of rows there; PTX's returns the number where one operand is NaN.
COUNTING = {"statistics_kernel", "merge_kernel", "partial_loss_kernel", "merge_loss_kernel"}
# The optimiser writes `nnan` itself where numbers come from integers.
FROM_INTEGERS = {"restore_noise_kernel"}
# Narrow accesses that are right: an index, a mean and a deviation for each column, a table entry. None is 2 bytes wide.
NARROW = re.compile(r"(ld|st)\.global\.(b32|b64|nc\.b32)")


def accesses(ptx: str) -> Counter[str]:
    """How often each access of global memory occurs, cache hints left out."""
    found = re.findall(r"\s((?:ld|st)\.global[\w.:]*)", ptx)
    return Counter(re.sub(r"(\.L[12]::\w+|\.relaxed|\.gpu)", "", name) for name in found)


def wide(counts: Counter[str], kind: str) -> int:
    return sum(n for name, n in counts.items() if re.fullmatch(rf"{kind}\.global\.v(4\.\w32|2\.\w64)", name))


def float_extrema(ptx: str) -> set[str]:
    """Instructions that choose one of two floats, or that turn NaN into 0."""
    return set(
        re.findall(
            r"\s((?:max|min)\.[\w.]*f(?:16|32|64|16x2)\S*|redux\S*\.f32\S*|[\w.]+\.sat\.f32|[\w.]+\.relu\.\S+)", ptx
        )
    )


def narrow_casts(ptx: str) -> set[str]:
    """Casts of float32 to 16 bits."""
    return set(re.findall(r"\s(cvt\.\S*(?:bf16|f16)(?:x2)?\.f32)\b", ptx))


@pytest.fixture(params=ARCHITECTURES)
def kernels(request, compiled) -> list[tuple[dict, str]]:
    """Kernels of one architecture with their PTX."""
    if compiled.is_older and request.param not in OLDER_ARCHITECTURES:
        pytest.skip(f"the older Triton compiles for {OLDER_ARCHITECTURES} only")
    chosen = [k for k in compiled.kernels if k["architecture"] == request.param]
    return [(k, (compiled.folder / f"{k['file']}.ptx").read_text()) for k in chosen]


def test_every_kernel_is_compiled(kernels) -> None:
    assert {k["name"] for k, _ in kernels} == set(BUDGETS)


def test_wide_accesses(kernels) -> None:
    for kernel, ptx in kernels:
        budget, counts = BUDGETS[kernel["name"]], accesses(ptx)
        where = f"{kernel['case']}, {kernel['file']}: {dict(counts)}"
        copies = re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", ptx)
        assert wide(counts, "ld") or copies or not budget.wide_loads, where
        assert wide(counts, "st") or not budget.wide_stores, where
        if kernel["name"] in ("update_ema_kernel", "column_sums_kernel"):
            continue  # their unaligned and their last path
        stray = [n for n in counts if not re.search(r"\.v[24]\.", n) and not NARROW.fullmatch(n)]
        assert not stray, where


def test_ema_loads_four_deep(kernels) -> None:
    """Full blocks of aligned float32 tensors: eight 16-byte loads before the first store, and no predicate."""
    cases = [ptx for k, ptx in kernels if k["case"] in ("ema, float32 student", "ema, no copy")]
    assert len(cases) == 2
    for ptx in cases:
        in_order = re.findall(r"(@%p\d+ )?((?:ld|st)\.global\.v4\.b32)", ptx)
        runs = re.findall(r"L{8,}S", "".join("L" if a.startswith("ld") else "S" for _, a in in_order))
        assert runs
        assert any(not predicate for predicate, a in in_order if a.startswith("ld")), "only predicated loads"


def test_no_narrow_loads_of_half_precision(kernels) -> None:
    """A row of bfloat16 read two bytes at a time would be eight times the instructions."""
    for kernel, ptx in kernels:
        if kernel["name"] != "update_ema_kernel":
            assert not accesses(ptx)["ld.global.b16"], kernel


def test_nan_is_not_dropped(kernels) -> None:
    """No other kernel has an instruction through which NaN would be lost, and the optimiser no licence for one."""
    licensed = {kernel["name"]: kernel["licences"] for kernel, _ in kernels if kernel["licences"]}
    assert licensed.keys() <= FROM_INTEGERS, licensed
    found = {kernel["name"]: float_extrema(ptx) for kernel, ptx in kernels if float_extrema(ptx)}
    assert found.keys() == COUNTING
    assert set().union(*found.values()) == {"max.f32"}


def test_casts_round_to_nearest_even(kernels) -> None:
    found = set().union(*(narrow_casts(ptx) for _, ptx in kernels))
    assert found and all(".rn." in name for name in found), found


def test_what_drops_nan_or_cuts_bits_would_be_found() -> None:
    ptx = (
        "max.f32 %f1, %f2, %f3; min.NaN.f32 %f1, %f2; max.s32 %r1, %r2; cvt.rz.bf16x2.f32 %r1, %f1; fma.rn.sat.f32 %f1;"
    )
    assert float_extrema(f" {ptx}") == {"max.f32", "min.NaN.f32", "fma.rn.sat.f32"}
    assert narrow_casts(f" {ptx}") == {"cvt.rz.bf16x2.f32"}


def test_registers_and_local_memory(compiled) -> None:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump in nvidia-cuda-cuobjdump, in triton or in a CUDA toolkit")
    for kernel in compiled.kernels:
        cubin = compiled.folder / f"{kernel['file']}.cubin"
        done = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout + done.stderr)
        assert found, done.stdout + done.stderr
        registers, stack, local = map(int, found.groups())
        where = f"triton {compiled.version}, {kernel['case']}, {kernel['file']}"
        assert stack == local == 0, f"{where}: {stack} bytes of stack, {local} of local memory"
        most = BUDGETS[kernel["name"]].registers
        assert registers <= most, f"{where}: {registers} registers, at most {most}"


def test_machine_code_accesses(compiled) -> None:
    """In the machine code of sm_90, one of each kernel: 128-bit accesses, none of local memory, none generic."""
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump in nvidia-cuda-cuobjdump, in triton or in a CUDA toolkit")
    if compiled.is_older:
        pytest.skip("of the installed Triton only: reading machine code takes long")
    one_of_each = {k["name"]: k for k in compiled.kernels if k["architecture"] == 90}
    for kernel in one_of_each.values():
        cubin = compiled.folder / f"{kernel['file']}.cubin"
        text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        counts = Counter(re.findall(r"\s((?:LD|ST)[A-Z]*(?:\.[A-Z0-9]+)*)\s", text))
        budget = BUDGETS[kernel["name"]]
        where = f"triton {compiled.version}, {kernel['case']}, {kernel['file']}: {dict(counts)}"
        assert counts, where
        assert not [a for a in counts if re.match(r"(LDL|STL|LD|ST)(\.|$)", a)], where
        assert any(re.match(r"(LDG|LDGSTS)\b.*\.128", a) for a in counts) or not budget.wide_loads, where
        assert any(re.match(r"STG\b.*\.128", a) for a in counts) or not budget.wide_stores, where
