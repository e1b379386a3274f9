"""csrc/core as a CMake package: the example outside this tree finds it, builds and gives the right numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, "CXXFLAGS": ""})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_the_example_builds_and_runs(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("CMake or Ninja is not installed")
    prefix = tmp_path / "a prefix"
    # One instruction level: the others are compiled by every build.
    _run(
        "cmake", "-S", ROOT, "-B", tmp_path / "core", "-G", "Ninja", "-DD2V_CORE_ONLY=ON", "-DD2V_X86_LEVELS=OFF",
        "-DCMAKE_BUILD_TYPE=Release",
    )  # fmt: skip
    _run("cmake", "--build", tmp_path / "core")
    _run("cmake", "--install", tmp_path / "core", "--prefix", prefix)
    shutil.rmtree(tmp_path / "core")  # nothing of the build folder is needed
    example = shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "example")
    assert len((example / "targets.cpp").read_text().splitlines()) <= 40
    _run("cmake", "-S", example, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    _run("cmake", "--build", tmp_path / "build")

    head, names, *rows = _run(tmp_path / "build" / "targets").splitlines()
    assert (head, names) == ("base: 4 of 8 masked", "time masked target")
    ramp = np.arange(0.0, 16.0, 2.0)  # channel 0 of the first layer; the second is a multiple of it
    expected = np.mean([(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in (ramp, 10 * ramp)], axis=0)
    assert [int(row.split()[1]) for row in rows].count(1) == 4
    np.testing.assert_allclose([float(row.split()[2]) for row in rows], expected, atol=1e-4)
