"""Builds the native libraries with CMake and Ninja; project metadata is in pyproject.toml.

Environment variables:
    D2V_TORCH       folder of the torch package to take headers from (default: the installed one)
    D2V_BUILD_CUDA  auto (where nvcc is found), 0 (never) or 1 (fail without nvcc)
    D2V_REQUIRE_NATIVE  1: fail where the CPU library or the pybind11 module cannot be built
    D2V_CUDA_ARCHS  for example "90-real;100"
    D2V_NAMESPACE   of the native operators, for a copy of the package under another name: scripts/build_hub.py
    D2V_BUILD_TYPE  Release (default), RelWithDebInfo or Debug

A missing tool (C++ compiler, CMake, Ninja, torch) does not fail the installation unless one of the two variables asks
for it: it leaves the Python sources, which run on the reference backend, and a record that `python -m d2v_kernels.info`
shows; the wheel is tagged py3-none-any, and the first use of an operator warns. An error of the compiler does fail.

A wheel without the pybind11 module serves every Python: `pip wheel . -C--build-option=--python-tag=py3`.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "d2v_kernels"


class MissingTool(Exception):
    """Something that the native build needs is not on this machine."""


def find_tool(what: str, *names: str) -> str:
    """A program on PATH or beside this Python (a virtual environment that is not activated)."""
    for name in names:
        if path := shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts")):
            return path
    raise MissingTool(f"{what}: none of {', '.join(names)} found on PATH")


def find_compiler() -> str:
    """The C++ compiler that CMake would take."""
    if named := os.environ.get("CXX"):
        return named
    return find_tool("C++ compiler", "c++", "g++", "clang++")


def find_torch() -> Path:
    """The torch package's folder, without importing it (slow, and absent in an isolated build)."""
    folders = []
    if named := os.environ.get("D2V_TORCH"):
        folders = [Path(named)]
    else:
        spec = importlib.util.find_spec("torch")
        if spec and spec.origin:
            folders.append(Path(spec.origin).parent)
        # pip's build isolation changes sys.path only: the environment to install into is still this interpreter's.
        folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    found = []
    for folder in dict.fromkeys(folders):
        version = torch_version(folder)
        is_new = [int(n) for n in re.findall(r"\d+", version)[:2]] >= [2, 10] or not version
        if is_new and (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
        what = f"torch {version}{' without headers' * is_new}" if version else "none"
        found.append(f"{what} under {folder}")
    raise MissingTool(f"expected torch 2.10 or newer, found {', '.join(found)}; install torch first, or set D2V_TORCH")


def torch_version(folder: Path) -> str:
    """The version of the torch in a folder; empty where there is none."""
    file = folder / "version.py"
    found = re.search(r"__version__ = ['\"]([^'\"]+)", file.read_text()) if file.is_file() else None
    return found[1] if found else ""


class CMakeBuild(build_ext):
    """Configures, builds and installs into d2v_kernels/lib."""

    def run(self) -> None:
        check_environment()
        base = ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()
        lib = base / PACKAGE / "lib"
        lib.mkdir(parents=True, exist_ok=True)
        # Beside the place, so that a file moves there in one step: until the build has succeeded the old libraries
        # stay, and programs that have them open keep them.
        with tempfile.TemporaryDirectory(prefix=".lib-", dir=lib.parent) as folder:
            new = Path(folder)
            try:
                self.build_native(new)
            except MissingTool as error:
                if needs_native() or os.environ.get("D2V_BUILD_CUDA") == "1":
                    raise SystemExit(f"d2v: native code is required, but: {error}") from None
                print(f"d2v: native code is not built: {error}", file=sys.stderr)
                record = {"built": [], "missing": [str(error)]}
                (new / "build.json").write_text(json.dumps(record, indent=2) + "\n")
            check_record(json.loads((new / "build.json").read_text()))
            replace_files(new, lib)

    def build_native(self, lib: Path) -> None:
        torch = find_torch()
        cmake, ninja = find_tool("CMake", "cmake"), find_tool("Ninja", "ninja")
        find_compiler()
        portable = wants_portable_wheel(self.distribution)
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # CMake remembers what it found: start afresh when the torch, the interpreter or a tool is another one.
        key = "\n".join([str(torch), sys.executable, cmake, ninja, os.environ.get("CXX", "")])
        stamp = build / "environment.txt"
        if not stamp.is_file() or stamp.read_text() != key:
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
        arguments = [
            cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('D2V_BUILD_TYPE') or 'Release'}",
            f"-DD2V_TORCH={torch}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DD2V_BUILD_CUDA={os.environ.get('D2V_BUILD_CUDA') or 'auto'}",
            f"-DD2V_BUILD_PYBIND={'OFF' if portable else 'ON'}",
            f"-DD2V_NAMESPACE={os.environ.get('D2V_NAMESPACE') or ''}",
        ]  # fmt: skip
        if archs := os.environ.get("D2V_CUDA_ARCHS"):
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        if subprocess.run([str(a) for a in arguments], check=False).returncode:
            raise SystemExit("d2v: CMake could not configure the native build; it says why above")
        stamp.write_text(key)
        subprocess.run([cmake, "--build", str(build)], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(lib)], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def check_environment() -> None:
    """Ends the build for a value that would be passed over."""
    for name, values in (("D2V_BUILD_CUDA", ("auto", "0", "1")), ("D2V_REQUIRE_NATIVE", ("0", "1"))):
        value = os.environ.get(name)
        if value and value not in values:
            raise SystemExit(f"d2v: {name}: expected one of {', '.join(values)}, got {value!r}")
    for arch in filter(None, os.environ.get("D2V_CUDA_ARCHS", "").split(";")):
        if not re.fullmatch(r"(\d+[af]?(-real|-virtual)?)|all|all-major|native", arch):
            raise SystemExit(f"d2v: D2V_CUDA_ARCHS: expected numbers, as in 80-real;90-real, got {arch!r}")


def needs_native() -> bool:
    """True where D2V_REQUIRE_NATIVE forbids leaving native code out."""
    return os.environ.get("D2V_REQUIRE_NATIVE") == "1"


def check_record(record: dict) -> None:
    """Says what was left out of a build; ends it where that is required."""
    for missing in record["missing"]:
        print(f"d2v: left out: {missing}", file=sys.stderr)
        if needs_native() and missing.startswith("pybind11 module: no"):
            raise SystemExit(f"d2v: native code is required, but: {missing}")


def replace_files(new: Path, old: Path) -> None:
    """Moves the files of `new` into `old` and removes what else `old` holds."""
    names = {path.name for path in new.iterdir()}
    for name in sorted(names):
        (new / name).replace(old / name)
    for path in old.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def wants_portable_wheel(distribution: Distribution) -> bool:
    """True where the Python tag py3 is asked for by name (it also is the option's default value), and for copies."""
    return distribution.get_option_dict("bdist_wheel").get("python_tag", ("", ""))[1] == "py3" or bool(
        os.environ.get("D2V_NAMESPACE")
    )


class PlatformWheel(bdist_wheel):
    """Tags by what was built: py3-none-<platform> without the pybind11 module, as the libraries use no Python API;
    py3-none-any without any native code."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        record = Path(self.get_finalized_command("build_py").build_lib) / PACKAGE / "lib" / "build.json"
        built = json.loads(record.read_text())["built"] if record.is_file() else None
        if built == []:
            return "py3", "none", "any"
        if wants_portable_wheel(self.distribution) or (built is not None and "_native" not in built):
            return "py3", "none", platform
        return python, abi, platform


setup(
    ext_modules=[Extension(f"{PACKAGE}.lib._native", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
