"""Cost as work grows: `python -m benchmarks.growth [--device cpu] [--only TEXT ...] [--threads 1] [--output FILE]`.

Curves of a step's time and peak memory over batch, length, averaged layers, masks and parameters, of the loader over
its workers, and of the trainer over processes. Every point runs in a process of its own (peak memory in one a form);
plain and d2v take turns as in `benchmarks.step`. Points of the same sources and machine that the output has are not
measured again, so a run that was cut off goes on. A curve ends where its next point would take too long or too much
memory, and the reason is a record, too. JSON lines, a table and a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import growth_points, growth_report
from .gpu_record import keep_records, source_hash
from .gpu_stages import run_child
from .kernels import KEEP_PAGES, RESULTS
from .machine import machine_record
from .step_cases import StepCase

Row = dict[str, Any]
COMMAND = "python -m benchmarks.growth"
FORMS = ["plain", "d2v"]
LEAST_STEPS = 7
"""Of a form at a point: three for its memory, two that do not count, two that do."""


@dataclass(frozen=True)
class Curve:
    """One quantity that grows."""

    name: str
    label: str
    """Of the horizontal axis."""
    xs: tuple[float, ...]
    kind: Literal["step", "operator", "workers", "processes"] = "step"
    case: Callable[[float], StepCase] | None = None
    """Step of a point."""

    def order(self, x: float) -> Row:
        """What the process of a point is told."""
        case = dataclasses.asdict(self.case(x)) if self.case else None
        return {"kind": self.kind, "x": x, "case": case}


def curves_for(device: str, dry: bool) -> list[Curve]:
    """What is measured on a device."""
    if dry:
        return [
            Curve("batch", "samples B", (2, 4), case=lambda x: StepCase("vision-tiny", int(x))),
            Curve("operator", "averaged layers K", (1, 2), "operator"),
            Curve("processes", "processes", (1, 2), "processes"),
        ]
    on_gpu = device == "cuda"
    vision, layers, masks = ("vision-base", "vision-base", "vision-base") if on_gpu else (
        "vision-tiny", "vision-small", "vision-tiny")  # fmt: skip
    speech = "speech-base" if on_gpu else "speech-small"
    few = 8 if on_gpu else 1
    sizes = [("vision-base", ()), ("vision-large", ())] if on_gpu else [
        ("vision-tiny", (("mask.copies", 8),)), ("vision-small", _width(96)), ("vision-small", _width(192)),
        ("vision-small", ()),
    ]  # fmt: skip
    curves = [
        Curve("batch", "samples B", (4, 8, 16, 32, 64), case=lambda x: StepCase(vision, int(x))),
        Curve("length", "seconds of audio", (5, 7.5, 10, 15, 20, 30, 60), case=lambda x: StepCase(speech, 1, x)),
        Curve("layers", "averaged layers K", (1, 5, 10),
              case=lambda x: StepCase(layers, few, settings=(("target.top_k", int(x)),))),
        Curve("operator", "averaged layers K", (1, 2, 4, 8, 16), "operator"),
        Curve("masks", "masks per sample M", (1, 4, 8, 16),
              case=lambda x: StepCase(masks, 16, settings=(("mask.copies", int(x)),))),
        Curve("parameters", "trained parameters", tuple(range(len(sizes))),
              case=lambda x: StepCase(sizes[int(x)][0], few, settings=sizes[int(x)][1])),
        Curve("workers", "loader workers", (0, 1, 2, 4), "workers"),
        Curve("processes", "processes", (1, 2), "processes"),
    ]  # fmt: skip
    return [c for c in curves if not (on_gpu and c.name == "processes" and torch.cuda.device_count() < 2)]


def _width(width: int) -> tuple[tuple[str, int], ...]:
    """A narrower model; groups of the decoder as wide as before."""
    return (("encoder.width", width), ("decoder.width", width))


def run_key(machine: Row, device: str) -> str:
    """Points with another key belong to other sources, another machine or other versions."""
    names = ("commit", "cpu", "cores", "python", "torch", "isa", "gpu")
    # Written results make a tree dirty; the digest says whether its sources are.
    parts = [str(machine[name]).removesuffix("-dirty") for name in names]
    return hashlib.sha256(" ".join([*parts, device, source_hash(("d2v",))]).encode()).hexdigest()[:16]


def predict(points: list[tuple[float, float]], x: float) -> float | None:
    """Continues the last two points by their power law, of an exponent between 0 and 3; one point: exponent 1."""
    if not points:
        return None
    x1, y1 = points[-1]
    exponent = 1.0
    if len(points) > 1 and points[-2][0] > 0 and points[-2][1] > 0 and x1 > points[-2][0]:
        x0, y0 = points[-2]
        exponent = min(max(math.log(y1 / y0) / math.log(x1 / x0), 0.0), 3.0)
    return y1 * (x / x1) ** exponent if x1 > 0 else None


class Runner:
    """Measures the points of curves that the output lacks, one after the other."""

    def __init__(self, options: argparse.Namespace, output: Path) -> None:
        self.options, self.output = options, output
        self.machine = machine_record()
        self.key = run_key(self.machine, options.device)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.rows = keep_records(output, self.key)
        self.memory_limit = (
            int(options.memory * 1e9) if options.memory else growth_points.available_bytes(options.device) * 7 // 10
        )

    def run(self, curve: Curve) -> None:
        """Every point of a curve, as far as it goes."""
        forms = FORMS if curve.kind in ("step", "operator") else ["d2v"]
        for x in curve.xs:
            own = [r for r in self.rows if r["curve"] == curve.name and r["threads"] == self.options.threads]
            forms = [f for f in forms if not any(r["kind"] == "stop" and f in r["forms"] for r in own)]
            if any(r["kind"] == "point" and r["x_given"] == x for r in own):
                continue
            if curve.kind == "step" and curve.name != "parameters":
                forms = [f for f in forms if not self._stop_before(curve, x, f, own)]
            if not forms:
                break
            if not self._measure(curve, x, forms, own):
                break

    def _stop_before(self, curve: Curve, x: float, form: str, rows: list[Row]) -> bool:
        """Records that a form's curve ends, where its next point would take too much."""
        done = [r for r in rows if r["kind"] == "point" and form in r["forms"]]
        seconds = predict([(r["x"], r["forms"][form]["minimum"]) for r in done], x)
        memory = predict([(r["x"], r["forms"][form]["memory"]) for r in done], x)
        share = self.options.budget / len(FORMS)
        reason = ""
        if seconds is not None and LEAST_STEPS * seconds > share:
            reason = f"a step would take about {seconds:.1f} s, {LEAST_STEPS} of them more than {share:g} s"
        elif memory is not None and memory > self.memory_limit:
            reason = f"it would take about {memory / 1e9:.1f} GB, more than {self.memory_limit / 1e9:.1f}"
        if reason:
            self._write({"kind": "stop", "curve": curve.name, "x": x, "forms": [form], "reason": reason})
        return bool(reason)

    def _measure(self, curve: Curve, x: float, forms: list[str], rows: list[Row]) -> bool:
        """One point; False where a process failed, which is a record, too."""
        order = {
            **curve.order(x),
            "curve": curve.name,
            "forms": forms,
            "device": self.options.device,
            "dry": self.options.dry,
        }
        last = [r["forms"][f]["minimum"] for r in rows[-1:] if r["kind"] == "point" for f in forms if f in r["forms"]]
        left = self.options.budget - (LEAST_STEPS - 2) * sum(last)
        order["rounds"] = 3 if self.options.dry else max(2, min(12, int(left / max(2.0 * sum(last), 1e-3))))
        order["seconds"] = self.options.budget / 4.0
        memory: dict[str, int] = {}
        if curve.kind == "step" and self.options.device == "cpu":
            for form in forms:
                result = self._run_child({**order, "kind": "memory", "forms": [form]}, keep_pages=False)
                if isinstance(result, str):
                    self._write({"kind": "stop", "curve": curve.name, "x": x, "forms": [form], "reason": result})
                else:
                    memory[form] = result["bytes"]
            order["forms"] = forms = [f for f in forms if f in memory]
            if not forms:
                return False
        result = self._run_child(order, processes=int(x) if curve.kind == "processes" else None)
        if isinstance(result, str):
            self._write({"kind": "stop", "curve": curve.name, "x": x, "forms": forms, "reason": result})
            return False
        for form, size in memory.items():
            result["forms"][form]["memory"] = size
        self._write({"kind": "point", "curve": curve.name, "label": curve.label, "x": x, "x_given": x, **result})
        return True

    def _run_child(self, order: Row, *, keep_pages: bool = True, processes: int | None = None) -> Row | str:
        """What a process printed last, or why there is nothing."""
        launcher = [] if processes is None else [
            "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]  # fmt: skip
        order = {**order, "threads": self.options.threads, "memory_limit": self.memory_limit}
        command = [sys.executable, *launcher, "-m", "benchmarks.growth", "--child", json.dumps(order)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.options.threads), **(KEEP_PAGES if keep_pages else {})}
        limit = 4.0 * self.options.budget
        status, output = run_child(command, limit, environment)
        if status is None:
            return f"stopped after {limit:g} s"
        lines = [line for line in output.splitlines() if line.strip()]
        found = [line for line in lines if line.startswith(growth_points.MARK)]
        if status != 0 or not found:
            errors = [line for line in lines if "Error" in line] or lines[-1:] or ["no output"]
            return f"exit status {status}: {errors[-1].strip()[:200]}"
        result: Row = json.loads(found[-1].removeprefix(growth_points.MARK))
        return result

    def _write(self, row: Row) -> None:
        device, threads = self.options.device, self.options.threads
        command = f"{COMMAND} --device {device} --threads {threads} --only {row['curve']}"
        row |= {"device": device, "threads": threads, "dry": self.options.dry, "key": self.key,
                "machine": self.machine, "command": command}  # fmt: skip
        self.rows.append(row)
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(growth_report.text_row(row), flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where steps run")
    parser.add_argument("--only", nargs="+", default=None, help="names of curves; unset: all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of steps at a point; a curve ends above")
    parser.add_argument("--memory", type=float, default=None, help="GB of a process; unset: 70%% of what is free")
    parser.add_argument("--output", type=Path, default=None, help="JSON lines; unset: benchmarks/results/growth-DEVICE")
    parser.add_argument("--dry", action="store_true", help="tiny points, to see that everything works")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, prints one line a curve and draws them."""
    options = parse(arguments)
    if options.child is not None:
        growth_points.run(json.loads(options.child))
        return
    curves = curves_for(options.device, options.dry)
    names = [c.name for c in curves]
    for name in options.only or ():
        if name not in names:
            raise SystemExit(f"--only: expected names of curves, {', '.join(names)}; got {name!r}")
    output = options.output or RESULTS / f"growth-{'dry' if options.dry else options.device}.jsonl"
    runner = Runner(options, output)
    for curve in curves:
        if options.only is None or curve.name in options.only:
            runner.run(curve)
    print(growth_report.table(runner.rows))
    growth_report.draw(runner.rows, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
