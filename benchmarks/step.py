"""Whole training steps: `python -m benchmarks.step [--device cpu] [--threads 1 2] [--only TEXT] [--forms ...]`.

Each case runs in a process of its own: loss and gradients of the plain form and of this library are compared first,
then the forms take turns, step by step. Peak memory is measured in further processes, one a form. Keeps JSON lines:
a row takes the place of the stored one of its case, other rows stay.

`--estimate h200|h100|a100|b200|mi300x RECIPE` measures nothing: it counts a step on tensors without memory and prints
what it should take on such a GPU, beside what `make gpu` measured there, if it did.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import resource
import statistics
import time
from typing import Any

import torch

from d2v import Data2Vec
from d2v.runtime import resident_bytes
from d2v.train.flops import count_flops, find_peak, shape_of
from d2v_kernels.bench.timer import seconds_of, summarise, take_turns

from .harness import report
from .harness.record import RESULTS, answer, ask_child, limit_memory, machine_record, parse, store
from .training.cases import CPU, DRY, GPU, Precision, StepCase, make_batch, make_config, without_dropout
from .training.estimate import estimate
from .training.forms import (
    FORMS,
    FROZEN,
    Form,
    check_equal,
    measure_gpu_memory,
    measure_operators,
    settings,
    synchronise,
)

BATCHES = 3
Row = dict[str, Any]


def cases_for(device: str, dry: bool) -> list[StepCase]:
    """What is measured on a device."""
    return DRY if dry else (GPU if device == "cuda" else CPU)


def make_forms(
    case: StepCase, names: list[str], device: torch.device, precision: Precision
) -> tuple[list[Form], list[Any]]:
    """Forms with equal weights, and the batches they take turns with."""
    torch.manual_seed(0)
    config = make_config(case, precision)
    model = Data2Vec(config)
    batches = [make_batch(case, config, model, seed) for seed in range(BATCHES)]
    batches = [(inputs.to(device), masks) for inputs, masks in batches]
    return [Form(name, config, model.state_dict(), device) for name in names], batches


def time_forms(forms: list[Form], batches: list[Any], rounds: int, budget_s: float) -> dict[str, Row]:
    """Seconds of every form, in turn, after two steps that do not count."""
    device, steps = forms[0].device, dict.fromkeys((f.name for f in forms), 0)

    def sample(form: Form) -> tuple[float, float, dict[str, float]]:
        batch = batches[steps[form.name] % len(batches)]
        steps[form.name] += 1
        synchronise(device)
        begin = time.perf_counter()
        form.step(*batch)
        host = time.perf_counter() - begin
        synchronise(device)
        return time.perf_counter() - begin, host, form.phases()

    first = {form.name: sample(form)[0] + sample(form)[0] for form in forms}
    steps = dict.fromkeys(steps, 0)
    samplers = {form.name: functools.partial(sample, form) for form in forms}
    timings = {}
    for name, samples in take_turns(samplers, rounds=rounds, least=5, budget_s=budget_s).items():
        seconds, host, phases = zip(*samples, strict=True)
        medians = {phase: statistics.median(p[phase] for p in phases) for phase in phases[0]}
        timings[name] = summarise(
            seconds, worst=max(seconds), host=statistics.median(host), first_steps=first[name], phases=medians
        )
    return timings


def product_rate(precision: Precision, seconds: float = 1.0) -> float:
    """FLOP a second of a square matrix product that lies in the caches, at the threads in use: the best of many."""
    left, right = torch.randn(2, 1024, 1024, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        best = min(best, seconds_of(lambda: left @ right))
    return 2 * 1024**3 / best


def run_case(order: Row) -> Row:
    """One row of the case in `order`, in this process. quick: without comparing the forms, and without the profiler."""
    device, case = torch.device(order["device"]), StepCase(**order["case"])
    precision: Precision = case.precision or ("bf16" if device.type == "cuda" else "fp32")
    with settings(order["threads"]):
        errors = None if order["quick"] else compare_forms(case, precision, device)
        forms, batches = make_forms(case, order["forms"], device, precision)
        timings = time_forms(forms, batches, order["rounds"], order["budget"])
        for form in forms:
            if not order["quick"]:
                timings[form.name] |= measure_operators(form, batches[0])
            if device.type == "cuda":
                timings[form.name]["memory"] = measure_gpu_memory(form, batches[0])
        rate = product_rate(precision) if device.type == "cpu" else None
    config, modality, (inputs, masks) = forms[0].config, case.modality, batches[0]
    return {
        "kind": "step", "case": case.name, "recipe": case.recipe, "device": device.type, "threads": order["threads"],
        "precision": precision, "samples": case.samples, "modality": modality,
        "audio_seconds": case.samples * case.length if modality == "speech" else None, "tuned_for": case.tuned_for,
        "errors": errors, "flops": count_flops(config, shape_of(masks, case.samples, inputs.shape[1])),
        "peak": find_peak(torch.cuda.get_device_name()) if device.type == "cuda" else rate, "forms": timings,
        "rows": len(masks.mask), "parameters": sum(p.numel() for p in forms[0].parameters),
    }  # fmt: skip


def compare_forms(case: StepCase, precision: Precision, device: torch.device) -> dict[str, float]:
    """Errors of plain against d2v without dropout."""
    config = without_dropout(make_config(case, precision))
    errors = check_equal(config, *make_batch(case, config, Data2Vec(config), 0), device)
    gc.collect()
    return errors


def measure_memory(order: Row) -> int:
    """Peak resident bytes of a few steps of one form, from before its model was built; for a process of its own."""
    before = resident_bytes()
    case = StepCase(**order["case"])
    forms, batches = make_forms(case, order["forms"], torch.device(order["device"]), case.precision or "fp32")
    for batch in batches[: order["steps"]]:
        forms[0].step(*batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def ask_for_row(case: StepCase, order: Row, **options: Any) -> Row:
    """A row without memory, from a process of its own; options: of `ask_child`."""
    order = {"quick": False, **order, "case": dataclasses.asdict(case)}
    result: Row = ask_child("step", order, threads=order["threads"], **options)
    return result


def ask_for_memory(case: StepCase, order: Row, steps: int = BATCHES, **options: Any) -> dict[str, int]:
    """Peak bytes of every form on a CPU, each from a process of its own."""
    order = {"threads": 1, **order, "case": dataclasses.asdict(case), "steps": steps}
    names = order["forms"] if order["device"] == "cpu" else []
    return {
        name: ask_child("step", {**order, "forms": [name]}, threads=order["threads"], keep_pages=False, **options)
        for name in names
    }


def add_memory(row: Row, memory: dict[str, int]) -> Row:
    """The row with the peak of each of its forms."""
    for name, peak in memory.items():
        row["forms"][name]["memory"] = peak
    return row


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    options = parse(
        "step", __doc__, arguments,
        device=(("cpu", "cuda"), "where the step runs"),
        threads=([1, 2], "CPU threads, one run each"),
        only=("", "measure the cases whose name contains this text"),
        forms=([name for name in FORMS if name != FROZEN], f"forms to measure, of {', '.join(FORMS)}"),
        rounds=(30, "most steps of each form; at least 5 are run"),
        budget=(40.0, "seconds of a case after which no round begins"),
        output=(RESULTS / "step-DEVICE.jsonl", "JSON lines that keep the rows"),
        most=(10**9, "measure no more cases than this"),
        dry=(False, "tiny shapes, to see that everything works"),
        estimate=([], "MACHINE RECIPE: measure nothing, print what a step should take on that GPU, kernel by kernel"),
        json=(False, "with --estimate: as JSON, every kernel by its shapes"),
        child=(None, ""),
    )  # fmt: skip
    unknown = [name for name in options.forms if name not in FORMS]
    if unknown:
        raise SystemExit(f"--forms: expected some of {', '.join(FORMS)}; got {unknown[0]!r}")
    name = options.output.name.replace("DEVICE", "dry" if options.dry else options.device)
    options.output = options.output.with_name(name)
    if len(options.estimate) not in (0, 2):
        raise SystemExit(f"--estimate: expected a machine and a recipe, got {' '.join(options.estimate)!r}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures every case and prints one table."""
    options = parse_options(arguments)
    if options.child is not None:
        order = json.loads(options.child)
        limit_memory(order.get("memory_limit"))
        answer(measure_memory(order) if "steps" in order else run_case(order))
        return
    if options.estimate:
        try:
            machine, recipe = options.estimate
            print(estimate(machine, recipe, options.json))
        except ValueError as error:
            raise SystemExit(f"--estimate: {error}") from None
        return
    order = {name: getattr(options, name) for name in ("device", "forms", "rounds", "budget")}
    cases, machine, rows = cases_for(options.device, options.dry), machine_record(), []
    for case in [case for case in cases if options.only in case.name][: options.most]:
        memory = ask_for_memory(case, order)
        for threads in options.threads:
            row = add_memory(ask_for_row(case, {**order, "threads": threads}), memory)
            rows.append({**row, "machine": machine})
            store(options.output, rows[-1])
            print(report.text_row(rows[-1]), flush=True)
    if not rows:
        raise SystemExit(f"--only: expected part of a case's name, got {options.only!r}")
    print(report.summary(rows))


if __name__ == "__main__":
    main()
