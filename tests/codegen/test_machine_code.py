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
    """Of one .cu file: kernels in it, registers and static shared bytes of the greediest, promised 16-byte accesses.

    `wide`: (part of a kernel's name as a regular expression, 16-byte loads, 16-byte stores) at least; a kernel belongs
    to the first entry that fits. `empty_before`: (part of a name, architecture that its kernels are for at least);
    they have no code on older ones, and are not launched there.
    """

    kernels: int
    registers: int
    shared: int
    wide: tuple[tuple[str, int, int], ...]
    empty_before: tuple[tuple[str, int], ...] = ()

    def promise(self, kernel: str, folder: Path) -> tuple[int, int]:
        """16-byte loads and stores that a kernel has at least, on the architecture that the folder is named after."""
        if any(part in kernel and architecture_of(folder) < least for part, least in self.empty_before):
            return 0, 0
        return next(((loads, stores) for part, loads, stores in self.wide if re.search(part, kernel)), (0, 0))


def architecture_of(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


# 64 registers leave room for four blocks of 256 threads on a multiprocessor, 80 for three, 128 for two. An operand that
# is accessed 16 bytes at a time is loaded by independent accesses before the first is needed: the EMA has at least two
# of each operand in flight (`average` is also stored so), copied rows and sums of rows four.
# In average_layers an output is stored by 16-byte accesses unless its type is narrower than the layers'; the one-read
# forms of instance norm load by asynchronous or bulk copies alone, which other tests count.
WIDE = r"(fLi4|dLi2|(__half|__nv_bfloat16)Li8)"
BUDGETS = {
    "ema.cu": Budget(
        kernels=26, registers=64, shared=0, wide=(("update_ema_kernel", 2, 2), ("update_split_ema_kernel", 6, 4))
    ),
    "layers.cu": Budget(
        kernels=46,
        registers=128,
        shared=17 * 1024,
        wide=(
            ("average_bulk_kernel", 0, 24),
            ("average_instance_kernel", 0, 21),
            ("average_rows_kernel", 6, 18),
            (f"channel_stats_kernelI.*{WIDE}", 4, 0),
            ("combine_channels_kernelIdLi2", 6, 4),
            (f"combine_channels_kernelI.*{WIDE}", 6, 12),
        ),
        empty_before=(("average_bulk_kernel", 90),),
    ),
    "tokens.cu": Budget(
        kernels=31,
        registers=80,
        shared=8 * 1024,
        wide=(
            ("copy_rows_kernelI5uint4", 4, 4),
            (f"sum_slots_kernelI.*{WIDE}", 4, 1),
            (f"restore_noise_kernelI.*{WIDE}", 1, 1),
            (r"sum_filled_kernelI(ffLi4|ddLi2|.*Li8)", 4, 0),
        ),
    ),
}


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
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] |= {"registers": int(m[1]), "shared": int(shared[1]) if shared else 0}
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


@pytest.mark.parametrize("file", BUDGETS)
def test_every_promise_is_of_a_kernel(file: str, builds) -> None:
    names = list(ptxas_report(builds[f"{file}-90"]))
    for part, _, _ in BUDGETS[file].wide:
        assert any(re.search(part, name) for name in names), part


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
        assert kernel["shared"] <= budget.shared, f"{name}: {kernel['shared']} bytes of shared memory"


def test_ptx_accesses(compiled: tuple[Budget, Path]) -> None:
    budget, folder = compiled
    kernels = ptx_accesses(folder)
    assert len(kernels) == budget.kernels
    for name, accesses in kernels.items():
        # An access that names no state space is generic: slower, and a sign that an address came from nowhere.
        stray = [a for a in accesses if not re.match(r"(ld|st)\.(global|param|shared)", a)]
        assert not stray, f"{name}: {stray}"
        loads, stores = budget.promise(name, folder)
        assert ptx_wide(accesses, "ld") >= loads, f"{name}: {accesses}"
        assert ptx_wide(accesses, "st") >= stores, f"{name}: {accesses}"


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
        # Shared memory of another block of the cluster has such addresses.
        generic = [a for a in accesses if re.match(r"(LD|ST)\b", a) and "average_bulk_kernel" not in name]
        assert not local, f"{name}: {local}"
        assert not generic, f"{name}: {generic}"
        loads = sum(n for a, n in accesses.items() if re.match(r"LDG\b.*\.128", a))
        stores = sum(n for a, n in accesses.items() if re.match(r"STG\b.*\.128", a))
        wide_loads, wide_stores = budget.promise(name, folder)
        assert loads >= wide_loads, f"{name}: {accesses}"
        assert stores >= wide_stores, f"{name}: {accesses}"


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


def test_layers_arrive_by_asynchronous_copies(compiled: tuple[Budget, Path], toolkit) -> None:
    """The one-read form: 16-byte copies to shared memory, two layers ahead; nothing is loaded by way of registers."""
    _, folder = compiled
    if folder.name.partition("-")[0] != "layers":
        pytest.skip("of average_layers only")
    (file,) = folder.glob("*.ptx")
    parts = [p for p in file.read_text().split(".entry ")[1:] if "average_instance_kernel" in p.partition("(")[0]]
    assert len(parts) == 12
    for part in parts:
        assert len(re.findall(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 16;", part)) == 3 * 7
        assert not re.search(r"\bld\.global", part)
    if toolkit.cuobjdump is None:
        return
    (cubin,) = folder.glob("*.cubin")
    text = subprocess.run([toolkit.cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        if "average_instance_kernel" in part.partition("\n")[0]:
            assert len(re.findall(r"LDGSTS\.\S*128", part)) == 3 * 7
            assert not re.search(r"\sLDG\b", part)


def test_layers_arrive_by_bulk_copies(compiled: tuple[Budget, Path], toolkit) -> None:
    """From sm_90 on: boxes of a tensor, by one thread; nothing but moments is read from another block's memory."""
    _, folder = compiled
    if folder.name.partition("-")[0] != "layers":
        pytest.skip("of average_layers only")
    (file,) = folder.glob("*.ptx")
    parts = [p for p in file.read_text().split(".entry ")[1:] if "average_bulk_kernel" in p.partition("(")[0]]
    assert len(parts) == 6
    for part in parts:
        there = architecture_of(folder) >= 90
        copies = r"cp\.async\.bulk\.tensor\.3d\.shared::cta\.global\.tile\.mbarrier::complete_tx::bytes"
        # The first layers, and the later ones.
        assert len(re.findall(copies, part)) == (2 if there else 0)
        assert len(re.findall(r"mbarrier\.arrive\.expect_tx", part)) == (2 if there else 0)
        assert len(re.findall(r"mbarrier\.try_wait\.parity", part)) == there
        assert len(re.findall(r"ld\.shared::cluster\.f32", part)) == (2 * 8 if there else 0)
        # Before the first read of another block's moments, and before the end.
        assert len(re.findall(r"barrier\.cluster\.arrive\.release\.aligned", part)) == (2 if there else 0)
        assert not re.search(r"\bld\.global", part)
    if toolkit.cuobjdump is None:
        return
    (cubin,) = folder.glob("*.cubin")
    text = subprocess.run([toolkit.cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        if "average_bulk_kernel" in part.partition("\n")[0]:
            assert bool(re.search(r"\sUTMALDG\.3D", part)) == (architecture_of(folder) >= 90)
            assert not re.search(r"\s(LDG|LDGSTS)\b", part)
            # A call of the driver's code for what the chip cannot do.
            assert not re.search(r"\sCALL\.ABS", part)


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
