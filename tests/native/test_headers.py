"""The operators' registration compiles against the headers of every torch that the package is for.

The native library is built against one torch and loads under others, but a user's build meets the headers of his. They
are the same on every platform, so they are taken from the smallest wheels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from codegen.toolchain import find_toolkit

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"2.10.0": "macosx_11_0_arm64", "2.11.0": "macosx_11_0_arm64", "2.15.0": "macosx_14_0_arm64"}
"""The oldest, that of the machines the GPU code is measured on, the newest; tests run under one between them."""


def download_headers(version: str, folder: Path) -> Path:
    """Include folder of a torch version; the test is skipped where it cannot be had."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version=311",
        f"--platform={VERSIONS[version]}", f"--dest={folder}", f"torch=={version}",
    ]  # fmt: skip
    # A machine's settings may hold torch back to what lies on it.
    for environment in (os.environ, {**os.environ, "PIP_CONFIG_FILE": os.devnull}):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            break
    else:
        pytest.skip(f"no wheel of torch {version}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/torch/")])
    return folder / "torch" / "include"


@pytest.mark.parametrize("version", VERSIONS)
def test_registration_compiles(version: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    toolkit = find_toolkit()  # without CUDA headers, the files for CPUs alone
    pattern, cuda = ("*_cpu*.cpp", []) if isinstance(toolkit, str) else ("*.cpp", ["-isystem", toolkit.include])
    source = tmp_path / "all.cpp"
    files = sorted((ROOT / "csrc" / "torch").glob(pattern))
    source.write_text("".join(f'#include "{file}"\n' for file in files))
    assert len(files) >= 7
    headers = download_headers(version, tmp_path)
    flags = ["-std=c++17", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    done = subprocess.run([compiler, *flags, "-isystem", headers, *cuda, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
