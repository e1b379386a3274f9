"""csrc/core as plain C++ under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

`csrc/tests/core_test.cpp` compares every function with loops in double, on buffers of the exact size, with one thread
and with several. Memory errors differ from one instruction level to the next, so each level runs; races do not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from d2v_kernels._native import cpu_level

ROOT = Path(__file__).resolve().parents[2]


def _find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600, check=False
    )


def _can_sanitize(folder: Path, sanitizers: str) -> bool:
    """True where the compiler has the sanitizers' libraries."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    command = [f"-fsanitize={sanitizers}", str(source), "-o", str(folder / "empty")]
    return compiler is not None and _run(compiler, *command).returncode == 0


def _build(folder: Path, sanitizers: str, *options: str) -> Path:
    cmake, ninja = _find_tool("cmake"), _find_tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("CMake or Ninja is not installed")
    if not _can_sanitize(folder, sanitizers):
        pytest.skip(f"no C++ compiler with -fsanitize={sanitizers}")
    torch = importlib.util.find_spec("torch")
    assert torch and torch.origin
    configured = _run(
        cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DD2V_BUILD_TESTS=ON", f"-DD2V_SANITIZE={sanitizers}", "-DD2V_BUILD_CUDA=0", "-DD2V_BUILD_PYBIND=OFF",
        f"-DD2V_TORCH={Path(torch.origin).parent}", f"-DPython_EXECUTABLE={sys.executable}", *options,
    )  # fmt: skip
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = _run(cmake, "--build", str(folder), "--target", "core_test")
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return folder / "core_test"


def _start(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = _run(str(program), **environment)
    if "unexpected memory mapping" in done.stderr:
        # Older ThreadSanitizers cannot live with the address randomisation of newer kernels.
        done = _run("setarch", "-R", str(program), **environment)
    return done


def test_no_memory_error_at_any_level(tmp_path: Path) -> None:
    # Compiling takes minutes, most of them for levels above AVX2: they are left out where they could not run.
    above = cpu_level() not in ("base", "avx2")
    levels = ("base", "avx2", *(("avx512", "avx512bf16", "amx") if above else ()))
    program = _build(tmp_path, "address,undefined", f"-DD2V_X86_AVX512={'ON' if above else 'OFF'}")
    ran = set()
    for level in levels:
        done = _start(program, D2V_KERNELS_ISA=level, ASAN_OPTIONS="", UBSAN_OPTIONS="print_stacktrace=1")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        got, _, text = done.stdout.strip().partition(": ")
        assert text == "all right", done.stdout
        ran.add(got)
    assert "base" in ran  # a higher level that the machine lacks runs as the highest it has


def test_no_race(tmp_path: Path) -> None:
    program = _build(tmp_path, "thread", "-DD2V_X86_LEVELS=OFF")
    done = _start(program, TSAN_OPTIONS="halt_on_error=1")
    assert (done.returncode, done.stdout) == (0, "base: all right\n"), done.stdout[-4000:] + done.stderr[-4000:]
