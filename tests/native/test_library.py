"""What the built files need and give."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from d2v_kernels import _native, registry

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
_needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="nm and readelf are not installed")


def _lines(*command: str | Path) -> list[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("schema", registry.OPERATORS.values(), ids=lambda s: s.split("(")[0])
def test_schemas_are_those_of_the_public_operators(cpu_library: Path, schema: str) -> None:
    name = schema.split("(", 1)[0]
    public = str(getattr(torch.ops.d2v, name).default._schema)
    native = str(getattr(torch.ops.d2v_native, name).default._schema)
    assert native == public.replace("d2v::", "d2v_native::").replace("SymInt", "int")


@_needs_binutils
def test_symbols_exist_in_torch(cpu_library: Path) -> None:
    needed = {line.split()[-1].split("@")[0] for line in _lines("nm", "-D", "--undefined-only", cpu_library)}
    of_torch = {s for s in needed if s.startswith(("torch_", "aoti_torch_")) or "c10" in s or "_ZN2at" in s}
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    given = {line.split()[-1].split("@")[0] for line in _lines("nm", "-D", "--defined-only", torch_library)}
    assert of_torch
    assert not of_torch - given
    # The stable interface is plain C: a mangled name of torch would tie the file to one torch version.
    assert not [s for s in of_torch if s.startswith("_Z")]


@_needs_binutils
def test_needs_no_other_library(cpu_library: Path) -> None:
    dynamic = _lines("readelf", "-d", cpu_library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic if "(NEEDED)" in line}
    assert {n for n in needed if not n.startswith("ld-linux")} <= ALLOWED
    assert not [line for line in dynamic if "RPATH" in line or "RUNPATH" in line]


@_needs_binutils
def test_instruction_level_files_share_no_symbol(cpu_library: Path) -> None:
    """The linker keeps one copy of a weak function, which may be the AVX-512 one."""
    objects = [
        path
        for level in ("base", "avx2", "avx512", "avx512bf16", "amx")
        for path in ROOT.glob(f"build/*/CMakeFiles/d2v_isa_{level}.dir/**/*.o")
    ]
    if not objects:
        pytest.skip("no object files of this build under build/")
    for path in objects:
        weak = [line for line in _lines("nm", path) if line.split()[-2] in ("W", "V", "u")]
        assert not weak, f"{path.name}: {weak[:3]}"


def test_record_names_what_was_built(cpu_library: Path) -> None:
    record = _native.build_record()
    assert "d2v_cpu" in record["built"]
    assert record["isa"] in record["isa_levels"]
    for name in (_native.CPU_LIBRARY, _native.MODULE):
        assert name not in _native.load_errors()
