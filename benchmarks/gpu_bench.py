"""Times the operators on a GPU: `python -m benchmarks.gpu_bench --output FILE.jsonl` (a stage of `benchmarks.gpu`).

Results are compared first. Then each contender is captured in a CUDA graph that walks through input sets larger than
the L2 cache together, and the graphs are replayed in turn, so that drift of the clocks hits all alike. The rate of a
device-to-device copy in the same process is the ceiling. Every case is written before the next one begins.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_kernels import registry

from . import gpu_emulator
from .gpu_cases import Contenders, GpuCase, published_cases, tiny_cases
from .gpu_record import gpu_machine

Seconds = dict[str, Any]
COPY_SIZES = (1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30)  # bytes read plus written
REPLAY_SECONDS = 4e-4  # a graph is at least this long, so that its launch does not count
CACHE_SHARE = 4  # input sets together hold so many times the L2 cache


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def difference(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest error relative to the largest value; infinite where shapes or NaN differ."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or bool(a.isnan().any()) or bool(b.isnan().any()):
            return math.inf
        if a.numel():
            error = float((a.float() - b.float()).abs().max())
            worst = max(worst, error / max(float(b.float().abs().max()), 1e-30))
    return worst


def settle(case: GpuCase, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Contenders that run and agree with the first of ours, and why the others do not take part."""
    contenders, wanted = case.make(device, 0), None
    names, reasons = [], {}
    for name, call in contenders.items():
        backend = name.removeprefix("d2v ")
        if backend in ("native", "triton") and (why_not := _why_not(case, backend, device)):
            reasons[name] = "; ".join(why_not)
            continue
        try:
            with torch.enable_grad():
                result = [t.detach().clone() for t in case.compare(call())]
        except Exception as error:  # out of memory, a compiler that fails: a contender less, not the end of the run
            reasons[name] = reason_of(error)
            continue
        if wanted is None:
            if not name.startswith("d2v"):
                raise RuntimeError(f"none of ours runs: {reasons}")
            wanted = result
        elif (error := difference(result, wanted)) > case.tolerance:
            reasons[name] = f"differs from {names[0]} by {error:.3g} of the maximum, allowed {case.tolerance:g}"
            continue
        names.append(name)
    return names, reasons


def _why_not(case: GpuCase, backend: str, device: torch.device) -> list[str]:
    question = registry.Case(case.registered, device.type, case.dtypes or (case.dtype,), case.traits)
    return next(b for b in registry.backends() if b.name == backend).why_not(question)


class Captured:
    """A contender's calls on all input sets in one CUDA graph."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        # As many results stay alive as there are inputs: a buffer written again and again would not leave the cache.
        self.results: list[Any] = [None] * len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2] * 2:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph, self.calls = self._capture(calls), len(calls)
        once = self.seconds()
        rounds = math.ceil(REPLAY_SECONDS / max(once * self.calls, 1e-7))
        if rounds > 1:
            calls = calls * min(rounds, 200)
            self.graph, self.calls = self._capture(calls), len(calls)

    def _capture(self, calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.results = [None] * len(self.results)
        with torch.cuda.graph(graph):
            for i, call in enumerate(calls):
                self.results[i % len(self.results)] = call()
        return graph

    def seconds(self) -> float:
        """One replay, per call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls


def time_on_gpu(
    case: GpuCase, names: list[str], device: torch.device, budget_s: float
) -> tuple[Seconds, dict[str, str]]:
    """Seconds of each contender, L2-cold, interleaved; and why one could not be captured."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    sets = max(1, min(64, math.ceil(CACHE_SHARE * cache / case.bytes)))
    inputs: list[Contenders] = [case.make(device, 1 + i) for i in range(sets)]
    graphs, reasons = {}, {}
    for name in names:
        try:
            graphs[name] = Captured([contenders[name] for contenders in inputs])
        except Exception as error:
            reasons[name] = f"not captured in a graph: {reason_of(error)}"
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    begin = time.perf_counter()
    for done in range(40):
        if done >= 10 and time.perf_counter() - begin > budget_s:
            break
        for name, graph in graphs.items():
            samples[name].append(graph.seconds())
    seconds = {
        name: {"minimum": min(s), "median": statistics.median(s), "rounds": len(s), "input_sets": sets}
        for name, s in samples.items()
    }
    return seconds, reasons


def time_emulated(case: GpuCase, names: list[str], device: torch.device) -> Seconds:
    """One call each: the fields of a measurement, and no measurement."""
    contenders, seconds = case.make(device, 1), {}
    for name in names:
        before = time.perf_counter()
        contenders[name]()
        once = time.perf_counter() - before
        seconds[name] = {"minimum": once, "median": once, "rounds": 1, "input_sets": 1}
    return seconds


def host_seconds(case: GpuCase, names: list[str], device: torch.device, calls: int) -> dict[str, float]:
    """Host time of a call, the device kept busy enough not to be waited for; ours alone."""
    contenders, result = case.make(device, 0), {}
    for name in names:
        if not name.startswith("d2v"):
            continue
        contenders[name]()
        samples = []
        for _ in range(3):
            if device.type == "cuda":
                torch.cuda.synchronize()
            before = time.perf_counter()
            for _ in range(calls):
                contenders[name]()
            samples.append((time.perf_counter() - before) / calls)
        result[name] = min(samples)
    return result


def copy_rates(device: torch.device, emulated: bool) -> dict[int, float]:
    """Bytes read plus written -> bytes a second of a copy on the device; the largest size is the ceiling."""
    rates = {}
    for size in COPY_SIZES if not emulated else COPY_SIZES[:1]:
        cache = 1 if emulated else torch.cuda.get_device_properties(device).L2_cache_size
        sets = max(1, min(64, math.ceil(CACHE_SHARE * cache / size)))
        pairs = [
            [torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device) for _ in range(2)]
            for _ in range(sets)
        ]
        calls = [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]
        if emulated:
            before = time.perf_counter()
            calls[0]()
            rates[size] = size / (time.perf_counter() - before)
        else:
            graph = Captured(calls)
            rates[size] = size / statistics.median(graph.seconds() for _ in range(15))
    return rates


def measure(case: GpuCase, device: torch.device, emulated: bool, ceiling: float, budget_s: float) -> dict[str, Any]:
    """One row: see the module's text."""
    names, reasons = settle(case, device)
    if emulated:
        seconds = time_emulated(case, names, device)
    else:
        seconds, more = time_on_gpu(case, names, device, budget_s)
        reasons |= more
    # The queue of a device holds about a thousand launches; small counts keep the host from waiting for it.
    host = host_seconds(case, list(seconds), device, 1 if emulated else 40)
    preferred = [f"d2v {b.name}" for b in registry.preferred(case.registered, "cuda")]
    chosen = next((n for n in preferred if n in seconds), None)
    row = {
        "kind": "measurement", "op": case.op, "case": case.name, "dtype": str(case.dtype)[6:], "bytes": case.bytes,
        "flops": case.flops, "seconds": seconds, "host_seconds": host, "not_run": reasons, "chosen": chosen,
        "ceiling_bytes_per_second": ceiling, "goals": case.goals, "ratios": {}, "share_of_ceiling": None,
    }  # fmt: skip
    if chosen is not None:
        ours = seconds[chosen]["median"]
        row["share_of_ceiling"] = case.bytes / ours / ceiling
        row["ratios"] = {n: s["median"] / ours for n, s in seconds.items() if n != chosen}
    return row


def _done(path: Path, key: str) -> set[tuple[str, str, str]]:
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {(r["op"], r["case"], r["dtype"]) for r in rows if r.get("kind") == "measurement" and r.get("key") == key}


def main(arguments: list[str] | None = None) -> None:
    """Appends a row for every case that FILE does not have yet; ends when the budget is used up."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bench", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to append to")
    parser.add_argument("--key", default="", help="rows with this key count as done")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds after which no further case begins")
    parser.add_argument("--only", default="", help="cases whose operator or name contains this text")
    parser.add_argument("--emulated", metavar="LIBRARY", help="tiny cases on the CPU; LIBRARY or - for none")
    options = parser.parse_args(arguments)
    emulated = options.emulated is not None
    if emulated:
        gpu_emulator.install(None if options.emulated == "-" else Path(options.emulated))
    device, begin = torch.device("cpu" if emulated else "cuda"), time.perf_counter()
    common = {"emulated": emulated, "key": options.key, "machine": gpu_machine(emulated)}
    cases = [c for c in (tiny_cases() if emulated else published_cases()) if options.only in f"{c.op} {c.name}"]
    done = _done(options.output, options.key)
    left = [c for c in cases if (c.op, c.name, str(c.dtype)[6:]) not in done]
    with options.output.open("a") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps({**row, **common}) + "\n")
            file.flush()

        rates = copy_rates(device, emulated)
        ceiling = max(rates.values())
        write({"kind": "copy", "bytes_per_second": {str(size): rate for size, rate in rates.items()}})
        for number, case in enumerate(left):
            remaining = options.budget - (time.perf_counter() - begin)
            if remaining <= 0:
                print(f"budget used up: {len(left) - number} of {len(cases)} cases left for another run", flush=True)
                raise SystemExit(3)
            try:
                row = measure(case, device, emulated, ceiling, min(2.0, remaining))
            except Exception as error:
                row = {"kind": "failure", "op": case.op, "case": case.name, "dtype": str(case.dtype)[6:],
                       "reason": reason_of(error)}  # fmt: skip
            write(row)
            print(f"{row['kind']:<12} {case.op} {case.name} {row.get('reason', '')}", flush=True)
            torch.compiler.reset()  # a function may be compiled for a few shapes only
            if not emulated:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
