"""Cost as work grows: `python -m benchmarks.growth [--device cpu] [--only TEXT ...] [--threads 1] [--output FILE]`.

Curves of a step's time and peak memory over batch, length, averaged layers, masks and parameters, of the loader over
its workers, and of the trainer over processes. Every point runs in a process of its own (peak memory in one a form);
plain and d2v take turns as in `benchmarks.step`. Points of the same sources and machine that the output has are not
measured again, so a run that was cut off goes on; points of others stay until they are measured again. A curve ends
where its next point would take too long or too much memory, and the reason is a record, too. JSON lines, a table and
a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from . import growth_points
from .harness import plots, report
from .harness.record import RESULTS, ChildError, ask_child, machine_record, parse, read_rows, run_key, store
from .training.cases import StepCase

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
        # Written results make a tree dirty; the digest says whether its sources are.
        parts = [str(self.machine[n]).removesuffix("-dirty") for n in ("commit", "cpu", "cores", "python", "torch")]
        parts += [self.machine["isa"], self.machine["gpu"], options.device]
        self.key = run_key(*parts, more=("d2v",))
        free = growth_points.available_bytes(options.device) * 7 // 10
        self.memory_limit = int(options.memory * 1e9) or free

    @property
    def rows(self) -> list[Row]:
        """What these sources have measured on this machine."""
        return [r for r in read_rows(self.output) if r.get("key") == self.key]

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
        if seconds is not None and LEAST_STEPS * seconds > share:
            reason = f"a step would take about {seconds:.1f} s, {LEAST_STEPS} of them more than {share:g} s"
        elif memory is not None and memory > self.memory_limit:
            reason = f"it would take about {memory / 1e9:.1f} GB, more than {self.memory_limit / 1e9:.1f}"
        else:
            return False
        self._stop(curve, x, [form], reason)
        return True

    def _measure(self, curve: Curve, x: float, forms: list[str], rows: list[Row]) -> bool:
        """One point; False where a process failed, which is a record, too."""
        last = [r["forms"][f]["minimum"] for r in rows[-1:] if r["kind"] == "point" for f in forms if f in r["forms"]]
        left = self.options.budget - (LEAST_STEPS - 2) * sum(last)
        case = dataclasses.asdict(curve.case(x)) if curve.case else None
        order = {
            "kind": curve.kind, "x": x, "case": case, "curve": curve.name, "forms": forms, "dry": self.options.dry,
            "device": self.options.device, "seconds": self.options.budget / 4.0,
            "rounds": 3 if self.options.dry else max(2, min(12, int(left / max(2.0 * sum(last), 1e-3)))),
        }  # fmt: skip
        memory: dict[str, int] = {}
        if curve.kind == "step" and self.options.device == "cpu":
            for form in forms:
                result = self._ask(curve, {**order, "kind": "memory", "forms": [form]}, keep_pages=False)
                if result is not None:
                    memory[form] = result["bytes"]
            order["forms"] = forms = [f for f in forms if f in memory]
            if not forms:
                return False
        result = self._ask(curve, order)
        if result is None:
            return False
        for form, size in memory.items():
            result["forms"][form]["memory"] = size
        self._write({"kind": "point", "curve": curve.name, "label": curve.label, "x": x, "x_given": x, **result})
        return True

    def _ask(self, curve: Curve, order: Row, *, keep_pages: bool = True) -> Row | None:
        """What a process answers; None where it fails, and the curve ends."""
        try:
            return self.ask_child(order, keep_pages=keep_pages)
        except ChildError as error:
            self._stop(curve, order["x"], order["forms"], str(error))
            return None

    def ask_child(self, order: Row, *, keep_pages: bool = True) -> Row:
        """The result of a process of its own, or of as many as the point has, that talk to each other."""
        ranks = f"--nproc-per-node={order['x']:.0f}"
        launcher = ["-m", "torch.distributed.run", "--standalone", ranks] if order["kind"] == "processes" else []
        threads = self.options.threads
        order = {**order, "threads": threads, "memory_limit": self.memory_limit}
        result: Row = ask_child("growth", order, threads=threads, keep_pages=keep_pages, launcher=launcher,
                                limit_s=4.0 * self.options.budget)  # fmt: skip
        return result

    def _stop(self, curve: Curve, x: float, forms: list[str], reason: str) -> None:
        self._write({"kind": "stop", "curve": curve.name, "x": x, "forms": forms, "reason": reason})

    def _write(self, row: Row) -> None:
        """Adds a row. The curve's rows of other sources go as far as it has come again, its other ends with its own."""
        device, threads = self.options.device, self.options.threads
        command = f"{COMMAND} --device {device} --threads {threads} --only {row['curve']}"
        row |= {"device": device, "threads": threads, "dry": self.options.dry, "key": self.key,
                "machine": self.machine, "command": command}  # fmt: skip

        def replaces(old: Row) -> bool:
            same = all(old.get(name, row[name]) == row[name] for name in ("curve", "device", "threads"))
            if not same or old.get("key") == self.key:
                return False
            reached = row["kind"] == "point" and old.get("x_given", old.get("x", -1.0)) <= row["x_given"]
            return reached or (row["kind"] == old["kind"] == "stop")

        store(self.output, row, replaces=replaces)
        print(report.growth_row(row), flush=True)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    options = parse(
        "growth", __doc__, arguments,
        device=(("cpu", "cuda"), "where steps run"),
        only=([""], "names of curves; unset: all"),
        threads=(1, "CPU threads of a process"),
        budget=(40.0, "seconds of steps at a point; a curve ends above"),
        memory=(0.0, "GB of a process; unset: 70%% of what is free"),
        output=(RESULTS / "growth-DEVICE.jsonl", "JSON lines that keep the rows"),
        dry=(False, "tiny points, to see that everything works"),
        child=(None, ""),
    )  # fmt: skip
    name = options.output.name.replace("DEVICE", "dry" if options.dry else options.device)
    options.output = options.output.with_name(name)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, prints one line a curve and draws them."""
    options = parse_options(arguments)
    if options.child is not None:
        growth_points.run(json.loads(options.child))
        return
    curves = curves_for(options.device, options.dry)
    names = [c.name for c in curves]
    for name in options.only:
        if name not in ("", *names):
            raise SystemExit(f"--only: expected names of curves, {', '.join(names)}; got {name!r}")
    runner = Runner(options, options.output)
    for curve in curves:
        if options.only == [""] or curve.name in options.only:
            runner.run(curve)
    rows = read_rows(options.output)
    print(report.growth_table(rows))
    plots.growth(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
