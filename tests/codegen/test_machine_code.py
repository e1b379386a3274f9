"""What nvcc makes of every kernel: no spills, no local memory, few registers, wide accesses to global memory."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from codegen.toolchain import ARCHITECTURES, KERNELS, ROOT, build_machine_code


@dataclass(frozen=True)
class Budget:
    """Of one .cu file: kernels in it, registers of the greediest, 16-byte accesses in each at least."""

    kernels: int
    registers: int
    wide_loads: int
    wide_stores: int


# 64 registers leave room for four blocks of 256 threads on a multiprocessor. An operand that is accessed 16 bytes at a
# time is loaded by at least two independent accesses before the first is needed; `average` is also stored so.
BUDGETS = {"ema.cu": Budget(kernels=20, registers=64, wide_loads=2, wide_stores=2)}


def ptxas_report(folder: Path) -> dict[str, dict[str, int]]:
    """Per kernel: registers, and bytes of stack, spill stores and spill loads."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in (folder / "ptxas.txt").read_text().splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            name = m[1]
            found[name] = {}
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name] |= {"stack": int(m[1]), "spill stores": int(m[2]), "spill loads": int(m[3])}
        elif m := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(m[1])
    return found


def ptx_accesses(folder: Path) -> dict[str, Counter[str]]:
    """Per kernel, how often each memory instruction occurs in the PTX, such as ld.global.v4.f32."""
    (file,) = folder.glob("*.ptx")
    found = {}
    for part in file.read_text().split(".entry ")[1:]:
        instructions = re.findall(r"^\s*(?:@\S+\s+)?((?:ld|st)\.\S+)", part, re.MULTILINE)
        found[part[: part.index("(")].strip()] = Counter(instructions)
    return found


def ptx_wide(accesses: Counter[str], kind: str) -> int:
    """16-byte accesses of global memory."""
    return sum(n for name, n in accesses.items() if re.fullmatch(rf"{kind}\.global\.v(4\.\w32|2\.\w64)", name))


def sass_accesses(folder: Path, cuobjdump: str) -> dict[str, Counter[str]]:
    """Per kernel, how often each memory instruction occurs in the machine code."""
    (cubin,) = folder.glob("*.cubin")
    text = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = Counter(re.findall(r"\s((?:LD|ST)[A-Z]*\.?[A-Z0-9.]*)\s", body))
    return found


@pytest.fixture(params=[(k.name, a) for k in KERNELS for a in ARCHITECTURES], ids=lambda p: f"{p[0]}-sm_{p[1]}")
def compiled(request: pytest.FixtureRequest, builds) -> tuple[Budget, Path]:
    kernel, architecture = request.param
    return BUDGETS[kernel], builds[f"{kernel}-{architecture}"]


def test_every_kernel_file_has_a_budget() -> None:
    assert sorted(BUDGETS) == [k.name for k in KERNELS]


def test_architectures_are_those_of_the_build() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r'set\(CMAKE_CUDA_ARCHITECTURES "([^"]+)"\)', text)
    assert found
    assert [a.removesuffix("-real") for a in found[1].split(";")] == list(ARCHITECTURES)


def test_registers_and_spills(compiled: tuple[Budget, Path]) -> None:
    budget, folder = compiled
    report = ptxas_report(folder)
    assert len(report) == budget.kernels
    for name, kernel in report.items():
        memory = {key: kernel[key] for key in ("stack", "spill stores", "spill loads")}
        assert not any(memory.values()), f"{name}: {memory}"
        assert kernel["registers"] <= budget.registers, f"{name}: {kernel['registers']} registers"


def test_ptx_accesses(compiled: tuple[Budget, Path]) -> None:
    budget, folder = compiled
    kernels = ptx_accesses(folder)
    assert len(kernels) == budget.kernels
    for name, accesses in kernels.items():
        # An access that names no state space is generic: slower, and a sign that an address came from nowhere.
        stray = [a for a in accesses if not re.match(r"(ld|st)\.(global|param|shared)", a)]
        assert not stray, f"{name}: {stray}"
        assert ptx_wide(accesses, "ld") >= budget.wide_loads, f"{name}: {accesses}"
        assert ptx_wide(accesses, "st") >= budget.wide_stores, f"{name}: {accesses}"


def test_machine_code_accesses(compiled: tuple[Budget, Path], toolkit) -> None:
    if toolkit.cuobjdump is None:
        pytest.skip(
            "no cuobjdump in the toolkit, in nvidia-cuda-cuobjdump or in triton; the PTX is looked at all the same"
        )
    budget, folder = compiled
    kernels = sass_accesses(folder, toolkit.cuobjdump)
    assert len(kernels) == budget.kernels
    for name, accesses in kernels.items():
        local = [a for a in accesses if re.match(r"(LDL|STL)\b", a)]
        generic = [a for a in accesses if re.match(r"(LD|ST)\b", a)]
        assert not local, f"{name}: {local}"
        assert not generic, f"{name}: {generic}"
        loads = sum(n for a, n in accesses.items() if re.match(r"LDG\b.*\.128", a))
        stores = sum(n for a, n in accesses.items() if re.match(r"STG\b.*\.128", a))
        assert loads >= budget.wide_loads, f"{name}: {accesses}"
        assert stores >= budget.wide_stores, f"{name}: {accesses}"


def test_fp32_average_is_loaded_four_deep(compiled: tuple[Budget, Path]) -> None:
    """The common case, fp32 average and student: eight 16-byte loads before the first store."""
    _, folder = compiled
    if folder.name.partition("-")[0] != "ema":
        pytest.skip("of the EMA only")
    (file,) = folder.glob("*.ptx")
    parts = [p for p in file.read_text().split(".entry ")[1:] if "update_ema_kernelIff" in p.partition("(")[0]]
    assert len(parts) == 2
    for part in parts:
        in_order = re.findall(r"\s((?:ld|st)\.global\.v4\.f32)", part)
        assert in_order[:8] == ["ld.global.v4.f32"] * 8, in_order[:10]


def test_the_checks_see_a_defect(toolkit, tmp_path: Path) -> None:
    """A kernel with local memory and generic, narrow accesses trips each of them."""
    source = tmp_path / "bad.cu"
    source.write_text(
        "__global__ void bad(float** p, int n) {\n"
        "  __shared__ float s[64];\n"
        "  float x[64];\n"
        "  for (int i = 0; i < 64; ++i) x[(i * n) % 64] = p[0][i];\n"
        "  s[threadIdx.x] = x[n];\n"
        "  float* q = n > 5 ? s : p[1];\n"
        "  q[n] = q[2 * n] + 1;\n"
        "}\n"
    )
    folder = build_machine_code(toolkit, tmp_path, source, "90")
    (report,) = ptxas_report(folder).values()
    (accesses,) = ptx_accesses(folder).values()
    assert report["stack"] == 256
    assert any(a.startswith("st.local") for a in accesses)
    assert "ld.f32" in accesses
    assert ptx_wide(accesses, "ld") == 0
    if toolkit.cuobjdump:
        (sass,) = sass_accesses(folder, toolkit.cuobjdump).values()
        assert any(re.match(r"STL\b", a) for a in sass)
        assert any(re.match(r"LD\b", a) for a in sass)
