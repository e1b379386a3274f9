"""Every built file loads on RHEL 8 (manylinux_2_28): it asks for no newer version of a system library."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from d2v_kernels import _native

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
"""Of the manylinux_2_28 policy (PEP 600, as auditwheel has it)."""
BUILT = sorted(_native.LIB.glob("*.so"))


def too_new(path: Path) -> list[str]:
    """Symbols of a file that manylinux_2_28 does not have, with their versions."""
    table = subprocess.run(["objdump", "-T", str(path)], capture_output=True, text=True, check=True).stdout
    found = []
    for line in table.splitlines():
        match = re.search(r"\*UND\*.*\((GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\) +(\S+)$", line.replace("\t", " "))
        if match and tuple(map(int, match[2].split("."))) > NEWEST[match[1]]:
            found.append(f"{match[3]}@{match[1]}_{match[2]}")
    return found


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.parametrize("path", BUILT, ids=lambda p: p.name.split(".")[0])
def test_needs_nothing_newer(path: Path) -> None:
    assert too_new(path) == []


@pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("c++") is None, reason="no objdump or no compiler")
def test_newer_symbols_are_seen(tmp_path: Path) -> None:
    """A library without the stubs, on a system whose functions are newer."""
    source = tmp_path / "new.cpp"
    source.write_text('#include <sstream>\nextern "C" int use() { return (int)std::stringstream().str().size(); }\n')
    subprocess.run(["c++", "-shared", "-fPIC", "-o", tmp_path / "new.so", source], check=True)
    table = subprocess.run(["objdump", "-T", tmp_path / "new.so"], capture_output=True, text=True, check=True).stdout
    if "GLIBCXX_3.4.26" not in table:
        pytest.skip("this compiler's library is not newer than GCC 8's")
    assert any(symbol.endswith("@GLIBCXX_3.4.26") for symbol in too_new(tmp_path / "new.so"))


@pytest.mark.parametrize("path", BUILT, ids=lambda p: p.name.split(".")[0])
def test_kernel_abi_check(path: Path) -> None:
    """The kernel hub's own checker, where it is installed; it knows no pybind11 modules."""
    checker = pytest.importorskip("kernel_abi_check", reason="kernel-abi-check is not installed")
    checked = checker.ObjectFile(str(path))
    assert checked.check_manylinux("manylinux_2_28") == []
    if not path.name.startswith(_native.MODULE):
        assert checked.check_python_abi("3.10") == []
