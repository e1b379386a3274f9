"""C++ on CPUs and CUDA C++ on NVIDIA GPUs: loads `d2v_kernels/lib` and keeps the reason when a part does not load.

`libd2v_cpu` brings the operators `torch.ops.d2v_native.*`, `libd2v_cuda` their CUDA kernels, and the module `_native`
the objects that live longer than a call. Each is optional: without them the reference backend runs.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _checks as check
from ._device_table import DeviceTable
from ._env import highest_isa
from .registry import OPERATORS, Backend, Case

LIB = Path(__file__).resolve().parent / "lib"
CPU_LIBRARY, CUDA_LIBRARY, MODULE = "libd2v_cpu", "libd2v_cuda", "_native"
TYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # of csrc/core/dtype.h
NO_COPY = -1
NAMESPACE = "d2v_native" if __package__ == "d2v_kernels" else f"{__package__}_native"  # D2V_NAMESPACE of the build
_NORMS = ("none", "layer", "instance", "batch")
SPLIT = 4  # an average in two halves: kSplit of csrc/core/ema.h


class Module(Protocol):
    """The pybind11 module: csrc/python/module.cpp."""

    EmaPlan: Any
    MaskSampler: Any

    def build_info(self) -> dict[str, Any]:
        """Compiler and flags."""


_libraries: dict[str, ctypes.CDLL] = {}
_errors: dict[str, str] = {}
_module: Module | None = None


def load() -> None:
    """Loads what there is; called once, when the package is imported."""
    global _module
    highest_isa()  # refuses names that the library would take for its highest level
    _errors.clear()
    _load_library(CPU_LIBRARY)
    if torch.version.cuda is None:
        _errors[CUDA_LIBRARY] = f"torch {torch.__version__} has no CUDA"
    elif CPU_LIBRARY not in _libraries:
        _errors[CUDA_LIBRARY] = f"{CPU_LIBRARY}, which has the schemas, is not loaded"
    else:
        _load_library(CUDA_LIBRARY)
    try:
        _module = importlib.import_module(f"{__package__}.lib.{MODULE}")
    except ImportError as error:
        _errors[MODULE] = _not_built(MODULE) or str(error)


def _load_library(name: str) -> None:
    if name in _libraries:
        return
    # CMake's MODULE libraries end in .so on macOS, too.
    path = LIB / f"{name}.so"
    if not path.is_file():
        _errors[name] = _not_built(name)
        return
    try:
        _libraries[name] = ctypes.CDLL(str(path))
    except OSError as error:
        _errors[name] = str(error)


def _not_built(name: str) -> str:
    """Reasons of the build why a file is not there; empty when it is there."""
    if any(LIB.glob(f"{name}*.so")):
        tag = sys.implementation.cache_tag
        return f"no file for this Python ({tag}) in {LIB}" if name == MODULE and not _files_for_this_python() else ""
    record = build_record()
    if not record:
        where = f"not built: {LIB} has no build record; install the package with pip from its sources"
        return f"{where}, or, where it is installed, start Python in another folder than that of the sources"
    reasons = record.get("missing", [])
    kind = {CUDA_LIBRARY: "CUDA library", MODULE: "pybind11 module"}.get(name, "")
    own = [r for r in reasons if kind and r.startswith(kind)]
    return "not built: " + "; ".join(own or reasons or ["no reason recorded"])


def _files_for_this_python() -> list[Path]:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return [p for suffix in suffixes if (p := LIB / f"{MODULE}{suffix}").is_file()]


def _operators() -> Any:
    return getattr(torch.ops, NAMESPACE)


def native_module() -> Module | None:
    """The pybind11 module, or None where it is not built or does not load."""
    return _module


def load_errors() -> dict[str, str]:
    """Reason for each native part that is not loaded."""
    return dict(_errors)


def is_loaded(library: str) -> bool:
    """True once a library (`CPU_LIBRARY`, `CUDA_LIBRARY`) is loaded."""
    return library in _libraries


def build_record() -> dict[str, Any]:
    """What the build wrote: parts built and missing, compiler, instruction levels, CUDA version and architectures."""
    try:
        record: dict[str, Any] = json.loads((LIB / "build.json").read_text())
    except FileNotFoundError:
        return {}
    if CPU_LIBRARY in _libraries:
        record["isa"] = cpu_level()
    return record


@functools.cache
def cpu_level() -> str:
    """Instruction level of the CPU kernels; empty where their library is not loaded."""
    if CPU_LIBRARY not in _libraries:
        return ""
    _libraries[CPU_LIBRARY].d2v_cpu_isa.restype = ctypes.c_char_p
    level: bytes = _libraries[CPU_LIBRARY].d2v_cpu_isa()
    return level.decode()


class NativePlan:
    """Tables of `update_ema_` for fixed tensors, which it holds; see `EmaPlan`."""

    def __init__(
        self, module: Module, entries: Sequence[tuple[int, ...]], tensors: list[Tensor], device: torch.device
    ) -> None:
        self._device, self._on_host = device, device.type == "cpu"
        libraries = [library._name for library in _libraries.values()]
        self._plan = module.EmaPlan(entries, libraries, _operators().hold_tensors(tensors))
        self.moved: Callable[[], bool] = self._plan.moved
        """True when the memory of a tensor lies elsewhere than when the plan was made."""
        if device.type == "cuda":
            table = bytearray(self._plan.device_table())
            host = torch.frombuffer(table, dtype=torch.uint8) if table else None
            self._table = None if host is None else DeviceTable("update_ema_", host, device)

    def step(self, weight: float, weight_tensor: Tensor | None) -> None:
        """One update; `weight_tensor`, a 0-D float64 tensor on the device, replaces `weight`."""
        check.weight("update_ema_", weight_tensor, self._device)
        if self._on_host:
            self._plan.step(weight if weight_tensor is None else float(weight_tensor))
        elif self._table is not None:
            address = 0 if weight_tensor is None else weight_tensor.data_ptr()
            stream, table = torch.cuda.current_stream(self._device).cuda_stream, self._table.on_current_stream()
            self._plan.step_device(weight, table.data_ptr(), address, self._device.index, stream)


def make_ema_plan(
    averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor], low: Sequence[Tensor] = ()
) -> NativePlan | None:
    """A plan for tensors that `update_ema_` has accepted; None where it needs the list operator.

    That is without the module or the device's library, and for tensors of different layouts.
    """
    if _module is None or not averages:
        return None
    device = averages[0].device
    library = {"cpu": CPU_LIBRARY, "cuda": CUDA_LIBRARY}.get(device.type, "")
    if library not in _libraries:
        return None
    entries = plan_entries(averages, sources, copies, low)
    tensors = [*averages, *low, *sources, *copies]
    return None if entries is None else NativePlan(_module, entries, tensors, device)


def plan_entries(
    averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor], low: Sequence[Tensor]
) -> list[tuple[int, ...]] | None:
    """Addresses, counts and types for the module's EmaPlan; None for tensors of different layouts."""
    entries: list[tuple[int, ...]] = []
    third: Sequence[Tensor | None] = low or copies or [None] * len(averages)
    for average, source, copy in zip(averages, sources, third, strict=True):
        if not check.lies_flat(*(t for t in (average, source, copy) if t is not None)):
            return None
        if not low and (average.dtype == torch.float64) != (source.dtype == torch.float64):
            return None
        types = [NO_COPY if t is None else SPLIT if low else TYPE_NUMBERS[t.dtype] for t in (average, copy)]
        addresses = (average.data_ptr(), source.data_ptr(), 0 if copy is None else copy.data_ptr())
        if average.numel() > 0:
            entries.append((*addresses, average.numel(), types[0], TYPE_NUMBERS[source.dtype], types[1]))
    return entries


def _body(op: str) -> Callable[..., Any]:
    run: Any = getattr(getattr(_operators(), op, None), "default", None)

    def call(*arguments: Any) -> Any:
        try:
            return run(*arguments)
        except RuntimeError as error:
            # What native code finds is a value out of range. Its text, after the place in the C++ source, begins with
            # the operator's name.
            _, name, text = str(error).split("\n", 1)[0].partition(f"{op}: ")
            if name:
                raise ValueError(name + text) from None
            raise

    return call


def _limits(case: Case) -> list[str]:
    library = {"cpu": CPU_LIBRARY, "cuda": CUDA_LIBRARY}.get(case.device)
    if library is None:
        return [f"native runs on cpu and cuda, not on {case.device}"]
    if library not in _libraries:
        return [f"{library} is not loaded ({_errors.get(library, 'unknown reason')})"]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{case.op}", case.device.upper()):
        return [f"native has no {case.op} on {case.device}"]
    unknown = [check.dtype_name(d) for d in case.dtypes if d not in TYPE_NUMBERS]
    reasons = [f"native has no {', '.join(unknown)}"] if unknown else []
    if case.op == "update_split_ema_" and torch.float64 in case.dtypes:
        reasons.append("native's averages in two halves have no float64 sources")
    if case.op == "average_layers":
        reasons += [f"native normalises by {', '.join(_NORMS)}, not by {n}" for n in case.traits if n not in _NORMS]
    return reasons


def _missing(device: str) -> list[str]:
    """Parts that did not load, with the reasons, of those that run on a device type."""
    parts = {"cpu": (CPU_LIBRARY, MODULE), "cuda": (CUDA_LIBRARY, MODULE)}.get(device, ())
    return [f"{part}: {_errors[part]}" for part in parts if part in _errors]


def backend() -> Backend:
    """The backend, for the operators defined so far; loads what there is."""
    load()
    return Backend("native", {op: _body(op) for op in OPERATORS}, _limits, make_ema_plan, _missing)
