"""Times every operator: `python -m benchmarks.operators [--only OP] [--threads 1 2] [--processes 1] [--device cpu]`.

Every contender's output is compared before timing, and contenders are timed in turn. On a CPU each case runs in a
process of its own, several times with `--processes`. On a GPU (a stage of `benchmarks.gpu`) each contender is captured
in a CUDA graph that walks through input sets larger than the L2 cache together, and the graphs are replayed in turn;
the rate of a device-to-device copy in the same process is the ceiling. Every row is in the file (JSON lines; rows of
other cases stay) before the next case begins; prints one table, draws the roofline plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from d2v_kernels.bench import blocks
from d2v_kernels.bench import cases as make
from d2v_kernels.bench.case import BF16, F32, Case, Place
from d2v_kernels.bench.measure import (
    BACKENDS,
    choose_ours,
    input_sets,
    measure,
    read_rows,
    reason_of,
    settle,
    time_on_gpu,
)
from d2v_kernels.bench.timer import Captured, seconds_of, summarise

from .harness import plots, report
from .harness.floor import FloorPlace
from .harness.record import RESULTS, answer, ask_child, gpu_machine, machine_record, newest, parse, store

Row = dict[str, Any]
COPY_SIZES = (1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30)  # bytes read plus written
HOST = {"host": 30e-6}  # with gradients


# ---- what is measured


def cpu_cases() -> list[Case]:
    """Every case of `make bench`, with the goals of this project."""
    cases: list[Case] = []
    for dtype, compile_goal in ((F32, 1.8), (BF16, 3.0)):
        average = partial(make.average, dtype=dtype, goals={"eager": 10.0, "compile": compile_goal, "floor": 3.0})
        layer = {"eager": 4.5 if dtype == F32 else 8.0, "compile": 1.8, "floor": 2.0}
        cases += [
            average("speech", 8, 4, 500, 768),
            average("images", 10, 16, 196, 768, out_norm="layer"),
            average("odd width", 12, 4, 512, 1023),
            average("long", 8, 1, 3000, 768),
            average("text", 8, 4, 500, 768, norm="layer", goals=layer),
            average("odd width", 12, 4, 512, 1023, norm="layer", goals=layer),
        ]
    cases += [
        make.ema("2 blocks", 768, 2, dtype=F32, goals={"foreach": 0.95}),
        make.ema("2 blocks", 768, 2, dtype=F32, copies=True, goals={"foreach": 1.5}),
        make.ema("tiny", 64, 3, dtype=F32, copies=True, goals={"foreach": 1.5}),
    ]
    for dtype in (F32, BF16):
        of = partial(partial, dtype=dtype)
        gather = of(make.gather, goals={"x[b, index]": 2.5, "index_select": 1.3, "compile": 1.0, "floor": 1.5})
        loss = of(make.loss, "images", 10048, 3136, 768, goals={"compile": 2.7, "floor": 1.5})
        gelu = of(blocks.gelu, goals={"eager": 1.5 if dtype == F32 else 1.0})
        cases += [
            gather("images", 16, 196, 768, 8, 39),
            gather("speech", 3, 999, 768, 8, 500),
            of(make.gather_backward)("images", 16, 196, 768, 8, 39, goals={"x[b, index]": 3.0},
                                     op="gather_tokens backward"),
            of(make.restore)("images", 64, 196, 39, 768, goals={"eager": 3.0}),
            loss(beta=0.0),
            loss(beta=2.0),
            gelu("images", 3328, 1536),
            gelu("tiny", 1024, 256),
            of(blocks.norm_gelu)("speech", 8000, 512, goals={"eager": 1.3 if dtype == F32 else 1.0}),
            of(blocks.gelu_linear)("images", 3328, 384, goals={"eager": 1.0}),
        ]  # fmt: skip
    speech = {"kind": "block", "tokens": 999, "ratio": 0.5, "adjust": 0.05, "span": 5}
    images = {"kind": "block", "grid": (14, 14), "ratio": 0.8, "adjust": 0.07, "span": 3, "inverse": True}
    return [
        *cases,
        blocks.norm("speech", 8, 125, 384, dtype=F32, dropout=0.1, goals={"eager": 1.8, "compile": 1.0}),
        blocks.norm("images", 208, 64, 384, dtype=F32, goals={"eager": 0.9, "compile": 1.0}),
        *(
            blocks.attention(name, n, t, 12, 64, dtype=dtype, dropout=dropout, goals={"eager": 1.7 if dropout else 1.3})
            for name, n, t, dtype, dropout in [
                *(("speech", 2, 249, dtype, dropout) for dtype in (F32, BF16) for dropout in (0.0, 0.1)),
                ("images", 32, 40, BF16, 0.0),
            ]
        ),
        *(
            blocks.convolution(name, *sizes, axes=axes, dtype=dtype, goals={"eager": 1.5 if axes == 1 else 1.2})
            for name, sizes, axes, dtype in [
                *(("speech, positions", (8, 249, 384, 384, 16, 19), 1, dtype) for dtype in (F32, BF16)),
                ("text, decoder", (16, 256, 384, 384, 1, 9), 1, BF16),
                ("images, decoder", (64, 64, 384, 384, 16, 3), 2, BF16),
            ]
        ),
        make.masks("speech 1.0", 11, 1, {"kind": "span", "tokens": 999, "ratio": 0.65, "span": 10}),
        make.masks("speech 2.0", 24, 8, speech),
        make.masks("images", 256, 16, images),
    ]


def _gpu_makers() -> tuple[Any, ...]:
    average = partial(make.average, dtype=BF16, goals={"eager": 10.0, "compile": 2.0, "ceiling": 0.9}, tolerance=2e-3)
    tokens = {"dtype": BF16, "goals": {"ceiling": 0.9}}

    def ema(name: str, width: int, depth: int, source: torch.dtype, copies: bool) -> Case:
        goals = {"foreach": 1.2 if source == F32 else 1.5, "ceiling": 0.9, "host": 3e-6}
        return make.ema(name, width, depth, dtype=source, copies=copies, goals=goals)

    return (
        average, ema, partial(make.gather, **tokens), partial(make.gather_backward, **tokens),
        partial(make.restore, **tokens), partial(make.loss, dtype=BF16, goals={"eager": 4.0, "compile": 1.5, **HOST}),
        partial(blocks.attention, dtype=BF16, goals={"eager": 3.0, **HOST}, op="attention forward + backward"),
        partial(blocks.convolution, dtype=BF16, goals={"eager": 2.0}),
        partial(blocks.norm, dtype=BF16, goals={"eager": 1.5}, dropout=0.1, mixed=True),
    )  # fmt: skip


def gpu_cases() -> list[Case]:
    """What is measured on a GPU, the most wanted first."""
    uncompiled = {"eager": 10.0, "ceiling": 0.9}
    average, ema, gather, gather_backward, restore, loss, attention, convolution, norm = _gpu_makers()
    return [
        average("speech 2.0", 8, 3, 999, 768),
        average("images B16", 10, 16, 196, 768, out_norm="layer"),
        ema("base", 768, 12, F32, True),
        ema("base", 768, 12, BF16, True),
        gather("images B16", 16, 196, 768, 16, 39),
        gather_backward("images B16", 16, 196, 768, 16, 39),
        restore("images B16", 256, 196, 39, 768),
        loss("images B16", 256 * 157, 16 * 196, 768),
        attention("speech 2.0", 24, 500, 12, 64),
        convolution("speech 2.0, positions", 24, 999, 768, 768, 16, 19),
        convolution("images B16", 256, 196, 768, 768, 16, 3, axes=2),
        norm("speech 2.0", 24, 500, 768),
        blocks.front_end("speech 2.0, first layer", 3 * 63999),
        average("images B256", 10, 256, 196, 768, out_norm="layer"),
        average("speech 1.0", 8, 11, 999, 768, goals=uncompiled),
        average("images huge14", 24, 8, 256, 1280, out_norm="layer"),
        average("text 2.0", 12, 4, 512, 768, goals=uncompiled),
        average("text 1.0", 10, 16, 512, 768, norm="layer", goals={"eager": 6.0, "compile": 1.0, "ceiling": 0.9}),
        average("speech 2.0 large", 16, 1, 999, 1024, goals=uncompiled),
        average("images large", 18, 8, 196, 1024, out_norm="layer", goals=uncompiled),
        average("images B16", 10, 16, 196, 768, out_norm="layer", dtype=F32, goals=uncompiled),
        ema("huge", 1280, 32, F32, True),
        ema("base", 768, 12, F32, False),
        gather("images B256", 256, 196, 768, 16, 39),
        gather_backward("images B256", 256, 196, 768, 16, 39),
        gather("speech 2.0", 3, 999, 768, 8, 500),
        gather_backward("speech 2.0", 3, 999, 768, 8, 500),
        restore("speech 2.0", 24, 999, 500, 768),
        restore("text 2.0", 32, 512, 266, 768),
        loss("speech 2.0", 24 * 499, 3 * 999, 768),
        loss("images B16", 256 * 157, 16 * 196, 768, target_dtype=BF16),
        loss("text 1.0", 16 * 157, 16 * 512, 768, beta=4.0),
        attention("speech 2.0", 24, 500, 12, 64, dropout=0.1),
        attention("speech 2.0 large", 12, 450, 16, 64, dropout=0.1),
        convolution("speech 2.0, decoder", 24, 999, 384, 384, 16, 7),
        loss("images B256", 4096 * 157, 256 * 196, 768),
    ]


def tiny_cases() -> list[Case]:
    """One small case of each kind, for runs without a GPU."""
    average, ema, gather, gather_backward, restore, loss, attention, convolution, norm = _gpu_makers()
    return [
        average("tiny", 3, 2, 20, 32),
        average("tiny", 3, 2, 20, 32, norm="layer", goals={}),
        ema("tiny", 16, 1, F32, True),
        ema("tiny", 16, 1, BF16, False),
        gather("tiny", 2, 12, 32, 2, 5),
        gather_backward("tiny", 2, 12, 32, 2, 5),
        restore("tiny", 4, 12, 5, 32),
        loss("tiny", 12, 20, 32),
        norm("tiny", 2, 6, 32),
        blocks.front_end("tiny", 9, 32),
        attention("tiny", 2, 20, 2, 16),
        attention("tiny", 2, 20, 2, 16, dropout=0.1),
        convolution("tiny", 2, 9, 32, 32, 4, 3, axes=2),
        convolution("tiny", 2, 9, 32, 32, 4, 3),
    ]


# ---- on a CPU


def measure_on_cpu(case: Case, threads: int) -> Row:
    """One row, in this process. `AssertionError` names a contender that differs."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    place = FloorPlace(torch.device("cpu"))
    settled = settle(case, place)
    assert not settled[1], f"{case.op} {case.name}: {settled[1]}"
    row = measure(case, place, settled)
    seconds = row["seconds"]
    floor = min((s["minimum"] for name, s in seconds.items() if name.startswith("floor")), default=None)
    over = seconds["d2v"]["minimum"] / floor if floor else None
    return {**row, "floor_s": floor, "over_floor": over, "goals": case.goals}


def ask_for_row(number: int, threads: int, processes: int = 1) -> Row:
    """The row of the process with the median ratio to the first rival, with every process's ratios beside it."""
    rows = [ask_child("operators", {"case": number, "threads": threads}, threads=threads) for _ in range(processes)]
    chosen: Row = sorted(rows, key=lambda row: next(iter(row["ratios"].values())))[len(rows) // 2]
    return {**chosen, "ratios_by_process": [row["ratios"] for row in rows]}


def run_on_cpu(options: argparse.Namespace) -> None:
    """Every case that is asked for, at every number of threads."""
    numbers = [i for i, c in enumerate(cpu_cases()) if options.only in f"{c.op} {c.name} {c.dtype}"]
    if not numbers:
        raise SystemExit(f"--only: expected part of a case's name, got {options.only!r}")
    machine, rows = machine_record(), []
    for i in numbers:
        for threads in options.threads:
            rows.append({**ask_for_row(i, threads, options.processes), "machine": machine})
            store(options.output, rows[-1])
            print(report.text_row(rows[-1]), flush=True)
    print(report.summary(rows))
    plots.roofline(newest(read_rows(options.output)), options.output.with_suffix(".png"))


# ---- on a GPU


def host_seconds(case: Case, names: list[str], place: Place, calls: int) -> dict[str, float]:
    """Host time of a call, the device kept busy enough not to be waited for; ours alone."""
    contenders, result = case.make(place, 0), {}

    def repeat(name: str) -> None:
        for _ in range(calls):
            contenders[name]()

    for name in (n for n in names if n.startswith("d2v")):
        contenders[name]()
        samples = []
        for _ in range(3):
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            samples.append(seconds_of(partial(repeat, name)) / calls)
        result[name] = min(samples)
    return result


def copy_rates(device: torch.device, emulated: bool) -> dict[int, float]:
    """Bytes read plus written -> bytes a second of a copy on the device; the largest size is the ceiling."""
    rates = {}
    for size in COPY_SIZES if not emulated else COPY_SIZES[:1]:
        sets = 1 if emulated else input_sets(size, device)
        pairs = [
            [torch.randint(0, 256, (size // 2,), dtype=torch.uint8, device=device) for _ in range(2)]
            for _ in range(sets)
        ]
        calls = [partial(target.copy_, source) for source, target in pairs]
        if emulated:
            rates[size] = size / seconds_of(calls[0])
        else:
            graph = Captured(calls)
            rates[size] = size / statistics.median(graph.seconds() for _ in range(15))
    return rates


def measure_on_gpu(case: Case, place: Place, emulated: bool, ceiling: float, budget_s: float) -> Row:
    """One row: see the module's text. Emulated: one call each, the fields of a measurement, and no measurement."""
    names, reasons, errors = settle(case, place)
    if emulated:
        contenders = case.make(place, 1)
        seconds = {name: summarise([seconds_of(contenders[name])], input_sets=1) for name in names}
    else:
        seconds, more = time_on_gpu(case, names, place, budget_s)
        reasons |= more
    # The queue of a device holds about a thousand launches; small counts keep the host from waiting for it.
    host = host_seconds(case, list(seconds), place, 1 if emulated else 40)
    chosen, (op, name, dtype) = choose_ours(case, seconds, place), case.key
    row = {
        "kind": "measurement", "op": op, "case": name, "dtype": dtype, "bytes": int(case.bytes), "flops": case.flops,
        "seconds": seconds, "errors": errors, "host_seconds": host, "not_run": reasons, "chosen": chosen,
        "ceiling_bytes_per_second": ceiling, "goals": case.goals, "ratios": {}, "share_of_ceiling": None,
    }  # fmt: skip
    if chosen is not None:
        ours = seconds[chosen]["median"]
        row["share_of_ceiling"] = case.bytes / ours / ceiling
        row["ratios"] = {n: s["median"] / ours for n, s in seconds.items() if n != chosen}
    return row


def run_on_gpu(options: argparse.Namespace) -> None:
    """Measures every case that the file does not have yet; ends when the budget is used up."""
    emulated = options.emulated is not None
    if emulated:
        from .gpu import emulator

        emulator.install(None if options.emulated == "-" else Path(options.emulated))
    place, begin = Place(torch.device("cpu" if emulated else "cuda"), BACKENDS), time.perf_counter()
    common = {"emulated": emulated, "key": options.key, "machine": gpu_machine(emulated)}
    cases = [c for c in (tiny_cases() if emulated else gpu_cases()) if options.only in f"{c.op} {c.name}"][
        : options.most
    ]
    tried = {(r["op"], r["case"], r["dtype"]): r["kind"] for r in read_rows(options.output)
             if r.get("kind") in ("measurement", "failure") and r.get("key") == options.key}  # fmt: skip
    # What ended an earlier process comes last, so that it cannot keep the others from their turn.
    left = sorted((c for c in cases if tried.get(c.key) != "measurement"), key=lambda c: c.key in tried)
    rates = copy_rates(place.device, emulated)
    copies = {str(size): rate for size, rate in rates.items()}
    store(options.output, {"kind": "copy", "bytes_per_second": copies, **common})
    for number, case in enumerate(left):
        remaining = options.budget - (time.perf_counter() - begin)
        if remaining <= 0:
            print(f"budget used up: {len(left) - number} of {len(cases)} cases left for another run", flush=True)
            raise SystemExit(3)
        op, name, dtype = case.key
        failure = {"kind": "failure", "op": op, "case": name, "dtype": dtype, **common}
        store(options.output, {**failure, "reason": "begun, and the process ended before it was done"})
        try:
            row = measure_on_gpu(case, place, emulated, max(rates.values()), min(2.0, remaining)) | common
        except Exception as error:
            row = {**failure, "reason": reason_of(error)}
        store(options.output, row)
        print(f"{row['kind']:<12} {case.op} {case.name} {row.get('reason', '')}", flush=True)
        if place.device.type == "cuda":
            torch.cuda.synchronize()  # after some errors a process can use its GPU no more: the next one goes on
        torch.compiler.reset()  # a function may be compiled for a few shapes only
        if not emulated:
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    """Runs the cases and reports; see the module's text."""
    options = parse(
        "operators", __doc__, arguments,
        device=(("cpu", "cuda"), "where they run"),
        only=("", "run the cases whose operator or name contains this text"),
        threads=([1, 2], "thread counts of a CPU"),
        processes=(1, "fresh processes per case"),
        output=(RESULTS / "cpu.jsonl", "JSON lines file that keeps the rows"),
        key=("", "on a GPU: rows with this key count as done"),
        budget=(180.0, "on a GPU: seconds after which no further case begins"),
        most=(10**9, "on a GPU: cases from the head of the list, where the most wanted stand"),
        emulated=(None, "tiny cases of the GPU on the CPU; LIBRARY: the CUDA sources built for it, or -"),
        child=(None, ""),
    )  # fmt: skip
    if options.child is not None:
        order = json.loads(options.child)
        answer(measure_on_cpu(cpu_cases()[order["case"]], order["threads"]))
    elif options.device == "cuda" or options.emulated is not None:
        if options.output == RESULTS / "cpu.jsonl":
            options.output = RESULTS / "gpu.jsonl"
        run_on_gpu(options)
    else:
        run_on_cpu(options)


if __name__ == "__main__":
    main()
