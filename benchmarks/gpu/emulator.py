"""Stands in for a GPU: the CUDA operators compiled for the CPU take the place of the native backend, and Triton's
interpreter that of its compiler. For `--dry` runs and their tests; nothing that it runs is a measurement.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from d2v_kernels import registry

from ..harness.record import ROOT

BUILD = ROOT / "build" / "emulator"
LIBRARY = BUILD / "libd2v_emu.so"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORMS = ("none", "layer", "instance")
_MISSING = "the CUDA sources are not built for the CPU"
_loaded: list[ctypes.CDLL] = []


def cmake(folder: Path, *options: str) -> list[list[str]]:
    """Configures and builds in a folder."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DD2V_TORCH={Path(torch.__file__).parent}", *options]
    return [configure, ["cmake", "--build", str(folder), "--parallel"]]


def build_commands() -> list[list[str]]:
    """What builds the emulated library; needs CMake, Ninja, a C++ compiler and the headers of a CUDA toolkit."""
    configure, build = cmake(BUILD, "-G", "Ninja", "-DD2V_BUILD_EMULATOR=ON", "-DD2V_BUILD_PYBIND=OFF")
    return [configure, [*build, "--target", "d2v_emu"]]


def is_current() -> bool:
    """True where the library is built and no source is newer."""
    if not LIBRARY.exists():
        return False
    built = LIBRARY.stat().st_mtime
    return all(p.stat().st_mtime <= built for p in (ROOT / "csrc").rglob("*") if p.is_file())


def install(library: Path | None) -> None:
    """Makes "native" on CPU tensors the emulated CUDA operators of this library; without one it can run nothing."""
    if library is None:
        nothing = dict.fromkeys(registry.OPERATORS, _nothing)
        registry.register_backend(registry.Backend("native", nothing, lambda case: [_MISSING]))
        return
    if not _loaded:
        _loaded.append(ctypes.CDLL(str(library)))
    found = [op for op in registry.OPERATORS if hasattr(torch.ops.d2v_emu, op)]
    bodies = {op: getattr(torch.ops.d2v_emu, op) for op in found}
    registry.register_backend(registry.Backend("native", bodies, _limits))


def _nothing(*arguments: object) -> None:
    raise NotImplementedError(_MISSING)


def _limits(case: registry.Case) -> list[str]:
    reasons = [] if case.device == "cpu" else [f"emulated, so on cpu, not on {case.device}"]
    if case.op == "average_layers":
        reasons += [f"native normalises by {', '.join(_NORMS)}, not by {n}" for n in case.traits if n not in _NORMS]
    return reasons + [f"native has no {d}" for d in case.dtypes if d not in _DTYPES]
