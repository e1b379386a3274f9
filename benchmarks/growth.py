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
import contextlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import d2v_kernels as dk
from d2v import recipes
from d2v.config import Config
from d2v.train.distributed import Ranks, open_ranks
from d2v.train.pretraining import Pretraining, open_data
from d2v.train.trainer import Trainer
from d2v_kernels.bench.case import Place
from d2v_kernels.bench.cases import eager_average
from d2v_kernels.bench.timer import take_turns, time_interleaved

from . import loader, step
from .harness import plots, report
from .harness.record import (
    RESULTS,
    ChildError,
    answer,
    ask_child,
    limit_memory,
    machine_record,
    measured_on,
    newest,
    parse,
    read_rows,
    run_key,
    store,
)
from .training.cases import StepCase, change
from .training.forms import settings, synchronise

Row = dict[str, Any]
COMMAND = "python -m benchmarks.growth"
FORMS = ["plain", "d2v"]
LEAST_STEPS = 7
"""Of a form at a point: three for its memory, two that do not count, two that do."""
GLOBAL_BATCH = 32
"""Samples of an update, shared by the processes."""


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
    few, vision, layers, speech = (8, "vision-base", "vision-base", "speech-base") if on_gpu else (
        1, "vision-tiny", "vision-small", "speech-small")  # fmt: skip
    narrow = [StepCase(layers, few, settings=(("encoder.width", w), ("decoder.width", w))) for w in (96, 192)]
    sizes = [StepCase("vision-base", few), StepCase("vision-large", few)] if on_gpu else [
        StepCase(vision, few, settings=(("mask.copies", 8),)), *narrow, StepCase(layers, few)]  # fmt: skip
    curves = [
        Curve("batch", "samples B", (4, 8, 16, 32, 64), case=lambda x: StepCase(vision, int(x))),
        Curve("length", "seconds of audio", (5, 7.5, 10, 15, 20, 30, 60), case=lambda x: StepCase(speech, 1, x)),
        Curve("layers", "averaged layers K", (1, 5, 10),
              case=lambda x: StepCase(layers, few, settings=(("target.top_k", int(x)),))),
        Curve("operator", "averaged layers K", (1, 2, 4, 8, 16), "operator"),
        Curve("masks", "masks per sample M", (1, 4, 8, 16),
              case=lambda x: StepCase(vision, 16, settings=(("mask.copies", int(x)),))),
        Curve("parameters", "trained parameters", tuple(range(len(sizes))), case=lambda x: sizes[int(x)]),
        Curve("workers", "loader workers", (0, 1, 2, 4), "workers"),
        Curve("processes", "processes", (1, 2), "processes"),
    ]  # fmt: skip
    return [c for c in curves if not (on_gpu and c.name == "processes" and torch.cuda.device_count() < 2)]


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


# ---- the points that are no training steps


def available_bytes(device: str) -> int:
    """Memory that processes can still take, on the host or on the GPU."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure_operator(order: Row) -> Row:
    """`average_layers` with instance norm against the published formulation."""
    b, t, c = (2, 50, 64) if order["dry"] else (4, 500, 768)
    place = Place(torch.device(order["device"]))
    layers = [place.normal(i, b, t, c) for i in range(int(order["x"]))]

    def finish(result: torch.Tensor) -> torch.Tensor:
        synchronise(place.device)
        return result

    contenders = {
        "plain": lambda: finish(eager_average(layers, "instance", "none")),
        "d2v": lambda: finish(dk.average_layers(layers, norm="instance")),
    }
    torch.testing.assert_close(contenders["d2v"](), contenders["plain"](), rtol=1e-4, atol=1e-4)
    timings = time_interleaved(contenders, budget_s=3.0)
    return {"case": f"average_layers instance B={b} T={t} C={c}", "forms": timings}


def measure_workers(order: Row) -> Row:
    """Samples a second of the loader on generated JPEG images, with x workers."""
    workers = int(order["x"])
    with TemporaryDirectory(prefix="d2v-growth-") as folder:
        path = loader.write_images(Path(folder) / "images")
        config = loader.settings("vision-base", path, Path(folder) / "run", workers, global_batch=32)
        rates = loader.measure(config, 4.0)
    return {"case": "images in a folder", "forms": {"d2v": {"minimum": 1.0 / rates["samples_per_second"], **rates}}}


def ranks_config(path: str, run: str, order: Row) -> Config:
    """The trainer's configuration, whatever the number of processes."""
    base = recipes.vision_base() if order["device"] == "cuda" else recipes.vision_tiny()
    return change(
        base,
        data={"path": path, "workers": 0, "global_batch": GLOBAL_BATCH, "micro_batch": None},
        run={"dir": run, "threads": order["threads"], "device": order["device"], "timeout": 120.0},
    )


def measure_processes(order: Row) -> Row:
    """Time of an update of the trainer on the processes that torchrun started, with DistributedDataParallel.

    `local` is the same without the exchange of gradients, so 1 - local / minimum is the share of an update that waits
    for it. Ranks other than the first return nothing.
    """
    rounds = 3 if order["dry"] else 25
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="d2v-growth-"))
        ranks = stack.enter_context(open_ranks(ranks_config("", folder, order).run))
        path = ranks.share(loader.write_images(Path(folder) / "images") if ranks.is_first else None)
        config = ranks_config(str(path), folder, order)
        source, _ = open_data(config)
        source.prepare(Path(folder) / "run", fresh=True)
        objective = Pretraining(config, source, None, ranks.device)
        trainer = Trainer(objective, ranks)
        updates = objective.updates(0, ranks)
        batches = [next(updates) for _ in range(3)]
        updates.close()
        timings = time_updates(trainer, batches, ranks, rounds)
        slowest = [max(values) for values in zip(*ranks.gather(timings), strict=True)]
        ranks.wait()
    if not ranks.is_first:
        return {}
    exchanged, median, local = slowest
    trained = sum(p.numel() for p in trainer.parameters)
    form = {"minimum": exchanged, "median": median, "local": local, "rounds": rounds,
            "samples_per_second": GLOBAL_BATCH / exchanged, "exposed_share": 1.0 - local / exchanged}  # fmt: skip
    return {"case": f"{config.recipe}, {GLOBAL_BATCH} samples an update", "parameters": trained,
            "gradient_bytes": 4 * trained, "forms": {"d2v": form}}  # fmt: skip


def time_updates(trainer: Trainer, batches: list[Any], ranks: Ranks, rounds: int) -> tuple[float, float, float]:
    """Seconds of an update: least and median with the exchange of gradients, least without; in turn."""
    network: Any = trainer.network
    assert isinstance(network, DistributedDataParallel)
    order = itertools.cycle(batches)

    def update(exchange: bool) -> float:
        synchronise(ranks.device)
        ranks.wait()
        begin = time.perf_counter()
        # Weights of the ranks drift apart without it; the work stays the same.
        with contextlib.nullcontext() if exchange else network.no_sync():
            trainer.run_update(next(order))
            synchronise(ranks.device)
        return time.perf_counter() - begin

    samplers = {"exchange": partial(update, True), "local": partial(update, False)}
    samples = take_turns(samplers, rounds=rounds + 2, least=rounds + 2, budget_s=0.0)
    exchange, local = (samples[name][2:] for name in ("exchange", "local"))
    return min(exchange), statistics.median(exchange), min(local)


MEASURES = {
    "operator": measure_operator,
    "workers": measure_workers,
    "processes": measure_processes,
}


# ---- a run


class Runner:
    """Measures the points of curves that the output lacks, one after the other."""

    def __init__(self, options: argparse.Namespace, output: Path) -> None:
        self.options, self.output = options, output
        self.machine = machine_record()
        # Written results make a tree dirty; the digest says whether its sources are.
        parts = [str(self.machine[n]).removesuffix("-dirty") for n in ("commit", "cpu", "cores", "python", "torch")]
        parts += [self.machine["isa"], self.machine["gpu"], options.device]
        self.key = run_key(*parts, more=("d2v",))
        free = available_bytes(options.device) * 7 // 10
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
        order = {
            "kind": curve.kind, "x": x, "case": curve.case(x) if curve.case else None, "dry": self.options.dry,
            "device": self.options.device, "budget": self.options.budget / 4.0, "quick": True,
            "rounds": 3 if self.options.dry else max(2, min(12, int(left / max(2.0 * sum(last), 1e-3)))),
        }  # fmt: skip
        memory: dict[str, int] = {}
        if curve.kind == "step" and self.options.device == "cpu":
            for form in forms:
                result = self._try(curve, {**order, "kind": "memory", "forms": [form]})
                memory |= {form: result["bytes"]} if result else {}
            forms = list(memory)
        result = self._try(curve, {**order, "forms": forms}) if forms else None
        if result is None:
            return False
        place = result["parameters"] if curve.name == "parameters" else x  # configurations are numbered
        self._write({**step.add_memory(result, memory), "kind": "point", "curve": curve.name, "label": curve.label,
                     "x": place, "x_given": x})  # fmt: skip
        return True

    def _try(self, curve: Curve, order: Row) -> Row | None:
        """What a process answers; None where it fails, and the curve ends."""
        try:
            return self.ask_child(order)
        except ChildError as error:
            self._stop(curve, order["x"], order["forms"], str(error))
            return None

    def ask_child(self, order: Row) -> Row:
        """The result of a process of its own, or of as many as the point has, that talk to each other."""
        threads, limit = self.options.threads, 4.0 * self.options.budget
        order = {**order, "threads": threads, "memory_limit": self.memory_limit if order["device"] == "cpu" else None}
        if order["kind"] == "memory":
            (size,) = step.ask_for_memory(order["case"], order, limit_s=limit).values()
            return {"bytes": size}
        if order["kind"] == "step":
            return step.ask_for_row(order["case"], order, limit_s=limit)
        ranks = f"--nproc-per-node={order['x']:.0f}"
        launcher = ["-m", "torch.distributed.run", "--standalone", ranks] if order["kind"] == "processes" else []
        result: Row = ask_child("growth", order, threads=threads, launcher=launcher, limit_s=limit)
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
            if not same or measured_on(old) != measured_on(row) or old.get("key") == self.key:
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
        order = json.loads(options.child)
        limit_memory(order["memory_limit"])
        with settings(order["threads"]):
            result = MEASURES[order["kind"]](order)
        if result:  # that of the first rank
            answer(result)
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
    rows = newest(read_rows(options.output))
    print(report.growth_table(rows))
    plots.growth(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
