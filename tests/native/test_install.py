"""An installation without tools keeps the Python sources working and says what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "csrc", "d2v_kernels", "d2v", "README.md", "LICENSE")


def _copy_sources(to: Path) -> Path:
    to.mkdir()
    ignore = shutil.ignore_patterns("lib", "__pycache__", "*.so")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        elif source.is_file():
            shutil.copy2(source, to / name)
    return to


def _pip_install(source: Path, target: Path, **environment: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _info(target: Path) -> dict[str, object]:
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-m", "d2v_kernels.info", "--json"],
        cwd=target, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("variable", ["D2V_REQUIRE_NATIVE", "D2V_BUILD_CUDA"])
def test_required_native_code_fails(tmp_path: Path, variable: str) -> None:
    """Not a silent fallback: the build that must have native code ends with the reason."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"], cwd=_copy_sources(tmp_path / "source"),
        env={**os.environ, "D2V_TORCH": "/nonexistent", variable: "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "native code is required, but: torch 2.10 or newer" in done.stderr


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"PATH": "/nonexistent", "CXX": ""}, "C++ compiler"),
        ({"D2V_TORCH": "/nonexistent"}, "torch 2.10 or newer"),
    ],
    ids=["no compiler", "no torch"],
)
def test_source_only(tmp_path: Path, environment: dict[str, str], missing: str) -> None:
    source = _copy_sources(tmp_path / "source")
    said = _pip_install(source, tmp_path / "site", **environment)
    assert f"native code is not built: {missing}" in said
    report = _info(tmp_path / "site")
    assert missing in str(report["build"])
    assert missing in str(report["not_loaded"])
    assert {row["reference"] for row in report["operators"]} == {"chosen"}  # type: ignore[attr-defined]
