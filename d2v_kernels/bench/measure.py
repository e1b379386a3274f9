"""Errors first, then time: what is measured of a case, on a CPU or a GPU.

Every contender's result is compared with the reference in float64 before anything is timed; contenders take turns. On a
GPU each is captured in a CUDA graph that walks through input sets larger than the L2 cache together, and the graphs are
replayed in turn.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import _native, registry
from .case import Call, Case, Place
from .timer import Captured, summarise, take_turns, time_interleaved

Row = dict[str, Any]
BACKENDS = ("native", "triton")
CACHE_SHARE = 4  # input sets together hold so many times the L2 cache


# ---- errors


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest error relative to the largest value; infinite where shapes or NaN differ."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or bool(a.isnan().any()) or bool(b.isnan().any()):
            return math.inf
        if a.numel():
            error = float((a.double() - b.double()).abs().max())
            worst = max(worst, error / max(float(b.double().abs().max()), 1e-30))
    return worst


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def find_truth(case: Case, place: Place) -> Any:
    """The result of the reference on the same inputs, rounded to the case's dtype and then cast to float64."""
    with registry.use_backend("reference"):
        return case.make(replace(place, backends=(), to=torch.float64), 0)["d2v"]()


def takes_part(case: Case, name: str, against: Sequence[str] | None) -> bool:
    """Ours always, opponents where they are asked for; None: all of them, compilers where there is a goal."""
    if against is None:
        return name != "compile" or "compile" in case.goals
    return name.startswith(("d2v", "floor")) or name in against


def settle(
    case: Case, place: Place, against: Sequence[str] | None = None
) -> tuple[list[str], dict[str, str], dict[str, float]]:
    """Contenders that run and are right; why others do not take part; errors against float64 of all that ran.

    Raises:
        RuntimeError: none of ours runs.
    """
    contenders, truth = case.make(place, 0), find_truth(case, place)
    names, reasons, errors = [], {}, {}
    for name, call in contenders.items():
        if not takes_part(case, name, against):
            continue
        backend = name.removeprefix("d2v ")
        if backend in BACKENDS and (why_not := why_not_backend(case, backend, place.device)):
            reasons[name] = "; ".join(why_not)
            continue
        if name.startswith("floor"):
            names.append(name)
            continue
        try:
            with torch.enable_grad():
                result = call()
        except Exception as error:  # out of memory, a compiler that fails: a contender less, not the end of the run
            reasons[name] = reason_of(error)
            continue
        ours = name.startswith("d2v") and case.exact is not None
        view, allowed = (tree_leaves, case.exact or 0.0) if ours else (case.compare, case.tolerance)
        errors[name] = difference(*([t.detach() for t in view(r)] for r in (result, truth)))
        if errors[name] > allowed:
            reasons[name] = f"differs from float64 by {errors[name]:.3g} of the maximum, allowed {allowed:g}"
            continue
        names.append(name)
    if not any(name.startswith("d2v") for name in errors):
        raise RuntimeError(f"none of ours runs: {reasons}")
    return names, reasons, errors


def question(case: Case, device: torch.device) -> registry.Case:
    """What the registry is asked about a case."""
    return registry.Case(case.registered, device.type, case.dtypes or (case.dtype,), case.traits)


def why_not_backend(case: Case, backend: str, device: torch.device) -> list[str]:
    """Reasons why a backend cannot run a case."""
    return next(b for b in registry.backends() if b.name == backend).why_not(question(case, device))


# ---- time


def copying(case: Case) -> Case:
    """The case with a contender that copies as many bytes as the case reads and writes."""

    def make(place: Place, seed: int) -> dict[str, Call]:
        source = torch.full((max(case.bytes // 2, 1),), 1, dtype=torch.uint8, device=place.device)
        return {**case.make(place, seed), "copy": partial(torch.empty_like(source).copy_, source)}

    return replace(case, make=make)


def input_sets(size: int, device: torch.device) -> int:
    """Sets of inputs of this many bytes that together do not fit into a GPU's L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, math.ceil(CACHE_SHARE * cache / size)))


def time_on_gpu(case: Case, names: list[str], place: Place, budget_s: float) -> tuple[Row, dict[str, str]]:
    """Seconds of each contender, L2-cold, interleaved; and why one could not be captured."""
    sets = input_sets(case.bytes, place.device)
    inputs = [case.make(place, 1 + i) for i in range(sets)]
    graphs, reasons = {}, {}
    for name in names:
        try:
            graphs[name] = Captured([contenders[name] for contenders in inputs])
        except Exception as error:
            reasons[name] = f"not captured in a graph: {reason_of(error)}"
            torch.cuda.synchronize()
    samplers = {name: graph.seconds for name, graph in graphs.items()}
    samples = take_turns(samplers, rounds=40, least=10, budget_s=budget_s)
    return {name: summarise(seconds, input_sets=sets) for name, seconds in samples.items()}, reasons


def choose_ours(case: Case, names: Iterable[str], place: Place) -> str | None:
    """Of ours, the contender that the library would take."""
    order = [f"d2v {b.name}" for b in registry.preferred(case.registered, "cuda")] if place.backends else ["d2v"]
    return next((name for name in order if name in names), None)


def measure(case: Case, place: Place, settled: tuple[list[str], dict[str, str], dict[str, float]],
            budget_s: float = 12.0) -> Row:  # fmt: skip
    """The row of a case whose contenders are settled: seconds of all, ratios to ours, rate of a copy of this size."""
    names, reasons, errors = settled
    case, names = copying(case), [*names, "copy"]
    if place.device.type == "cuda":
        seconds, more = time_on_gpu(case, names, place, budget_s)
        reasons = reasons | more
    else:
        contenders = case.make(place, 0)
        seconds = time_interleaved({name: contenders[name] for name in names}, budget_s=budget_s)
    chosen, (op, name, dtype) = choose_ours(case, seconds, place), case.key
    if chosen is None:
        raise RuntimeError(f"none of ours could be timed: {reasons}")
    if case.op == "MaskSampler":
        backend = "reference" if _native.native_module() is None else "native"
    else:
        backend = chosen.removeprefix("d2v").strip() or registry.choose(question(case, place.device)).name
    rivals = {n: s for n, s in seconds.items() if not n.startswith(("floor", "d2v", "copy"))}
    return {
        "op": op, "case": name, "dtype": dtype, "threads": torch.get_num_threads(), "backend": backend,
        "bytes": int(case.bytes), "formula": case.bytes.formula, "errors": errors,
        "not_run": reasons, "chosen": chosen, "seconds": seconds,
        "copy_bytes_per_second": case.bytes / seconds["copy"]["minimum"],
        "ratios": {n: s["minimum"] / seconds[chosen]["minimum"] for n, s in rivals.items()},
        "median_ratios": {n: s["median"] / seconds[chosen]["median"] for n, s in rivals.items()},
    }  # fmt: skip


# ---- the machine, and files of rows


def describe_machine() -> Row:
    """CPU, GPU, system, versions and date."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "cpu": cpu,
        "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "isa": _native.build_record().get("isa", "none"),
    }  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
