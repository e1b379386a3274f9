"""Where Triton is, and what it compiled for GPUs that are not there.

The folder is not called `triton`: tests/ is on the import path, and would then answer for a Triton that is missing.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.workers import make_once

from d2v_kernels import _env

ROOT = Path(__file__).resolve().parents[2]
OLDER = Path(sys.prefix) / "triton-3.6.0"  # pip install --no-deps --target of the version that GPU clusters have
ARCHITECTURES = (80, 90, 100)
OLDER_ARCHITECTURES = (90,)

# The tests in `interpreted` are for the child process that test_interpreted.py starts.
collect_ignore = [] if _env.triton_interpreter() else ["interpreted"]


def run_child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python with one thread, the tests' modules and these variables."""
    path = os.pathsep.join([environment.pop("BEFORE", ""), str(ROOT / "tests"), str(ROOT)]).strip(os.pathsep)
    variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)


@dataclass(frozen=True)
class Compiled:
    """Kernels of one Triton: report.json and the files beside it."""

    folder: Path
    version: str
    kernels: list[dict]
    is_older: bool


@pytest.fixture(scope="session")
def needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")


@pytest.fixture(scope="session")
def triton_cache(shared_folder: Path) -> str:
    return str(shared_folder / "triton-cache")


def compile_kernels(
    module: str, architectures: Sequence[int], before: str, cache: str, folder: Path
) -> Path:  # fmt: skip
    """The folder into which a module of the tests has compiled kernels; before: where another Triton is, or ""."""
    targets = map(str, architectures)
    done = run_child("-m", module, str(folder), *targets, BEFORE=before, TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session", params=["installed", "3.6.0"])
def compiled(request, needs_triton, triton_cache, shared_folder, tmp_path_factory) -> Compiled:
    before, architectures = "", ARCHITECTURES
    if request.param != "installed":
        if not OLDER.is_dir():
            pytest.skip(f"no triton {request.param}: pip install --no-deps --target {OLDER} triton=={request.param}")
        before, architectures = str(OLDER), OLDER_ARCHITECTURES

    make = functools.partial(compile_kernels, "support.triton_compile", architectures, before, triton_cache)
    folder = make_once(shared_folder, f"triton-{request.param}", lambda: make(tmp_path_factory.mktemp("kernels")))
    report = json.loads((folder / "report.json").read_text())
    if before:
        assert report["triton"] == request.param
    return Compiled(folder, report["triton"], report["kernels"], bool(before))
