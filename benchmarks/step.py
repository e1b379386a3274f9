"""Whole training steps: `python -m benchmarks.step [--device cpu] [--threads 1 2] [--only TEXT] [--forms ...]`.

Each case runs in a process of its own: loss and gradients of the plain form and of this library are compared first,
then the forms take turns, step by step. Peak memory is measured in further processes, one a form. Writes JSON lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from d2v.model.data2vec import Data2Vec
from d2v.runtime import resident_bytes
from d2v.train.flops import Shape, count_flops, find_peak

from . import step_report
from .kernels import KEEP_PAGES, RESULTS
from .machine import ROOT, machine_record
from .step_cases import CPU, DRY, GPU, Precision, StepCase, make_batch, make_config, without_dropout
from .step_forms import FORMS, Form, check_equal, settings
from .step_profile import measure_operators

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


def synchronise(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_forms(forms: list[Form], batches: list[Any], rounds: int, budget_s: float) -> dict[str, Row]:
    """Seconds of every form, in turn, after two steps that do not count."""
    device = forms[0].device
    compiling = {}
    for form in forms:
        begin = time.perf_counter()
        for batch in batches[:2]:
            form.step(*batch)
        synchronise(device)
        compiling[form.name] = time.perf_counter() - begin
    seconds: dict[str, list[float]] = {f.name: [] for f in forms}
    host: dict[str, list[float]] = {f.name: [] for f in forms}
    phases: dict[str, list[dict[str, float]]] = {f.name: [] for f in forms}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - start > budget_s:
            break
        for form in forms:
            synchronise(device)
            begin = time.perf_counter()
            form.step(*batches[done % len(batches)])
            host[form.name].append(time.perf_counter() - begin)
            synchronise(device)
            seconds[form.name].append(time.perf_counter() - begin)
            phases[form.name].append(form.phases())
    return {
        name: {
            "minimum": min(values),
            "median": statistics.median(values),
            "worst": max(values),
            "rounds": len(values),
            "host": statistics.median(host[name]),
            "first_steps": compiling[name],
            "phases": {k: statistics.median(p[k] for p in phases[name]) for k in phases[name][0]},
        }
        for name, values in seconds.items()
    }


def run_case(case: StepCase, options: argparse.Namespace, threads: int) -> Row:
    """One row, in this process."""
    device = torch.device(options.device)
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    with settings(threads):
        config = without_dropout(make_config(case, precision))
        inputs, masks = make_batch(case, config, Data2Vec(config), 0)
        errors = check_equal(config, inputs, masks, device)
        gc.collect()
        forms, batches = make_forms(case, options.forms, device, precision)
        timings = time_forms(forms, batches, options.rounds, options.budget)
        for form in forms:
            timings[form.name] |= measure_operators(form, batches[0])
            if device.type == "cuda":
                timings[form.name]["memory"] = measure_gpu_memory(form, batches[0])
    config = forms[0].config
    rows, tokens = masks.mask.shape
    visible = tokens if masks.keep is None else masks.keep.shape[1]
    length = inputs.shape[1] if config.stem.modality == "speech" else tokens
    shape = Shape(case.samples, rows // case.samples, tokens, visible, len(masks.rows), length)
    return {
        "kind": "step", "case": case.name, "recipe": case.recipe, "device": device.type, "threads": threads,
        "precision": precision, "samples": case.samples, "modality": config.stem.modality,
        "audio_seconds": case.samples * case.length if config.stem.modality == "speech" else None,
        "tuned_for": case.tuned_for, "errors": errors, "flops": count_flops(config, shape),
        "peak": find_peak(torch.cuda.get_device_name()) if device.type == "cuda" else None, "forms": timings,
    }  # fmt: skip


def measure_memory(case: StepCase, name: str, device: torch.device, steps: int = BATCHES) -> int:
    """Peak resident bytes of a few steps of one form, from before its model was built; for a process of its own."""
    before = resident_bytes()
    forms, batches = make_forms(case, [name], device, "fp32")
    for batch in batches[:steps]:
        forms[0].step(*batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure_gpu_memory(form: Form, batch: Any) -> int:
    """Peak bytes of a step on a GPU: what lives through it of this form, and the most that comes on top."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form.step(*batch)
    torch.cuda.synchronize()
    teacher = form.model.teacher
    working = [
        p for part in (teacher.working_parts().values() if teacher.working_dtype else ()) for p in part.parameters()
    ]
    moments = [v for state in form.optimiser.state.values() for v in state.values() if torch.is_tensor(v)]
    kept = sum(t.numel() * t.element_size() for t in (*form.model.parameters(), *working, *moments))
    return torch.cuda.max_memory_allocated() - before + kept


def run_child(arguments: list[str], threads: int, keep_pages: bool = True) -> Any:
    """The last line of a child's output as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(KEEP_PAGES if keep_pages else {})}
    command = [sys.executable, "-m", "benchmarks.step", *arguments, "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the step runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one run each")
    parser.add_argument("--only", default="", help="measure the cases whose name contains this text")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), help="forms to measure")
    parser.add_argument("--rounds", type=int, default=30, help="most steps of each form; at least 5 are run")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of a case after which no round begins")
    parser.add_argument("--output", type=Path, default=None, help="JSON lines; unset: benchmarks/results/step-DEVICE")
    parser.add_argument("--most", type=int, default=None, help="measure no more cases than this; unset: all")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that everything works")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=list(FORMS), default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures every case and prints one table."""
    options = parse(arguments)
    cases = cases_for(options.device, options.dry)
    if options.child is not None:
        case = cases[options.child]
        if options.memory is not None:
            print(json.dumps(measure_memory(case, options.memory, torch.device(options.device))))
        else:
            print(json.dumps(run_case(case, options, options.threads[0])))
        return
    output = options.output or RESULTS / f"step-{'dry' if options.dry else options.device}.jsonl"
    machine, rows = machine_record(), []
    common = ["--device", options.device, "--forms", *options.forms, "--rounds", str(options.rounds)]
    common += ["--budget", str(options.budget), *(["--dry"] if options.dry else [])]
    wanted = [n for n, case in enumerate(cases) if options.only in case.name][: options.most]
    for number in wanted:
        child = [*common, "--child", str(number)]
        names = options.forms if options.device == "cpu" else []
        memory = {name: run_child([*child, "--memory", name], 1, keep_pages=False) for name in names}
        for threads in options.threads:
            row = {**run_child(child, threads), "machine": machine}
            for name, peak in memory.items():
                row["forms"][name]["memory"] = peak
            rows.append(row)
            print(step_report.text_row(row), flush=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(step_report.summary(rows))


if __name__ == "__main__":
    main()
