"""The points of `benchmarks.growth`, each measured in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import resource
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import d2v_kernels as dk
from d2v import recipes
from d2v.config import Config
from d2v.dist import World, open_world
from d2v.pretraining import Pretraining
from d2v.train import open_data
from d2v.trainer import Trainer

from . import loader, step
from .harness.cases import eager_average
from .harness.record import answer
from .harness.timer import take_turns, time_interleaved
from .training.cases import Precision, StepCase, change
from .training.forms import measure_gpu_memory, settings, synchronise

Row = dict[str, Any]
GLOBAL_BATCH = 32
"""Samples of an update, shared by the processes."""
OPERATOR_SHAPE = (4, 500, 768)
"""(B,T,C) of every averaged layer."""


def available_bytes(device: str) -> int:
    """Memory that processes can still take, on the host or on the GPU."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def run(order: Row) -> None:
    """Measures one point and prints its result."""
    if order["device"] == "cpu":
        limit = order["memory_limit"]
        # An allocation too many then is an error that says so, and ends this process and no other.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with settings(order["threads"]):
        result = MEASURES[order["kind"]](order)
    if not dist.is_torchelastic_launched() or result:
        answer(result)


def _case(order: Row) -> StepCase:
    values = order["case"]
    return StepCase(**{**values, "settings": tuple(tuple(s) for s in values["settings"])})


def measure_step(order: Row) -> Row:
    """Time of a step of each form; on a GPU its memory, too."""
    device, case = torch.device(order["device"]), _case(order)
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    forms, batches = step.make_forms(case, order["forms"], device, precision)
    timings = step.time_forms(forms, batches, order["rounds"], order["seconds"])
    if device.type == "cuda":
        for form in forms:
            timings[form.name]["memory"] = measure_gpu_memory(form, batches[0])
    trained = sum(p.numel() for p in forms[0].parameters)
    result = {"case": case.name, "forms": timings, "samples": case.samples, "rows": len(batches[0][1].mask),
              "parameters": trained}  # fmt: skip
    # Configurations are numbered: their place on the axis is their size.
    return {**result, "x": trained} if order.get("curve") == "parameters" else result


def measure_memory(order: Row) -> Row:
    """Peak bytes of a step of one form."""
    return {"bytes": step.measure_memory(_case(order), order["forms"][0], torch.device(order["device"]))}


def measure_operator(order: Row) -> Row:
    """`average_layers` with instance norm against the published formulation."""
    shape = (2, 50, 64) if order["dry"] else OPERATOR_SHAPE
    generator = torch.Generator().manual_seed(0)
    device = torch.device(order["device"])
    layers = [torch.randn(shape, generator=generator).to(device) for _ in range(int(order["x"]))]

    def finish(result: torch.Tensor) -> torch.Tensor:
        synchronise(device)
        return result

    contenders = {
        "plain": lambda: finish(eager_average(layers, "instance", "none")),
        "d2v": lambda: finish(dk.average_layers(layers, norm="instance")),
    }
    torch.testing.assert_close(contenders["d2v"](), contenders["plain"](), rtol=1e-4, atol=1e-4)
    timings = time_interleaved(contenders, budget_s=3.0)
    name = f"average_layers instance B={shape[0]} T={shape[1]} C={shape[2]}"
    return {"case": name, "forms": timings}


def measure_workers(order: Row) -> Row:
    """Samples a second of the loader on generated JPEG images, with x workers."""
    workers = int(order["x"])
    with TemporaryDirectory(prefix="d2v-growth-") as folder:
        path = loader.write_images(Path(folder) / "images")
        config = loader.settings("vision-base", path, Path(folder) / "run", workers, global_batch=32)
        rates = loader.measure(config, 4.0)
    return {"case": "images in a folder", "forms": {"d2v": {"minimum": 1.0 / rates["samples_per_second"], **rates}}}


def _ranks_config(path: str, run: str, order: Row) -> Config:
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
        world = stack.enter_context(open_world(_ranks_config("", folder, order).run))
        path = world.share(loader.write_images(Path(folder) / "images") if world.is_first else None)
        config = _ranks_config(str(path), folder, order)
        source, _ = open_data(config)
        source.prepare(Path(folder) / "run", fresh=True)
        objective = Pretraining(config, source, None, world.device)
        trainer = Trainer(objective, world)
        updates = objective.updates(0, world)
        batches = [next(updates) for _ in range(3)]
        updates.close()
        timings = _time_updates(trainer, batches, world, rounds)
        slowest = [max(values) for values in zip(*world.gather(timings), strict=True)]
        world.wait()
    if not world.is_first:
        return {}
    exchanged, median, local = slowest
    trained = sum(p.numel() for p in trainer.parameters)
    form = {"minimum": exchanged, "median": median, "local": local, "rounds": rounds,
            "samples_per_second": GLOBAL_BATCH / exchanged, "exposed_share": 1.0 - local / exchanged}  # fmt: skip
    return {"case": f"{config.recipe}, {GLOBAL_BATCH} samples an update", "parameters": trained,
            "gradient_bytes": 4 * trained, "forms": {"d2v": form}}  # fmt: skip


def _time_updates(trainer: Trainer, batches: list[Any], world: World, rounds: int) -> tuple[float, float, float]:
    """Seconds of an update: least and median with the exchange of gradients, least without; in turn."""
    network: Any = trainer.network
    assert isinstance(network, DistributedDataParallel)
    order = itertools.cycle(batches)

    def update(exchange: bool) -> float:
        synchronise(world.device)
        world.wait()
        begin = time.perf_counter()
        # Weights of the ranks drift apart without it; the work stays the same.
        with contextlib.nullcontext() if exchange else network.no_sync():
            trainer.run_update(next(order))
            synchronise(world.device)
        return time.perf_counter() - begin

    samplers = {"exchange": partial(update, True), "local": partial(update, False)}
    samples = take_turns(samplers, rounds=rounds + 2, least=rounds + 2, budget_s=0.0)
    exchange, local = (samples[name][2:] for name in ("exchange", "local"))
    return min(exchange), statistics.median(exchange), min(local)


MEASURES = {
    "step": measure_step,
    "memory": measure_memory,
    "operator": measure_operator,
    "workers": measure_workers,
    "processes": measure_processes,
}
