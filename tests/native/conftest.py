"""Where the native code is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_kernels import _native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """File of the CPU library; without it there is nothing to test."""
    path = _native.LIB / f"{_native.CPU_LIBRARY}.so"
    if not path.is_file():
        pytest.skip(f"native code is not built: {_native.load_errors().get(_native.CPU_LIBRARY)}")
    return path


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, which sees the environment from its start."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
