"""C++ on CPUs and CUDA C++ on NVIDIA GPUs: `torch.ops.d2v_native.*`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import _library
from ..registry import OPERATORS, Backend, Case, LazyBody

_NORMS = ("none", "layer", "instance", "batch")


def _body(op: str) -> Callable[..., Any]:
    packet = getattr(torch.ops.d2v_native, op)
    run = packet.default

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
    if case.device == "cpu":
        library = _library.CPU_LIBRARY
    elif case.device == "cuda":
        library = _library.CUDA_LIBRARY
    else:
        return [f"native runs on cpu and cuda, not on {case.device}"]
    if not _library.is_loaded(library):
        return [f"{library} is not loaded ({_library.load_errors().get(library, 'unknown reason')})"]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"d2v_native::{case.op}", case.device.upper()):
        return [f"native has no {case.op} on {case.device}"]
    return [*_dtype_limits(case), *_norm_limits(case)]


def _dtype_limits(case: Case) -> list[str]:
    unknown = [str(d).removeprefix("torch.") for d in case.dtypes if d not in _library.TYPE_NUMBERS]
    reasons = [f"native has no {', '.join(unknown)}"] if unknown else []
    if case.op == "update_split_ema_" and torch.float64 in case.dtypes:
        reasons.append("native's averages in two halves have no float64 sources")
    return reasons


def _norm_limits(case: Case) -> list[str]:
    if case.op != "average_layers":
        return []
    return [f"native normalises by {', '.join(_NORMS)}, not by {n}" for n in case.traits if n not in _NORMS]


BACKEND = Backend("native", {op: LazyBody(functools.partial(_body, op)) for op in OPERATORS}, _limits)
