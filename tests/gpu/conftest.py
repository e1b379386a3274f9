"""Where the GPU tests run: on an NVIDIA GPU; or, with --emulated, on the CPU through Triton's interpreter and the CUDA
sources compiled for the CPU, for the part of them that needs no GPU. Otherwise they skip.

Nothing here or in these files needs more than torch, numpy and pytest (`--confcutdir` of this folder).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate
from torch import Tensor

from d2v_kernels import registry, use_backend

HERE = Path(__file__).parent
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NOT_GPU = "test_program.py"  # tests of the program that runs these tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated", metavar="LIBRARY", help="run on the CPU; LIBRARY: the CUDA sources built for it, or -"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.name != NOT_GPU:
            item.add_marker(pytest.mark.gpu)


@dataclass(frozen=True)
class Place:
    """The device under test."""

    device: torch.device
    emulated: bool

    def put(self, *tensors: Any) -> Any:
        """Copies on the device, dense; None stays None."""
        moved = [None if t is None else t.to(self.device, copy=True) for t in tensors]
        return moved[0] if len(moved) == 1 else moved

    def need(self, op: str, backend: str, dtype: torch.dtype, *traits: str, more: tuple[torch.dtype, ...] = ()) -> None:
        """Skips with the backend's own reasons where it cannot run this."""
        case = registry.Case(op, self.device.type, (dtype, *more), traits)
        reasons = next(b for b in registry.backends() if b.name == backend).why_not(case)
        if reasons:
            pytest.skip("; ".join(reasons))


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Place:
    library = request.config.getoption("--emulated", None)
    if library is not None:
        from benchmarks.gpu import emulator

        emulator.install(None if library == "-" else Path(library))
        return Place(torch.device("cpu"), True)
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU (run `make gpu` where there is one)")
    return Place(torch.device("cuda", torch.cuda.current_device()), False)


@pytest.fixture(scope="session")
def gpu(place: Place) -> torch.device:
    """The device, for tests that mean nothing without one."""
    if place.emulated:
        pytest.skip("needs a GPU: streams, graphs and device memory are not emulated")
    return place.device


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest, place: Place) -> Any:
    with use_backend(request.param):
        yield request.param


def on_cpu(results: Any) -> list[Tensor]:
    return [t.detach().cpu() for t in ([results] if isinstance(results, Tensor) else results)]


def compare(got: Any, careful: Any, truth: Any, factor: float = 8.0) -> None:
    """Every result is about as near to float64 as a careful float32 computation."""
    for x, c, y in zip(on_cpu(got), on_cpu(careful), on_cpu(truth), strict=True):
        assert_accurate(x, c.to(x.dtype), y, factor=factor)


def both(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """A reference body in float32 and in float64 on the CPU, tensors of `arguments` widened."""

    def wide(x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, Tensor):
            return x.cpu().to(dtype) if x.is_floating_point() else x.cpu()
        return [wide(t, dtype) for t in x] if isinstance(x, list) else x

    return tuple(function(*(wide(x, d) for x in arguments)) for d in (torch.float32, torch.float64))  # type: ignore
