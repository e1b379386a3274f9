"""Compilers for the tests of the CUDA sources, and what is built with them; nothing here needs a GPU.

The same `.cu` files are compiled by nvcc for every architecture, and by the host compiler on top of the engine of
`csrc/tests`, which runs them on the CPU. Without nvcc (whose headers the engine uses too) all of it is skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.workers import make_once

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "core").glob("*.cu"))
KERNEL_TESTS = ("ema", "layers", "tokens")  # csrc/tests/*_test.cpp that run kernels under the sanitizers
ARCHITECTURES = ("80", "90", "100", "120")
SANITIZERS = {
    "plain": ["-O2"],
    "portable-switch": ["-O1", "-DD2V_ENGINE_UCONTEXT"],
    # What is left out of the undefined behaviour, AddressSanitizer finds in the access; it takes a fourth of compiling.
    "address": [
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-fno-sanitize=null,pointer-overflow,object-size",
    ],
    "thread": ["-O1", "-fsanitize=thread"],
}


@dataclass(frozen=True)
class Toolkit:
    """nvcc, the folder of its headers, the host compiler, and the disassembler or None."""

    nvcc: str
    include: Path
    compiler: str
    cuobjdump: str | None


def find_nvcc() -> str | None:
    """nvcc, from where CMake takes it too: CUDACXX, PATH, CUDA_HOME."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    named = os.environ.get("CUDACXX")
    folders = os.pathsep.join(f"{home}/bin" for home in [*homes, "/usr/local/cuda"])
    return named or shutil.which("nvcc") or shutil.which("nvcc", path=folders)


def find_cuobjdump() -> str | None:
    """cuobjdump: of the toolkit, of NVIDIA's packages on PyPI, or of Triton."""
    folders = [Path(sysconfig.get_path("purelib")) / "nvidia" / name / "bin" for name in ("cu13", "cuda_cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    folders.append(Path("/usr/local/cuda/bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command, output as text; raises with its errors if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


def find_toolkit() -> Toolkit | str:
    """What is on this machine, or the reason why that is not enough."""
    nvcc, compiler = find_nvcc(), os.environ.get("CXX") or shutil.which("g++")
    if nvcc is None:
        return "no nvcc in CUDACXX, on PATH or in CUDA_HOME"
    if compiler is None:
        return "no g++ on PATH"
    # The nvcc on PATH may be a script that calls the real one: ask it where its toolkit is.
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    found = re.search(r'INCLUDES="-I(.*?)"', plan.stderr)
    assert found, f"{nvcc} --dryrun names no include folder:\n{plan.stderr}"
    return Toolkit(nvcc, Path(found[1]), compiler, find_cuobjdump())


class Builds:
    """Everything compiled, by name, once a `folder`; all of it is begun at once, and a test waits for what it takes."""

    def __init__(self, jobs: dict[str, Callable[[], Path]], folder: Path) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._futures: dict[str, Future[Path]] = {
            name: self._pool.submit(make_once, folder, name, job) for name, job in jobs.items()
        }

    def __getitem__(self, name: str) -> Path:
        return self._futures[name].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def build_engine_program(tools: Toolkit, folder: Path, source: str, sanitizer: str) -> Path:
    program = folder / f"{source}-{sanitizer}"
    flags = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ftls-model=initial-exec"]
    # The folder is the working one, so that reports name files in a short way.
    options = [*flags, *SANITIZERS[sanitizer], "-isystem", tools.include]
    run(tools.compiler, *options, f"{source}.cpp", "-o", program, cwd=CSRC / "tests")
    return program


def build_emulated_library(tools: Toolkit, folder: Path) -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch = Path(spec.origin).parent
    library = folder / "libd2v_emu.so"
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-ftls-model=initial-exec"]
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", torch / "include"]
    sources = [
        CSRC / "tests/emu_kernels.cpp",
        CSRC / "torch/ops_cuda.cpp",
        *sorted((CSRC / "torch").glob("*_cuda_op.cpp")),
    ]
    run(
        tools.compiler, *flags, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DD2V_EMULATED", *torch_flags,
        "-isystem", tools.include, *sources, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", library,
    )  # fmt: skip
    return library


def build_machine_code(tools: Toolkit, folder: Path, source: Path, architecture: str) -> Path:
    """A folder with the cubin, the PTX and what ptxas said of registers and spills."""
    out = folder / f"{source.stem}-sm_{architecture}"
    out.mkdir(exist_ok=True)
    cubin = out / f"{source.stem}.cubin"
    # The flags of CMakeLists.txt.
    flags = ["-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-keep", "-keep-dir", out]
    done = run(tools.nvcc, "-cubin", *flags, source, "-o", cubin)
    (out / "ptxas.txt").write_text(done.stdout + done.stderr)
    return out


def plan_builds(tools: Toolkit, folder: Path) -> dict[str, Callable[[], Path]]:
    """What to build, by name: emulated, engine_test-SANITIZER, KERNELS_test-SANITIZER, FILE.cu-ARCHITECTURE."""
    jobs: dict[str, Callable[[], Path]] = {}

    def engine_program(source: str, sanitizer: str) -> None:
        jobs[f"{source}-{sanitizer}"] = lambda: build_engine_program(tools, folder, source, sanitizer)

    def machine_code(source: Path, architecture: str) -> None:
        jobs[f"{source.name}-{architecture}"] = lambda: build_machine_code(tools, folder, source, architecture)

    # In the order in which the test files are run.
    jobs["emulated"] = lambda: build_emulated_library(tools, folder)
    for sanitizer in SANITIZERS:
        engine_program("engine_test", sanitizer)
    for kernels in KERNEL_TESTS:
        for sanitizer in ("address", "thread"):
            engine_program(f"{kernels}_test", sanitizer)
    for source in KERNELS:
        for architecture in ARCHITECTURES:
            machine_code(source, architecture)
    return jobs
