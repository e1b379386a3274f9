"""Fixtures: the CUDA toolkit of this machine, and what is built with it once for all tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from codegen.toolchain import Builds, Toolkit, find_toolkit, plan_builds


@pytest.fixture(scope="session")
def toolkit() -> Toolkit:
    found = find_toolkit()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def builds(toolkit: Toolkit, shared_folder: Path) -> Iterator[Builds]:
    folder = shared_folder / "codegen"
    folder.mkdir(exist_ok=True)
    all_builds = Builds(plan_builds(toolkit, folder), folder)
    yield all_builds
    all_builds.close()


@pytest.fixture(scope="session")
def emulated_library(builds: Builds) -> ctypes.CDLL:
    library = ctypes.CDLL(str(builds["emulated"]))
    library.d2v_emu_set_order.argtypes = [ctypes.c_uint64]
    return library


@pytest.fixture(scope="module")
def emulated(emulated_library: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """The library that registers `torch.ops.d2v_emu`: the CUDA operators, run by the engine on CPU tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield emulated_library
    emulated_library.d2v_emu_set_order(0)
    torch.set_num_threads(threads)
