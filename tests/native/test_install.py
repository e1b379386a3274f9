"""An installation without tools keeps the Python sources working and says what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
SOURCES = (*FILES, "cmake", "csrc", "d2v_kernels", "d2v")


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
    assert "native code is required, but: expected torch 2.10 or newer, found none under /nonexistent" in done.stderr


def _build(source: Path, **environment: str) -> str:
    """What a build that must fail says."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"], cwd=source, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr


def _programs_without(folder: Path, *names: str) -> str:
    """A PATH of links to all programs but some; for `find_tool`, which also looks beside Python, one must be hidden
    there by other means."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            if program.name not in names:
                link = folder / program.name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return str(folder)


def test_a_torch_that_is_too_old_is_named(tmp_path: Path) -> None:
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    old = str(tmp_path / "torch")
    said = _build(_copy_sources(tmp_path / "source"), D2V_TORCH=old, D2V_REQUIRE_NATIVE="1")
    assert f"expected torch 2.10 or newer, found torch 2.9.1+cpu under {old}; install torch first" in said


def test_an_architecture_in_the_words_of_nvcc_is_refused(tmp_path: Path) -> None:
    said = _build(_copy_sources(tmp_path / "source"), D2V_CUDA_ARCHS="80-real;sm_90")
    assert said == "d2v: D2V_CUDA_ARCHS: expected numbers, as in 80-real;90-real, got 'sm_90'\n"


def test_required_cuda_without_nvcc_fails(tmp_path: Path) -> None:
    found = _programs_without(tmp_path / "bin", "nvcc")
    said = _build(
        _copy_sources(tmp_path / "source"), PATH=found, D2V_BUILD_CUDA="1", CUDACXX="", CUDA_HOME="/none", CUDA_PATH=""
    )
    assert "D2V_BUILD_CUDA=1, but: CUDA library: no working nvcc" in said
    assert "d2v: CMake could not configure the native build" in said and "Traceback" not in said


@pytest.mark.parametrize("variable", ["D2V_REQUIRE_NATIVE", "D2V_BUILD_CUDA"])
def test_required_native_code_without_cmake_fails(tmp_path: Path, variable: str) -> None:
    source = _copy_sources(tmp_path / "source")
    text = (source / "setup.py").read_text()
    (source / "setup.py").write_text(
        text.replace('"cmake", "ninja"', "").replace('("CMake", "cmake")', '("CMake", "no-cmake")')
    )
    assert "native code is required, but: CMake: none of no-cmake found on PATH" in _build(source, **{variable: "1"})


def test_required_native_code_without_pybind11_fails(tmp_path: Path) -> None:
    """The record of a build without pybind11 ends it, where native code is required."""
    source = _copy_sources(tmp_path / "source")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "pybind11.py").write_text("raise ImportError('hidden')\n")
    build, torch_folder = tmp_path / "build", Path(torch.__file__).parent
    configure = ["cmake", "-S", str(source), "-B", str(build), f"-DD2V_TORCH={torch_folder}", "-DD2V_BUILD_PYBIND=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DD2V_BUILD_CUDA=0"]
    done = subprocess.run(configure, env={**os.environ, "PYTHONPATH": str(hidden)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((build / "build.json").read_text())
    reason = next(text for text in record["missing"] if text.startswith("pybind11 module: no pybind11"))
    check = f"import json, setup_checks; setup_checks.check_record(json.load(open({str(build / 'build.json')!r})))"
    body = (source / "setup.py").read_text()
    (source / "setup_checks.py").write_text(body[: body.rindex("\nsetup(")])
    for required, code in (("1", 1), ("0", 0), ("", 0)):
        done = subprocess.run(
            [sys.executable, "-c", check], cwd=source, env={**os.environ, "D2V_REQUIRE_NATIVE": required},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code
        assert (f"native code is required, but: {reason}" in done.stderr) == bool(code)


@pytest.mark.parametrize(("variable", "value"), [("D2V_REQUIRE_NATIVE", "yes"), ("D2V_BUILD_CUDA", "on")])
def test_a_value_that_means_nothing_is_refused(tmp_path: Path, variable: str, value: str) -> None:
    said = _build(_copy_sources(tmp_path / "source"), **{variable: value})
    assert f"d2v: {variable}: expected one of" in said and f"got {value!r}" in said


FIRST_USE = """
import sys, warnings, torch
import d2v_kernels as dk
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        dk.gelu(torch.ones(3))
        dk.average_layers([torch.ones(1, 2, 3)], norm="none")
print(len(caught), *(str(w.message) for w in caught if w.category is RuntimeWarning))
"""


def test_the_first_use_without_native_code_warns(tmp_path: Path) -> None:
    source = _copy_sources(tmp_path / "source")
    _pip_install(source, tmp_path / "site", D2V_TORCH="/nonexistent")

    def use(**environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", FIRST_USE], cwd=tmp_path / "site", capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = use()
    assert said.startswith("1 d2v_kernels runs slower on cpu than it could: libd2v_cpu: not built: expected torch 2.10")
    assert "_native: not built" in said and "pip install cmake ninja pybind11" in said
    assert use(D2V_KERNELS_BACKEND="reference").split() == ["0"]


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"PATH": "/nonexistent", "CXX": ""}, "C++ compiler"),
        ({"D2V_TORCH": "/nonexistent"}, "expected torch 2.10 or newer"),
    ],
    ids=["no compiler", "no torch"],
)
def test_source_only(tmp_path: Path, environment: dict[str, str], missing: str) -> None:
    source = _copy_sources(tmp_path / "source")
    said = _pip_install(source, tmp_path / "site", **environment)
    assert f"native code is not built: {missing}" in said
    assert "d2v-0.1.0-py3-none-any.whl" in said, "the name of the wheel says that there is no native code in it"
    report = _info(tmp_path / "site")
    assert missing in str(report["build"])
    assert missing in str(report["not_loaded"])
    assert {row["reference"] for row in report["operators"]} == {"chosen"}  # type: ignore[attr-defined]
