"""Triton kernels for NVIDIA GPUs; on the CPU only in Triton's interpreter, for tests.

Nothing here imports Triton before a kernel is asked for: `import d2v_kernels` works without it and pays nothing for it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _define, _env
from .._checks import dtype_name
from ..registry import Backend, Case

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORMS = ("none", "layer", "instance", "batch")
_WIDEST = {"attention": ("heads", 128), "dropout_add_layer_norm": ("rows", 4096)}
"""By the operators' names: what one program holds, and of how many channels at most, which the trait says."""


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def import_error() -> str:
    """Why the kernels cannot be imported; empty when they can. The first call imports Triton."""
    try:
        _module("runtime")
    except Exception as error:  # a broken Triton fails in many ways, and each of them is a reason not to use it
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return ""


def _body(op: str) -> Callable[..., Any]:
    """Imports the kernels at the first call."""
    return _define.guarded(op, lambda *arguments: getattr(_module(_define.TRITON_FAMILIES[op]), op)(*arguments))


def _limits(case: Case) -> list[str]:
    interpreted = _env.triton_interpreter()
    if case.device not in ("cpu", "cuda"):
        return [f"triton runs on cuda, not on {case.device}"]
    if case.device == "cpu" and not interpreted:
        return ["triton runs on cuda; on the cpu only in its interpreter (TRITON_INTERPRET=1 before the first use)"]
    reasons = [f"triton has no {dtype_name(d)} kernels" for d in case.dtypes if d not in _DTYPES]
    reasons += _trait_limits(case)
    if not reasons and import_error():
        reasons.append(import_error())
    if not reasons and (case.device == "cpu") != _module("runtime").IS_INTERPRETED:
        kind = "the interpreter" if case.device == "cuda" else "a GPU"
        reasons.append(f"triton's kernels were imported for {kind} (TRITON_INTERPRET), this call is on {case.device}")
    return reasons


def _trait_limits(case: Case) -> list[str]:
    for family, (what, widest) in _WIDEST.items():
        if case.op.startswith(family):
            too_wide = [n for n in case.traits if int(n) > widest]
            return [f"triton has {what} of up to {widest} channels, not of {n}" for n in too_wide]
    return [f"triton normalises by {', '.join(_NORMS)}, not by {n}" for n in case.traits if n not in _NORMS]


def _make_ema_plan(averages: Sequence[Tensor], sources: Sequence[Tensor], copies: Sequence[Tensor], *_: Any) -> Any:
    return _module("ema").TritonPlan(averages, sources, copies)


def backend() -> Backend:
    """The backend, for the operators defined so far."""
    return Backend("triton", {op: _body(op) for op in _define.TRITON_FAMILIES}, _limits, _make_ema_plan)
